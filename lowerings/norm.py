"""RMSNorm."""

import math
from collections.abc import Sequence
from itertools import takewhile

import torch

from dsv4_compile.op import Cost, Tensor, acc, compact, op


@op("dsv4::rms_norm")
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in at least fp32, rounded once.

    x [..., D], weight [D] -> [..., D] of x's dtype.
    """
    y = acc(x)
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * acc(weight)).to(x.dtype)


@rms_norm.cost
def _(N, D):
    return Cost(flops=4 * N * D, read=2 * N * D + 4 * D, write=2 * N * D)


@op("dsv4::unit_norm")
def unit_norm(x: Tensor, eps: float) -> Tensor:
    """RMSNorm without a weight: x / sqrt(mean(x^2) + eps) over the last axis; x [..., D] -> [..., D] of x's dtype."""
    y = acc(x)
    return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


@unit_norm.cost
def _(N, D):
    return Cost(flops=3 * N * D, read=2 * N * D, write=2 * N * D)


@rms_norm.sizes
@unit_norm.sizes
def _(a):
    *lead, D = a.x.shape
    return dict(N=math.prod(lead), D=D)


# On a GPU

LONGEST = 16384  # columns: what a block keeps in registers, with their weights
DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}  # as kernels name them


def fits_the_kernel(a) -> bool | str:
    """What kernels/norm.py is written for."""
    D = a.x.shape[-1]
    weight = getattr(a, "weight", None)
    if a.x.dtype not in DTYPES or (weight is not None and weight.dtype not in DTYPES):
        return "x and weight must be bfloat16 or float32"
    if not isinstance(D, int) or D % 4 or not 0 < D <= LONGEST:
        return f"rows of {D}: a multiple of 4 is needed, {LONGEST} at most"
    return True


def normed(
    x: Tensor, weight: Tensor | None, eps: float, cos: Tensor | None = None, sin: Tensor | None = None
) -> Tensor:
    """By the kernel; with cos and sin, whose leading axes broadcast against those of x, turned by RoPE."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    norm_into(out.view(-1, x.shape[-1]), None, x, weight, eps, cos, sin)
    return out


def norm_into(
    out: Tensor,
    slot: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
) -> None:
    """The rows of x [..., D], normed and turned, into out [N, D]; with slot [B, T], those of x [B, T, D] into the slots,
    modulo S, of out [B, S, D]."""
    from dsv4_compile.kernels.norm import Shape, launch

    D = x.shape[-1]
    rows = compact(x.reshape(-1, D))
    if not len(rows):
        return
    inner = 1 if cos is None else repeated(cos.shape, x.shape)
    tables = [None if t is None else table(t, x) for t in (cos, sin)]
    of_weight = "none" if weight is None else DTYPES[weight.dtype]
    cache, T = ("none", 1) if slot is None else (kept_in(out), slot.shape[1])
    shape = Shape(D, DTYPES[x.dtype], of_weight, 0 if cos is None else 2 * cos.shape[-1], cache)
    places = None if slot is None else compact(slot.reshape(-1))
    launch(shape, rows, None if weight is None else compact(weight), *tables, out, places, eps, inner, T)


def kept_in(cache: Tensor) -> str:
    """How a cache holds its rows, as kernels call it."""
    return "bytes" if cache.dtype == torch.uint8 else DTYPES[cache.dtype]


def repeated(small: Sequence[int], large: Sequence[int]) -> int:
    """How many rows of x in a row have one row of a table: the axes before the last in which the table has size 1."""
    lead = list(zip(reversed(small[:-1]), reversed(large[:-1]), strict=False))
    return math.prod(size for _, size in takewhile(lambda pair: pair[0] == 1, lead))


def table(x: Tensor, of: Tensor) -> Tensor:
    """As [P, n] fp32. Its first and last axes of size 1 stay what they are, those between are repeated as in `of`."""
    shape = list(x.shape[:-1])
    ends = [i for i, size in enumerate(shape) if size != 1]
    if ends:
        place = of.dim() - x.dim()
        shape = [of.shape[place + i] if ends[0] <= i <= ends[-1] else 1 for i in range(len(shape))]
    return compact(x.expand(*shape, x.shape[-1]).reshape(-1, x.shape[-1]).float())


@rms_norm.on("cuda", arch="sm_90+", when=fits_the_kernel)
def _(x, weight, eps):
    return normed(x, weight, eps)


@unit_norm.on("cuda", arch="sm_90+", when=fits_the_kernel)
def _(x, eps):
    return normed(x, None, eps)
