"""A compressor: rows gathered window by window, a softmax over the rows, weighted sum, RMSNorm, RoPE."""

import torch

from dsv4_compile.lowerings.compressor import compressor
from dsv4_compile.lowerings.pointwise import softmax
from dsv4_compile.match import Match, Scalar, T, rule
from dsv4_compile.patterns.attention import take

ROWS = dict(index=T(4, 11, 10, dtype=torch.int64), weight=T(19), cos=T(4, 11, 3), sin=T(4, 11, 3))
SHARED = ("aten.clamp_min", "aten.lt", "aten.full")  # of the windows' row lists, which layers have in common


def entry(c, z, index, weight, cos, sin, eps):
    none = (index < 0).unsqueeze(-1)
    p = torch.softmax(z.masked_fill(none, -1e30), 2)
    e = (p * c.masked_fill(none, 0.0)).sum(2)
    e = e * torch.rsqrt(e.square().mean(-1, keepdim=True) + eps) * weight
    dr = 2 * cos.shape[-1]
    nope, pairs = e[..., :-dr], e[..., -dr:]
    a, b = pairs[..., 0::2], pairs[..., 1::2]
    return torch.cat([nope, torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)], -1)


def halves(x, m, d):
    return torch.cat([x[:, :, :m, :d], x[:, :, m:, d:]], 2)


def overlapping(match: Match) -> bool:
    match.arguments["overlap"] = True
    return True


def separate(match: Match) -> bool:
    match.arguments["overlap"] = False
    return True


@rule(
    compressor,
    name="fuse.compressor",
    anchor=softmax,
    example=ROWS | dict(c=T(4, 17, 38), z=T(4, 17, 38)),
    check=overlapping,
    shared=SHARED,
)
def overlap(c, z, index, weight, cos, sin, eps: Scalar):
    m, d = index.shape[-1] // 2, weight.shape[0]
    c, z = halves(take(c, index), m, d), halves(take(z, index), m, d)
    return entry(c, z, index, weight, cos, sin, eps)


@rule(
    compressor,
    name="fuse.compressor",
    anchor=softmax,
    example=ROWS | dict(c=T(4, 17, 19), z=T(4, 17, 19)),
    check=separate,
    shared=SHARED,
)
def plain(c, z, index, weight, cos, sin, eps: Scalar):
    return entry(take(c, index), take(z, index), index, weight, cos, sin, eps)
