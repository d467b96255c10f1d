"""The end of the shared expert, and the sum with the routed ones."""

from typing import Any

import torch

from dsv4_compile.lowerings import gemv
from dsv4_compile.lowerings.linear import linear, sizes_of
from dsv4_compile.lowerings.norm import DTYPES
from dsv4_compile.lowerings.pointwise import swiglu
from dsv4_compile.op import Cost, Tensor, acc, known, op

ROWS = 4  # beyond them every block of the kernel spends longer on SwiGLU than one launch for all of them takes


@op("dsv4::shared_expert")
def shared_expert(
    gate: Tensor,
    up: Tensor,
    weight: Tensor,
    routed: Tensor,
    limit: float,
    scale: Tensor | None = None,
    scale_2: Tensor | None = None,
) -> Tensor:
    """routed + W swiglu(gate, up), rounded to gate's dtype.

    gate and up [M, K], routed [M, N] of at least fp32; weight [N, K], plain, or with scale and scale_2 as `linear` takes
    them -> [M, N]. The product is rounded to gate's dtype before it is added.  Source: DeepSeek-V4, experts.
    """
    return (routed + acc(linear(swiglu(gate, up, limit), weight, scale, scale_2))).to(gate.dtype)


@shared_expert.cost
def _(M, N, K, bits, block):
    return Cost(
        flops=2 * M * N * K + 5 * M * K, read=N * K * (bits / 8 + 1 / block) + 4 * M * K + 4 * M * N, write=2 * M * N
    )


@shared_expert.sizes
def _(a):
    return dict(M=a.gate.shape[0], **sizes_of(a.weight, a.scale))


def few_and_stored(a: Any) -> bool | str:
    if (verdict := gemv.few(a.gate, a.gate.shape[0])) is not True:
        return verdict
    if not known(a.gate.shape[0] <= ROWS):
        return f"more than {ROWS} rows, for which SwiGLU is a launch of its own"
    if a.up.dtype != a.gate.dtype or a.routed.dtype != torch.float32:
        return f"gate of {a.gate.dtype}, up of {a.up.dtype}, added to {a.routed.dtype}"
    if a.routed.numel() == 0 or a.gate.numel() == 0:
        return "nothing to compute"
    if (verdict := gemv.streams(a.weight, a.scale, a.scale_2)) is not True:
        return verdict
    return gemv.fits(shape_of(a.gate, a.weight, a.scale, a.scale_2)) or "vectors beyond shared memory"


def shape_of(gate: Tensor, weight: Tensor, scale: Tensor | None, scale_2: Tensor | None) -> Any:
    from dsv4_compile.kernels.shared_expert import Shape

    format = gemv.format_of(weight, scale, scale_2)
    assert format is not None, "`few_and_stored` was not asked"
    e8m0 = scale is None or scale.dtype != torch.float32
    return Shape(len(gate), len(weight), gate.shape[1], format, e8m0, DTYPES[gate.dtype])


@shared_expert.on("cuda", arch="sm_90+", when=few_and_stored)
def _(gate, up, weight, routed, limit, scale, scale_2):
    from dsv4_compile.kernels.shared_expert import launch

    y = torch.empty_like(routed, dtype=gate.dtype, memory_format=torch.contiguous_format)
    early = int(gemv.settled(y, weight, scale, scale_2))
    stored = gemv.words(weight), gemv.flat(scale), None if scale_2 is None else scale_2.view(1)
    vectors = gate.contiguous(), up.contiguous()
    shape = shape_of(gate, weight, scale, scale_2)
    launch(shape, *vectors, limit, *stored, routed.contiguous(), y, early)
    return y
