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
