"""RMSNorm, with and without a weight."""

import torch

from dsv4_compile.lowerings.norm import rms_norm, unit_norm
from dsv4_compile.match import Scalar, T, rule


@rule(rms_norm, name="raise.rms_norm", anchor="rsqrt", example={"x": T(5, 7), "weight": T(7)}, any_rank=True)
def weighted(x, weight, eps: Scalar):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


@rule(unit_norm, name="raise.unit_norm", anchor="rsqrt", example={"x": T(5, 7)}, any_rank=True)
def unweighted(x, eps: Scalar):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
