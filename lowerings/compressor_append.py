"""A compressor's memory, one call on: rows written, windows that they close compressed, entries written."""

import torch

from dsv4_compile.lowerings.append import append
from dsv4_compile.lowerings.compressor import DTYPES, compressor, fits_the_kernel
from dsv4_compile.op import Cost, Tensor, known, op

# Nobody runs this on the CPU: its parts are asked instead. What it saves is launches.


@op("dsv4::compressor_append", outputs=("new_values", "new_gates", "new_entries"))
def compressor_append(
    values: Tensor,
    gates: Tensor,
    entries: Tensor,
    slot: Tensor,
    c: Tensor,
    z: Tensor,
    ape: Tensor,
    place: Tensor,
    index: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    target: Tensor,
    eps: float,
    overlap: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """All that happens to what a compressor's two matrices give: `append` of both, the gates with the bias of their place in
    the window; `compressor`; `append` of the entries.

    values and gates [B, S, C], c and z [B, T, C] (at least fp32), ape [m, C]; slot and place [B, T] int64, not negative,
    taken modulo S and m, so that both may be the tokens' positions; index [B, n, R], weight, cos, sin, eps and overlap as
    `compressor` takes them, its rows those of values and gates after the write; entries [B, P, d], target [B, n] int64 ->
    values, gates and entries.  Source: DeepSeek-V4, CSA and HCA compressors.
    """
    row = slot % values.shape[1]
    values = append(values, row, c)
    gates = append(gates, row, z + ape[place % ape.shape[0]])
    e = compressor(values, gates, index, weight, cos, sin, eps, overlap)
    return values, gates, append(entries, target, e)


@compressor_append.cost
def _(B, T, C, n, R, d, bits):
    """Both rings in fp32; every window read."""
    rows = B * n * R * d
    flops = B * T * C + 6 * rows + 8 * B * n * d
    return Cost(flops=flops, read=12 * B * T * C + 8 * rows + 8 * B * n * R, write=8 * B * T * C + B * n * d * bits / 8)


@compressor_append.sizes
def _(a):
    (B, n, R), (T, C) = a.index.shape, a.c.shape[1:]
    return dict(B=B, T=T, C=C, n=n, R=R, d=a.weight.shape[0], bits=8 * a.entries.dtype.itemsize)


# On a GPU


def fits_one_token(a) -> bool | str:
    """What kernels/compressor_append.py is written for."""
    if any(t.dtype != torch.float32 for t in (a.values, a.gates, a.ape)) or a.entries.dtype not in DTYPES:
        return "values, gates and their bias must be float32, entries bfloat16 or float32"
    if not (known(a.c.shape[1] == 1) and known(a.index.shape[1] == 1)):
        return "more than one token, or more windows"  # a block would read rows that others write
    return fits_the_kernel(a)


@compressor_append.on("cuda", arch="sm_90+", in_place=("values", "gates", "entries"), when=fits_one_token)
def _(values, gates, entries, slot, c, z, ape, place, index, weight, cos, sin, target, eps, overlap):
    from dsv4_compile.kernels.compressor_append import Shape, launch

    if len(values):
        of_window = DTYPES[weight.dtype]
        shape = Shape(weight.shape[0], index.shape[-1], 2 * cos.shape[-1], overlap, of_window, DTYPES[entries.dtype])
        given = (t.contiguous() for t in (slot, c, z, ape, place, index, weight, cos, sin, target))
        launch(shape, values, gates, entries, *given, eps)
