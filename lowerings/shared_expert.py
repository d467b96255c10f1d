"""The end of the shared expert, the sum with the routed ones, and what mHC makes of it."""

from dataclasses import replace
from typing import Any

import sympy
import torch

from dsv4_compile.lowerings import gemv
from dsv4_compile.lowerings.linear import linear, sizes_of
from dsv4_compile.lowerings.mhc import mhc_post
from dsv4_compile.lowerings.norm import DTYPES
from dsv4_compile.lowerings.pointwise import swiglu
from dsv4_compile.op import Cost, Tensor, acc, alike, compact, known, op

STREAMS = 8  # that a thread holds
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
    X: Tensor | None = None,
    post: Tensor | None = None,
    comb: Tensor | None = None,
) -> Tensor:
    """y = routed + W swiglu(gate, up), rounded to gate's dtype; with X, post and comb: mhc_post(X, y, post, comb).

    gate and up [M, K], routed [M, N] of at least fp32; weight [N, K], plain, or with scale and scale_2 as `linear` takes
    them; X [M, n, N] of gate's dtype, post [M, n], comb [M, n, n] -> [M, N], or [M, n, N]. The product is rounded to gate's
    dtype before it is added.  Source: DeepSeek-V4, experts and mHC.
    """
    y = (routed + acc(linear(swiglu(gate, up, limit), weight, scale, scale_2))).to(gate.dtype)
    return y if X is None or post is None or comb is None else mhc_post(X, y, post, comb)


@shared_expert.cost
def _(M, N, K, bits, block, n):
    """n: streams, or 0."""
    return Cost(
        flops=2 * M * N * K + 5 * M * K + 2 * M * N * n * (n + 1),
        read=N * K * (bits / 8 + 1 / block) + 4 * M * K + 4 * M * N + 2 * M * N * n,
        write=2 * M * N * sympy.Max(n, 1),
    )


@shared_expert.sizes
def _(a):
    return dict(M=a.gate.shape[0], n=0 if a.X is None else a.X.shape[-2], **sizes_of(a.weight, a.scale))


def few_and_stored(a: Any) -> bool | str:
    if (verdict := gemv.few(a.gate, a.gate.shape[0])) is not True:
        return verdict
    if not alike() and not known(a.gate.shape[0] <= ROWS):
        return f"more than {ROWS} rows, for which SwiGLU is a launch of its own"
    if a.up.dtype != a.gate.dtype or a.routed.dtype != torch.float32:
        return f"gate of {a.gate.dtype}, up of {a.up.dtype}, added to {a.routed.dtype}"
    if a.routed.numel() == 0 or a.gate.numel() == 0:
        return "nothing to compute"
    if a.X is not None and (verdict := streams_fit(a.gate, a.X, a.post, a.comb)) is not True:
        return verdict
    if (verdict := gemv.streams(a.weight, a.scale, a.scale_2)) is not True:
        return verdict
    return at_once(shape_of(a.gate, a.weight, a.scale, a.scale_2, a.X)) > 0 or "vectors beyond shared memory"


def at_once(shape: Any) -> int:
    """How many of the vectors a launch takes, or 0: see `gemv.at_once`."""
    return gemv.at_once(shape.M, lambda n: gemv.fits(replace(shape, M=n)))


def streams_fit(x: Tensor, X: Tensor, post: Tensor, comb: Tensor) -> bool | str:
    """Whether the kernel can put vectors like x into the streams."""
    if not (X.dtype == x.dtype and post.dtype == comb.dtype == torch.float32):
        return f"streams of {X.dtype} with coefficients of {post.dtype} and {comb.dtype}"
    return known(X.shape[-2] <= STREAMS) or f"more than {STREAMS} streams"


def shape_of(gate: Tensor, weight: Tensor, scale: Tensor | None, scale_2: Tensor | None, X: Tensor | None) -> Any:
    from dsv4_compile.kernels.shared_expert import Shape

    format = gemv.format_of(weight, scale, scale_2)
    assert format is not None, "`few_and_stored` was not asked"
    e8m0 = scale is None or scale.dtype != torch.float32
    streams = 0 if X is None else X.shape[1]
    return Shape(len(gate), len(weight), gate.shape[1], format, e8m0, DTYPES[gate.dtype], streams)


@shared_expert.on("cuda", arch="sm_90+", when=few_and_stored)
def _(gate, up, weight, routed, limit, scale, scale_2, X, post, comb):
    from dsv4_compile.kernels.shared_expert import launch

    y = torch.empty((routed if X is None else X).shape, dtype=gate.dtype, device=gate.device)
    stored = gemv.words(weight), gemv.flat(scale), None if scale_2 is None else scale_2.view(1)
    shape = shape_of(gate, weight, scale, scale_2, X)
    rows = [None if t is None else compact(t) for t in (gate, up, routed, X, post, comb, y)]
    for first, m in gemv.turns(len(gate), at_once(shape)):
        early = int(gemv.settled(y, weight, scale, scale_2))
        g, u, *others = (None if t is None else gemv.some(t, first, m) for t in rows)
        launch(replace(shape, M=m), g, u, limit, *stored, *others, early)
    return y
