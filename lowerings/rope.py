"""RoPE on the trailing channels, in interleaved pairs; alone and behind an RMSNorm."""

import math

import torch

from dsv4_compile.lowerings.norm import fits_the_kernel, normed, rms_norm, unit_norm
from dsv4_compile.op import Cost, Tensor, acc, op


@op("dsv4::rope")
def rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """Rotate the trailing dr channels of x in interleaved pairs, in at least fp32; the others carry no position.

    x [..., d]; cos, sin [..., dr/2], their leading axes broadcast against those of x -> [..., d] of x's dtype. `inverse`
    turns back: -sin in the place of sin. No implementation: Inductor makes one loop of it and of what surrounds it.
    Source: DeepSeek-V4, partial RoPE.
    """
    dr = 2 * cos.shape[-1]
    cos, sin, pairs = acc(cos), acc(-sin if inverse else sin), acc(x[..., -dr:])
    a, b = pairs[..., 0::2], pairs[..., 1::2]
    rotated = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    return torch.cat([x[..., :-dr], rotated.to(x.dtype)], -1)


@rope.cost
def _(N, P, d, dr):
    return Cost(flops=3 * N * dr, read=2 * N * d + 4 * P * dr, write=2 * N * d)


@op("dsv4::norm_rope")
def norm_rope(x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """RMSNorm over the last axis, then `rope`: what attention does to its queries, head by head and without a weight, and
    to its keys.

    x [..., d], weight [d] or None, cos and sin as `rope` takes them -> [..., d] of x's dtype. Between the two the result
    may be rounded to x's dtype or not. None on the CPU: Inductor makes two loops of it.
    Source: DeepSeek-V4, attention.
    """
    return rope(unit_norm(x, eps) if weight is None else rms_norm(x, weight, eps), cos, sin, False)


@norm_rope.cost
def _(N, P, d, dr):
    return Cost(flops=4 * N * d + 3 * N * dr, read=2 * N * d + 4 * d + 4 * P * dr, write=2 * N * d)


@rope.sizes
@norm_rope.sizes
def _(a):
    *lead, d = a.x.shape
    return dict(N=math.prod(lead), P=math.prod(a.cos.shape[:-1]), d=d, dr=2 * a.cos.shape[-1])


def fits_with_rope(a) -> bool | str:
    dr = 2 * a.cos.shape[-1]
    return fits_the_kernel(a) if isinstance(dr, int) and dr <= a.x.shape[-1] else "tables of another size than x"


@norm_rope.on("cuda", arch="sm_90+", when=fits_with_rope)
def _(x, weight, eps, cos, sin):
    return normed(x, weight, eps, cos, sin)
