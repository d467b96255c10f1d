"""A compressor's memory, one call on: rows written, windows that they close compressed, entries written."""

from types import SimpleNamespace

import torch

from dsv4_compile.lowerings.append import append
from dsv4_compile.lowerings.compressor import DTYPES, compressor, fits_the_kernel
from dsv4_compile.lowerings.kv import in_whole_blocks, is_packed, rows_for
from dsv4_compile.op import Cost, Tensor, compact, known, op

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
    values, gates and entries. Entries of uint8 are rows in bytes, as `pack_kv` makes them. Source: DeepSeek-V4, CSA and HCA
    compressors.
    """
    values, gates = remembered(values, gates, slot, c, z, ape, place)
    e = compressor(values, gates, index, weight, cos, sin, eps, overlap)
    return values, gates, append(entries, target, rows_for(entries, e, 2 * cos.shape[-1]))


def remembered(
    values: Tensor, gates: Tensor, slot: Tensor, c: Tensor, z: Tensor, ape: Tensor, place: Tensor
) -> tuple[Tensor, Tensor]:
    """Values and gates after the new rows, these with their bias."""
    row = slot % values.shape[1]
    return append(values, row, c), append(gates, row, z + ape[place % ape.shape[0]])


FP8_MAX = 448.0
SCALED = "values", "gates", "entries", "scales"


def quantized(e: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [..., d] -> codes e4m3 and scales [..., 1] fp32: the least powers of two, from 2^-100, with which they fit."""
    amax = e.abs().amax(-1, keepdim=True).float()
    bits = (amax / FP8_MAX).clamp(min=2.0**-100).view(torch.int32)
    scale = ((bits + 0x7FFFFF) & -0x800000).view(torch.float32)
    return (e / scale).to(torch.float8_e4m3fn), scale


@op("dsv4::compressor_append_fp8", outputs=tuple(f"new_{name}" for name in SCALED))
def compressor_append_fp8(
    values: Tensor,
    gates: Tensor,
    entries: Tensor,
    scales: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`compressor_append` whose entries [B, P, d] are e4m3, each with a scale [B, P, 1] fp32: see `quantized`.
    Source: DeepSeek-V4, formats of entries.
    """
    values, gates = remembered(values, gates, slot, c, z, ape, place)
    codes, scale = quantized(compressor(values, gates, index, weight, cos, sin, eps, overlap))
    return values, gates, append(entries, target, codes), append(scales, target, scale)


@compressor_append.cost
def _(B, T, C, n, R, d, bytes):
    """Both rings in fp32; every window read. bytes: of an entry."""
    return cost(B, T, C, n, R, d, bytes)


@compressor_append_fp8.cost
def _(B, T, C, n, R, d, bytes):
    """And a scale for each entry."""
    c = cost(B, T, C, n, R, d, bytes)
    return Cost(flops=c.flops + 3 * B * n * d, read=c.read, write=c.write + 4 * B * n)


def cost(B, T, C, n, R, d, bytes) -> Cost:
    rows = B * n * R * d
    flops = B * T * C + 6 * rows + 8 * B * n * d
    return Cost(flops=flops, read=12 * B * T * C + 8 * rows + 8 * B * n * R, write=8 * B * T * C + B * n * bytes)


@compressor_append.sizes
@compressor_append_fp8.sizes
def _(a):
    (B, n, R), (T, C) = a.index.shape, a.c.shape[1:]
    return dict(B=B, T=T, C=C, n=n, R=R, d=a.weight.shape[0], bytes=a.entries.shape[-1] * a.entries.dtype.itemsize)


# On a GPU

E4M3, MOST = torch.float8_e4m3fn, 128  # channels of scaled entries: those of a warp


def is_scaled(a) -> bool:
    """Whether these are arguments of `compressor_append_fp8`."""
    return hasattr(a, "scales")


def shape_of(a):
    """Of its kernel."""
    from dsv4_compile.kernels.compressor_append import Shape

    entries = "fp8" if is_scaled(a) else "bytes" if is_packed(a.entries) else DTYPES[a.entries.dtype]
    return Shape(len(a.weight), a.index.shape[-1], 2 * a.cos.shape[-1], a.overlap, DTYPES[a.weight.dtype], entries)


def tensors_of(a):
    """All tensors, as its kernel takes them."""
    entries, scales = (a.entries.view(torch.uint8), a.scales) if is_scaled(a) else (a.entries, None)
    read = ("slot", "c", "z", "ape", "place", "index", "weight", "cos", "sin", "target")
    return a.values, a.gates, entries, scales, *(compact(getattr(a, name)) for name in read)


def fits_one_token(a) -> bool | str:
    """What kernels/compressor_append.py is written for."""
    if any(t.dtype != torch.float32 for t in (a.values, a.gates, a.ape)):
        return "values, gates and their bias must be float32"
    if is_scaled(a):
        d = a.weight.shape[0]
        if not isinstance(d, int) or d > MOST or a.entries.dtype != E4M3 or a.scales.dtype != torch.float32:
            return (
                f"entries of {d} channels, {a.entries.dtype} and {a.scales.dtype}: at most {MOST} of e4m3 with float32"
            )
    elif is_packed(a.entries):
        if (verdict := in_whole_blocks(a.weight.shape[0], 2 * a.cos.shape[-1])) is not True:
            return verdict
    elif a.entries.dtype not in DTYPES:
        return "entries must be bfloat16, float32 or rows in bytes"
    if not (known(a.c.shape[1] == 1) and known(a.index.shape[1] == 1)):
        return "more than one token, or more windows"  # a block would read rows that others write
    return fits_the_kernel(a)


@compressor_append.on("cuda", arch="sm_90+", in_place=("values", "gates", "entries"), when=fits_one_token)
def _(*given):
    in_one(SimpleNamespace(**compressor_append.arguments(*given)))


@compressor_append_fp8.on("cuda", arch="sm_90+", in_place=SCALED, when=fits_one_token)
def _(*given):
    in_one(SimpleNamespace(**compressor_append_fp8.arguments(*given)))


def in_one(a) -> None:
    from dsv4_compile.kernels.compressor_append import launch

    if len(a.values):
        launch(shape_of(a), *tensors_of(a), a.eps)
