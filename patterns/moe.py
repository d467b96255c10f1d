"""Routed experts. Few tokens gather the matrices that they chose, many are sorted by expert; stored weights are dequantised
after the gathering or whole. All of it is the same op on the weights as they are stored."""

import math

import torch

from dsv4_compile.lowerings.dequantize import dequantize
from dsv4_compile.lowerings.grouped_mm import grouped_mm
from dsv4_compile.lowerings.moe import moe
from dsv4_compile.lowerings.pointwise import swiglu
from dsv4_compile.match import Int, Made, Match, Scalar, T, head, known, rule, shape, strip
from dsv4_compile.patterns.repeats import repeats, same_repeats

E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
X, N, K = 11, 17, 13  # experts, tokens, choices
UNUSED = T(19)


def stored(rows: int, columns: int, weight: torch.dtype, scale: torch.dtype | None = None, block: int = 1) -> list[T]:
    """Weight, scale and scale_2 of one stacked matrix, as the format has them."""
    if scale is None:
        return [T(X, rows, columns), UNUSED, UNUSED]
    if weight == E4M3:
        return [T(X, rows, columns, dtype=E4M3), T(X, -(-rows // 128), -(-columns // 128), dtype=scale), UNUSED]
    codes = T(X, rows, columns // 2, dtype=weight)
    return [codes, T(X, rows, columns // block, dtype=scale), T(X) if scale == E4M3 else UNUSED]


def example(D: int, I: int, *format) -> dict[str, T]:
    (w1, s1, t1), (w2, s2, t2) = stored(I, D, *format), stored(D, I, *format)
    tokens = {"x": T(N, D), "expert": T(N, K, dtype=torch.int64), "gate": T(N, K)}
    return tokens | {"w1": w1, "w3": w1, "w2": w2, "s1": s1, "s3": s1, "s2": s2, "t1": t1, "t3": t1, "t2": t2}


FORMATS = [  # plain ones last: a dequantised weight is a weight too
    example(400, 300, E4M3, E8M0),
    example(224, 160, torch.uint8, E8M0, 32),
    example(224, 160, torch.uint8, E4M3, 16),
    example(7, 5, torch.float32),
]


def plain(weight, scale, scale_2, index=None):
    """The weight as numbers; with an index, those of some experts."""
    stored = [t if index is None else t[index] for t in (weight, scale, scale_2) if t.shape != UNUSED.shape]
    return stored[0] if len(stored) == 1 else dequantize(*stored, *[None] * (3 - len(stored)))


def interleaved(match: Match) -> bool | str:
    """Each token k times in a row, as its choices lie: the matcher cannot tell that from all tokens k times."""
    x, (_, k) = match.arguments["x"], shape(match.arguments["gate"])
    *lead, D = shape(x)
    rows = next(a for n in match.inner if head(n) == "aten.bmm" for a in n.args if strip(a) is strip(x))
    return (
        same_repeats(repeats(rows, x), [(math.prod(lead), k, D)]) or "each token repeated in a row, once for a choice"
    )


def sorted_by_expert(match: Match) -> bool:
    """k is no argument of its own."""
    del match.arguments["k"]
    return True


@rule(moe, name="fuse.moe", anchor="index", example=FORMATS, check=interleaved)
def gathered(x, expert, gate, w1, w3, w2, limit: Scalar, s1, s3, s2, t1, t3, t2):
    chosen = expert.flatten()
    m1, m3, m2 = plain(w1, s1, t1, chosen), plain(w3, s3, t3, chosen), plain(w2, s2, t2, chosen)
    x_k = x.repeat_interleave(expert.shape[-1], 0).unsqueeze(1)
    h = swiglu(x_k @ m1.transpose(-1, -2), x_k @ m3.transpose(-1, -2), limit)
    y = (h @ m2.transpose(-1, -2)).view(*expert.shape, x.shape[-1])
    return (y * gate.unsqueeze(-1)).sum(1)


@rule(moe, name="fuse.moe", anchor=grouped_mm, example=[{**e, "k": K} for e in FORMATS], check=sorted_by_expert)
def grouped(x, expert, gate, w1, w3, w2, limit: Scalar, s1, s3, s2, t1, t3, t2, k: Int):
    chosen = expert.flatten()
    m1, m3, m2 = plain(w1, s1, t1), plain(w3, s3, t3), plain(w2, s2, t2)
    order = chosen.argsort(stable=True)
    ends = torch.searchsorted(chosen[order], torch.arange(X, device=x.device), right=True)
    x_k = x[order // k]
    h = swiglu(grouped_mm(x_k, m1, ends), grouped_mm(x_k, m3, ends), limit)
    y = grouped_mm(h, m2, ends)[order.argsort()].view(*expert.shape, x.shape[-1])
    return (y * gate.unsqueeze(-1)).sum(1)


# As Hugging Face has them: W1 and W3 in one matrix, and the gates applied before the choices are put back in order.

I, D = 23, 7
PACKED = dict(x=T(N, D), expert=T(N, K, dtype=torch.int64), gate=T(N, K), w13=T(X, 2 * I, D), w2=T(X, D, I))


def unpacked(match: Match) -> bool:
    w13 = match.arguments.pop("w13")
    match.arguments |= {"w1": Made(lambda w: w.chunk(2, 1)[0], (w13,)), "w3": Made(lambda w: w.chunk(2, 1)[1], (w13,))}
    return True


def unpacked_and_interleaved(match: Match) -> bool | str:
    return unpacked(match) and interleaved(match)


def unpacked_and_sorted(match: Match) -> bool | str:
    X, top, _ = (match.arguments.pop(name) for name in ("experts", "top", "k"))
    return unpacked(match) and (known(top == X - 1) or f"a histogram of experts 0 to {X - 1}, found {top}")


@rule(moe, name="fuse.moe", anchor="index", example=PACKED, check=unpacked_and_interleaved)
def gathered_packed(x, expert, gate, w13, w2, limit: Scalar):
    chosen = expert.flatten()
    x_k = x.repeat_interleave(expert.shape[-1], 0)
    g, u = torch.bmm(w13[chosen], x_k.unsqueeze(-1)).squeeze(-1).chunk(2, -1)
    y = torch.bmm(w2[chosen], swiglu(g, u, limit).unsqueeze(-1)).squeeze(-1) * gate.flatten().unsqueeze(-1)
    return y.view(*expert.shape, x.shape[-1]).sum(1)


@rule(
    moe,
    name="fuse.moe",
    anchor=grouped_mm,
    example=PACKED | {"experts": X, "top": X - 1, "k": K},
    check=unpacked_and_sorted,
)
def grouped_packed(x, expert, gate, w13, w2, limit: Scalar, experts: Int, top: Int, k: Int):
    chosen, order = expert.flatten().sort()
    counted = chosen.float() if x.device.type == "cpu" else chosen.int()
    ends = torch.histc(counted, experts, 0, top).cumsum(0, dtype=torch.int32)
    g, u = grouped_mm(x[order // k], w13, ends).chunk(2, -1)
    y = grouped_mm(swiglu(g, u, limit), w2, ends) * gate.flatten()[order].unsqueeze(-1)
    back = torch.empty_like(order).index_put((order,), torch.arange(len(order), device=x.device))
    return y[back].view(*expert.shape, x.shape[-1]).sum(1)
