"""RMSNorm."""

import math

import torch

from dsv4_compile.op import Cost, Tensor, acc, op


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
DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def fits_the_kernel(a) -> bool | str:
    """What kernels/norm.py is written for."""
    D = a.x.shape[-1]
    if a.x.dtype not in DTYPES or getattr(a, "weight", a.x).dtype not in DTYPES:
        return "x and weight must be bfloat16 or float32"
    if not isinstance(D, int) or D % 4 or not 0 < D <= LONGEST:
        return f"rows of {D}: a multiple of 4 is needed, {LONGEST} at most"
    return True


def normed(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    from dsv4_compile.kernels.norm import Shape, launch

    D = x.shape[-1]
    rows = x.reshape(-1, D).contiguous()
    out = torch.empty_like(rows)
    if len(rows):
        of_weight = "none" if weight is None else DTYPES[weight.dtype]
        launch(Shape(D, DTYPES[x.dtype], of_weight), rows, None if weight is None else weight.contiguous(), out, eps)
    return out.view(x.shape)


@rms_norm.on("cuda", arch="sm_90+", when=fits_the_kernel)
def _(x, weight, eps):
    return normed(x, weight, eps)


@unit_norm.on("cuda", arch="sm_90+", when=fits_the_kernel)
def _(x, eps):
    return normed(x, None, eps)
