"""Routed experts: for each token, the gated sum of the k clamped SwiGLU experts that were chosen for it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional as F

from dsv4_compile.lowerings import gemv, native
from dsv4_compile.lowerings.dequantize import dequantize, dequantized
from dsv4_compile.lowerings.grouped_mm import grouped_mm
from dsv4_compile.lowerings.norm import DTYPES
from dsv4_compile.lowerings.pointwise import swiglu
from dsv4_compile.op import Cost, Tensor, acc, alike, compact, hinted, known, op


@op("dsv4::moe")
def moe(
    x: Tensor,
    expert: Tensor,
    gate: Tensor,
    w1: Tensor,
    w3: Tensor,
    w2: Tensor,
    limit: float,
    s1: Tensor | None = None,
    s3: Tensor | None = None,
    s2: Tensor | None = None,
    t1: Tensor | None = None,
    t3: Tensor | None = None,
    t2: Tensor | None = None,
) -> Tensor:
    """y_n = sum_j gate_nj W2_e swiglu(W1_e x_n, W3_e x_n) with e = expert_nj; a token may choose an expert twice.

    x [N, D], expert [N, k] int64, gate [N, k], w1 and w3 [X, I, D], w2 [X, D, I] -> [N, D] of at least fp32. Weights are
    plain, or stored as `dequantize` takes them, with s and t for its scale and scale_2. Matrix products take operands of
    x's dtype, the rest is computed in at least fp32.  Source: DeepSeek-V4, experts.
    """
    k, chosen = expert.shape[-1], expert.flatten()
    ws, ss, ts = (w1, w3, w2), (s1, s3, s2), (t1, t3, t2)
    if known(chosen.shape[0] <= w1.shape[0]):  # few tokens: gather the matrices that are used
        m1, m3, m2 = (
            plain(w[chosen], at(s, chosen), at(t, chosen), x.dtype) for w, s, t in zip(ws, ss, ts, strict=True)
        )
        x_k = x.repeat_interleave(k, 0).unsqueeze(-1)
        h = swiglu.meaning(m1 @ x_k, m3 @ x_k, limit)
        y = acc(m2 @ h).squeeze(-1)
    else:  # many: sort the choices by expert, multiply with all
        m1, m3, m2 = (plain(w, s, t, x.dtype) for w, s, t in zip(ws, ss, ts, strict=True))
        order = chosen.argsort(stable=True)
        ends = torch.searchsorted(chosen[order], torch.arange(w1.shape[0], device=x.device), right=True)
        x_k = x[order // k]
        h = swiglu.meaning(grouped_mm.meaning(x_k, m1, ends), grouped_mm.meaning(x_k, m3, ends), limit)
        y = acc(grouped_mm.meaning(h, m2, ends))[order.argsort()]
    return (y.view(*expert.shape, x.shape[-1]) * acc(gate).unsqueeze(-1)).sum(1)


def plain(weight: Tensor, scale: Tensor | None, scale_2: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight as numbers of `dtype`."""
    return (weight if scale is None else dequantize.meaning(weight, scale, scale_2)).to(dtype)


def at(x: Tensor | None, index: Tensor) -> Tensor | None:
    return None if x is None else x[index]


@moe.cost
def _(N, k, X, D, I, hit, bits):
    """hit: how many different experts are chosen; bits of a weight, its share of the scales included."""
    return Cost(flops=6 * N * k * D * I, read=hit * 3 * D * I * bits / 8 + 2 * N * D + 12 * N * k, write=4 * N * D)


@moe.sizes
def _(a):
    return dict(k=a.expert.shape[-1], **sizes(a, a.expert.shape[-1]))


def sizes(a: Any, k: int) -> dict[str, Any]:
    """What the cost counts, but for k."""
    (N, D), (X, I) = a.x.shape, a.w1.shape[:2]
    stored = sum(t.numel() * t.dtype.itemsize for t in (a.w1, a.s1, a.t1) if t is not None)
    hit = X * (1 - (1 - min(k, X) / X) ** hinted(N))  # on average, if all are as likely
    return dict(N=N, X=X, D=D, I=I, hit=hit, bits=8 * stored / (X * I * D))


# GPU, few tokens: each choice's matrices are streamed once.


def few_and_streamed(a: Any) -> bool | str:
    verdict = gemv.few(a.x, a.x.shape[0], times(a, a.expert.shape[-1]))
    if verdict is not True:
        return verdict
    if a.expert.dtype != torch.int64 or a.gate.dtype not in DTYPES:
        return f"choices of {a.expert.dtype} with gates of {a.gate.dtype}"
    return stored_alike((a.w1, a.s1, a.t1), (a.w3, a.s3, a.t3), (a.w2, a.s2, a.t2))


def times(a: Any, k: int) -> int:
    """How many launches of `gemv.ROWS` tokens, each of which reads their choices, take no longer than all matrices, dequantised
    if they have to be, once."""
    read = min(a.w1.shape[0], gemv.ROWS * k)
    return max(1, gemv.times((a.w1, a.s1, False)) * a.w1.shape[0] // max(1, read))


def stored_alike(*matrices: "Stored") -> bool | str:
    """Whether the kernels can read matrices, all in one format."""
    for s in matrices:
        if (verdict := gemv.streams(*s)) is not True:
            return verdict
    alike = {(gemv.format_of(*s), None if s[1] is None else s[1].dtype) for s in matrices}
    return len(alike) == 1 or "the three matrices are stored in different formats"


@moe.on("cuda", arch="sm_90+", when=few_and_streamed)
def _(x, expert, gate, w1, w3, w2, limit, s1, s3, s2, t1, t3, t2):
    from dsv4_compile.kernels.moe import Shape, launch

    (N, D), k, (X, I) = x.shape, expert.shape[-1], w1.shape[:2]
    if N * k * D * I == 0:
        return x.new_zeros(x.shape, dtype=torch.float32)
    format = gemv.format_of(w1, s1, t1)
    assert format is not None, "`few_and_streamed` was not asked"
    shape = Shape(N, k, X, D, I, format, s1 is None or s1.dtype != torch.float32, DTYPES[x.dtype])
    h, y = x.new_empty(N, k, I), x.new_empty(N, D, dtype=torch.float32)
    stored = [gemv.words(w) for w in (w1, w3, w2)] + [gemv.flat(s) for s in (s1, s3, s2)] + [t1, t3, t2]
    rows = compact(x), compact(expert), compact(gate.float())
    for first, n in gemv.turns(N, gemv.ROWS):
        gemv.settled(y)
        *given, hidden, out = (gemv.some(t, first, n) for t in (*rows, h, y))
        launch(replace(shape, N=n), *given, *stored, limit, hidden.view(-1, I), out)
    return y


# CPU. The weights that are read are those of the experts that are chosen, each once. Each token's sum goes over its choices
# in their order, whatever the other tokens are.

SLAB = 1 << 23  # dequantised numbers at a time
Stored = tuple[Tensor, Tensor | None, Tensor | None]  # weight, scale, scale_2


def stored_or_many(a) -> bool | str:
    plain = a.s1 is None and a.x.dtype == a.w1.dtype == torch.float32
    few = known(a.expert.numel() <= a.w1.shape[0])
    return alike() or not (plain and few) or "compiled, plain matrices of few choices are read as fast"


@moe.on("cpu", worth=stored_or_many)
def _(x, expert, gate, w1, w3, w2, limit, s1, s3, s2, t1, t3, t2):
    out = torch.promote_types(acc(x).dtype, acc(gate).dtype)
    stored = (w1, s1, t1), (w3, s3, t3), (w2, s2, t2)
    if expert.numel() == 0:
        return x.new_zeros(x.shape, dtype=out)
    few = len(x) <= gemv.few_tokens() if alike() else expert.numel() <= w1.shape[0]
    if few and (y := in_one_call(x, expert, gate, stored, limit)) is not None:
        return y
    run = few_tokens if few else many_tokens
    return run(acc(x), expert, gate.to(acc(x).dtype), stored, limit).to(out)


def in_one_call(x: Tensor, expert: Tensor, gate: Tensor, stored: Sequence[Stored], limit: float) -> Tensor | None:
    """Few tokens in C++: only the rows of the chosen matrices are ever in fp32, one at a time."""
    x, expert, gate, library = x.contiguous(), expert.contiguous(), gate.contiguous(), native.library()
    if library is None or not native.exact(x, gate) or expert.dtype != torch.int64:
        return None
    weights = [native.described(*s) for s in stored]
    if None in weights:
        return None
    (N, k), (X, I), D, y = expert.shape, stored[0][0].shape[:2], x.shape[1], torch.empty_like(x)
    numbers = x.data_ptr(), expert.data_ptr(), gate.data_ptr(), y.data_ptr()
    if library.dsv4_moe(*weights, *numbers, X, N, k, limit, native.threads(3 * N * k * I * D)):
        raise IndexError(f"an expert lies beyond the {X} that there are")
    return y


def few_tokens(x: Tensor, expert: Tensor, gate: Tensor, stored: Sequence[Stored], limit: float) -> Tensor:
    """Choice by choice, matrix times vector: 0.1 ms where gathering the matrices takes 0.25 (N = 1, k = 4, D = 192, I = 64,
    fp32, one core), 0.3 against 1.6 with MXFP4 weights."""
    chosen = expert.tolist()
    hit = sorted({e for row in chosen for e in row})
    m1, m3, m2 = (dict(zip(hit, matrices(s, hit, x.dtype), strict=True)) for s in stored)
    choices = [(e, row) for row, es in zip(x.unbind(0), chosen, strict=True) for e in es]
    h = clamped(torch.stack([m1[e].mv(v) for e, v in choices]), torch.stack([m3[e].mv(v) for e, v in choices]), limit)
    h = h.mul_(gate.reshape(-1, 1)).view(*expert.shape, -1)
    y = torch.zeros_like(x, memory_format=torch.contiguous_format)
    for y_n, es, hs in zip(y.unbind(0), chosen, h.unbind(0), strict=True):
        for e, h_j in zip(es, hs.unbind(0), strict=True):
            y_n.addmv_(m2[e], h_j)
    return y


def many_tokens(x: Tensor, expert: Tensor, gate: Tensor, stored: Sequence[Stored], limit: float) -> Tensor:
    """Sort the choices by expert, one product for each expert that has any, back in the order of the choices, and sum:
    18 ms where blocks of rows take 55 (N = 2048, 24 experts, sizes as above), and torch's grouped product in bf16 140."""
    (N, k), D, flat = expert.shape, x.shape[1], expert.flatten()
    X, I = stored[0][0].shape[:2]
    order, count = flat.argsort(stable=True), flat.bincount(minlength=X).tolist()
    hit = [e for e in range(X) if count[e]]
    rows, weight = x.index_select(0, order // k), gate.flatten().index_select(0, order).unsqueeze(1)
    y = x.new_empty(N * k, D)
    step, last = max(1, SLAB // max(1, 3 * I * D)), 0
    for i in range(0, len(hit), step):
        slab = hit[i : i + step]
        sizes = [count[e] for e in slab]
        first, last = last, last + sum(sizes)
        here = rows[first:last]
        m1, m3, m2 = (matrices(s, slab, x.dtype) for s in stored)
        h = clamped(products(here, m1, sizes), products(here, m3, sizes), limit).mul_(weight[first:last])
        y[first:last] = products(h, m2, sizes)
    y = torch.empty_like(y).index_copy_(0, order, y).view(N, k, D)
    total = y[:, 0].contiguous()
    for j in range(1, k):
        total += y[:, j]
    return total


def products(x: Tensor, matrix: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """x [M, K] in groups of `sizes` rows, each times its matrix [J, K] transposed -> [M, J]."""
    y = x.new_empty(x.shape[0], matrix[0].shape[0])
    for group, m, out in zip(x.split(sizes), matrix, y.split(sizes), strict=True):
        torch.mm(group, m.t(), out=out)
    return y


def clamped(g: Tensor, u: Tensor, limit: float) -> Tensor:
    """SwiGLU in place."""
    return F.silu(g.clamp_(max=limit), inplace=True).mul_(u.clamp_(-limit, limit))


def matrices(stored: Stored, experts: list[int], dtype: torch.dtype) -> Sequence[Tensor]:
    """The plain matrices of some experts; views where nothing has to be computed."""
    weight, scale, scale_2 = stored
    if scale is None and weight.dtype == dtype:
        return [weight[e] for e in experts]
    index = torch.tensor(experts, device=weight.device)
    if scale is None:
        return weight.index_select(0, index).to(dtype).unbind(0)
    scale_2 = None if scale_2 is None else scale_2.index_select(0, index)
    return dequantized(pick(weight, index), pick(scale, index), scale_2).to(dtype).unbind(0)


def pick(x: Tensor, index: Tensor) -> Tensor:
    """index_select, 8-bit floats as the bytes that they are."""
    if x.dtype.itemsize > 1:
        return x.index_select(0, index)
    return x.view(torch.uint8).index_select(0, index).view(x.dtype)
