"""A compressor: rows gathered window by window, a softmax over the rows, weighted sum, RMSNorm, RoPE.

Hugging Face has the windows as an axis of their own instead of gathering rows; the op gets the row lists that say so.
"""

import torch

from dsv4_compile.lowerings.compressor import compressor
from dsv4_compile.lowerings.pointwise import softmax
from dsv4_compile.match import Made, Match, Scalar, T, rule
from dsv4_compile.patterns.attention import take
from dsv4_compile.patterns.rope import turned, turned_by_swapping

ROWS = dict(index=T(4, 11, 10, dtype=torch.int64), weight=T(19), cos=T(4, 11, 3), sin=T(4, 11, 3))
SHARED = ("aten.clamp_min", "aten.lt", "aten.full")  # of the windows' row lists, which layers have in common


def entry(c, z, index, weight, cos, sin, eps):
    none = (index < 0).unsqueeze(-1)
    p = torch.softmax(z.masked_fill(none, -1e30), 2)
    e = (p * c.masked_fill(none, 0.0)).sum(2)
    return turned(e * torch.rsqrt(e.square().mean(-1, keepdim=True) + eps) * weight, cos, sin)


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


# As Hugging Face has it, with B = 4, n = 11 windows of R = 17 rows, d = 19.

END = 2**63 - 1
aten = torch.ops.aten
WINDOWS = dict(weight=T(19), cos=T(4, 11, 3), sin=T(4, 11, 3))
OLD_AND_NEW = WINDOWS | dict(c=T(4, 11, 17, 38), z=T(4, 11, 17, 38))


def entry_of_windows(c, z, weight, cos, sin, eps):
    e = (c * torch.softmax(z, 2)).sum(2)
    e = (e * torch.rsqrt(e.square().mean(-1, keepdim=True) + eps) * weight).unsqueeze(1)
    return turned_by_swapping(e, cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)).squeeze(1)


def written(whole, part, *places):
    """`whole` with `part` in the slices (dim, start, end), the outermost first, as functionalisation writes it."""
    if not places:
        return aten.copy.default(whole, part)
    inner = aten.slice.Tensor(whole, *places[0])
    return aten.slice_scatter.default(whole, written(inner, part, *places[1:]), *places[0])


def beside(x, fill, d):
    """[B, n, R, 2 d] -> [B, n, 2 R, d]: the first d channels of the window before, then the last d of this one."""
    B, n, R, _ = x.shape
    wide = written(torch.full((B, n, 2 * R, d), fill, dtype=x.dtype, device=x.device), x[..., d:], (2, R, END))
    return written(wide, x[:, :-1, :, :d], (1, 1, END), (2, 0, R)) if n > 1 else wide


def rows(x):
    return x.flatten(1, 2)


def separate_windows(c):
    B, n, R, _ = c.shape
    return torch.arange(n * R, device=c.device).view(1, n, R).expand(B, n, R)


def overlapping_windows(c):
    """Row lists of 2 R: the window before, none for the first, and this one."""
    B, n, R, _ = c.shape
    first = torch.arange(n, device=c.device).view(1, n, 1) * R
    return (first + torch.arange(-R, R, device=c.device)).clamp(min=-1).expand(B, n, 2 * R)


def by_lists(index, overlap: bool):
    """A check that gives the op rows and row lists for windows."""

    def check(match: Match) -> bool:
        a = match.arguments
        a["index"] = Made(index, (a["c"],))
        a["c"], a["z"], a["overlap"] = Made(rows, (a["c"],)), Made(rows, (a["z"],)), overlap
        return True

    return check


@rule(
    compressor,
    name="fuse.compressor",
    anchor=softmax,
    example=[OLD_AND_NEW, OLD_AND_NEW | dict(c=T(4, 1, 17, 38), z=T(4, 1, 17, 38), cos=T(4, 1, 3), sin=T(4, 1, 3))],
    check=by_lists(overlapping_windows, True),
)
def overlap_of_windows(c, z, weight, cos, sin, eps: Scalar):
    d = weight.shape[0]
    return entry_of_windows(beside(c, 0.0, d), beside(z, float("-inf"), d), weight, cos, sin, eps)


@rule(
    compressor,
    name="fuse.compressor",
    anchor=softmax,
    example=WINDOWS | dict(c=T(4, 11, 17, 19), z=T(4, 11, 17, 19)),
    check=by_lists(separate_windows, False),
)
def plain_of_windows(c, z, weight, cos, sin, eps: Scalar):
    return entry_of_windows(c, z, weight, cos, sin, eps)
