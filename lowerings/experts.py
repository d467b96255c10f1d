"""All of a mixture of experts but the router's product: choices, routed experts, the shared one, and what mHC makes of it."""

from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import sympy
import torch

from dsv4_compile.lowerings import gemv, moe, router
from dsv4_compile.lowerings.linear import linear, sizes_of
from dsv4_compile.lowerings.norm import DTYPES
from dsv4_compile.lowerings.shared_expert import shared_expert, streams_fit
from dsv4_compile.op import Cost, Tensor, alike, compact, known, op


@op("dsv4::experts")
def experts(
    x: Tensor,
    logits: Tensor,
    k: int,
    factor: float,
    eps: float,
    w1: Tensor,
    w3: Tensor,
    w2: Tensor,
    limit: float,
    v1: Tensor,
    v3: Tensor,
    v2: Tensor,
    own_limit: float,
    bias: Tensor | None = None,
    expert: Tensor | None = None,
    s1: Tensor | None = None,
    s3: Tensor | None = None,
    s2: Tensor | None = None,
    t1: Tensor | None = None,
    t3: Tensor | None = None,
    t2: Tensor | None = None,
    r1: Tensor | None = None,
    r3: Tensor | None = None,
    r2: Tensor | None = None,
    u1: Tensor | None = None,
    u3: Tensor | None = None,
    u2: Tensor | None = None,
    X: Tensor | None = None,
    post: Tensor | None = None,
    comb: Tensor | None = None,
    token: Tensor | None = None,
) -> Tensor:
    """`moe` of the k experts that `router` chooses by logits and bias, or of `expert`, or expert[token], with `expert_gates`;
    plus the shared expert with matrices v1, v3 and v2, as `shared_expert` adds it; with X, post and comb put into the streams.

    x [N, D], logits [N, X], bias [X] or expert [N, k] int64, [V, k] with token [N] int64; w, s, t and limit as in `moe`;
    v1 and v3 [H, D], v2 [D, H], plain, or with r and u for scale and scale_2 as `linear` takes them; X [N, n, D],
    post [N, n], comb [N, n, n] -> [N, D] of x's dtype, or [N, n, D].  Source: DeepSeek-V4, router and experts.
    """
    if expert is None:
        assert bias is not None
        expert, gate = router.router(logits, bias, k, factor, eps)
    else:
        expert = expert if token is None else expert[token]
        gate = router.expert_gates(logits, expert, factor, eps)
    routed = moe.moe(x, expert, gate, w1, w3, w2, limit, s1, s3, s2, t1, t3, t2)
    g, u = linear(x, v1, r1, u1), linear(x, v3, r3, u3)
    return shared_expert(g, u, v2, routed, own_limit, r2, u2, X, post, comb)


@experts.cost
def _(N, k, X, D, I, H, hit, bits, own_bits, n):
    """hit: how many different experts are chosen; bits of a weight with its share of the scales; n: streams, or 0."""
    return Cost(
        flops=6 * N * D * (k * I + H) + N * 6 * X + 2 * N * D * n * (n + 1),
        read=hit * 3 * D * I * bits / 8 + 3 * D * H * own_bits / 8 + N * (2 * D + 4 * X + 2 * D * n),
        write=2 * N * D * sympy.Max(n, 1),
    )


@experts.sizes
def _(a):
    own = sizes_of(a.v1, a.r1)
    return dict(
        **moe.sizes(a, a.k), H=own["N"], own_bits=own["bits"] + 8 / own["block"], n=0 if a.X is None else a.X.shape[-2]
    )


def few_and_stored(a: Any) -> bool | str:
    if (verdict := gemv.few(a.x, a.x.shape[0], moe.times(a, a.k))) is not True:
        return verdict
    if a.logits.dtype != torch.float32 or (a.bias is not None and a.bias.dtype != torch.float32):
        return "logits and bias must be float32"
    for t in (a.expert, a.token):
        if t is not None and t.dtype != torch.int64:
            return f"choices, or tokens, of {t.dtype}"
    if not known(a.logits.shape[1] <= 1024) or not known(a.k <= min(router.CHOICES, a.logits.shape[1])):
        return f"k = {a.k} of {a.logits.shape[1]} experts: at most {router.CHOICES} of 1024"
    if (verdict := moe.stored_alike((a.w1, a.s1, a.t1), (a.w3, a.s3, a.t3), (a.w2, a.s2, a.t2))) is not True:
        return verdict
    if (verdict := moe.stored_alike((a.v1, a.r1, a.u1), (a.v3, a.r3, a.u3), (a.v2, a.r2, a.u2))) is not True:
        return f"the shared expert: {verdict}"
    if a.x.numel() == 0 or (a.expert is not None and a.expert.numel() == 0) or a.w1.numel() == 0 or a.v1.numel() == 0:
        return "nothing to compute"
    if a.X is not None and (verdict := streams_fit(a.x, a.X, a.post, a.comb)) is not True:
        return verdict
    return at_once(shape_of(a)) > 0 or "more choices than processors, or vectors beyond shared memory"


def of_tokens(shape: Any, count: int) -> Any:
    """The same for so many."""
    return replace(shape, routed=replace(shape.routed, N=count))


def at_once(shape: Any) -> int:
    """How many of the tokens its launches take, or 0: see `gemv.at_once`."""
    return gemv.at_once(shape.routed.N, lambda n: runs(of_tokens(shape, n), alike()))


@cache
def runs(shape: Any, alike: bool) -> bool:
    from dsv4_compile.kernels.experts import configs

    return any(True for _ in configs(shape))


def shape_of(a: Any) -> Any:
    from dsv4_compile.kernels.experts import shape

    (N, D), (X, I), dtype = a.x.shape, a.w1.shape[:2], DTYPES[a.x.dtype]
    format, own = gemv.format_of(a.w1, a.s1, a.t1), gemv.format_of(a.v1, a.r1, a.u1)
    assert format is not None and own is not None, "`few_and_stored` was not asked"
    e8m0, own_e8m0 = (s is None or s.dtype != torch.float32 for s in (a.s1, a.r1))
    streams = 0 if a.X is None else a.X.shape[-2]
    choices = a.expert is not None, a.token is not None
    return shape(N, a.k, X, D, I, format, e8m0, dtype, len(a.v1), own, own_e8m0, *choices, streams)


@experts.on("cuda", arch="sm_90+", when=few_and_stored)
def _(*given):
    from dsv4_compile.kernels.experts import launch

    a = SimpleNamespace(**experts.arguments(*given))
    shape, (N, D) = shape_of(a), a.x.shape
    y = torch.empty((a.x if a.X is None else a.X).shape, dtype=a.x.dtype, device=a.x.device)
    h, g = a.x.new_empty(N, a.k, shape.routed.I), a.x.new_empty(N, shape.H)
    routed = a.x.new_empty(N, D, dtype=torch.float32)
    own, scales, twice = (a.v1, a.v3, a.v2), (a.r1, a.r3, a.r2), (a.u1, a.u3, a.u2)

    def all_or_none(tensors, how):
        return None if tensors[0] is None else tuple(map(how, tensors))

    of_routed = (
        tuple(map(gemv.words, (a.w1, a.w3, a.w2))),
        all_or_none((a.s1, a.s3, a.s2), gemv.flat),
        all_or_none((a.t1, a.t3, a.t2), lambda t: t),
    )
    of_own = tuple(map(gemv.words, own)), all_or_none(scales, gemv.flat), all_or_none(twice, lambda u: u.view(1))
    bias, table = (None if t is None else compact(t) for t in (a.bias, None if a.token is None else a.expert))
    chosen = a.expert if a.token is None else None
    rows = [None if t is None else compact(t) for t in (a.x, a.logits, chosen, a.token, h, g, routed, y)]
    streams = all_or_none((a.X, a.post, a.comb), compact)
    for first, n in gemv.turns(N, at_once(shape)):
        early = int(gemv.settled(y, *own, *scales, *twice))
        x, logits, expert, token, hidden, *made = (None if t is None else gemv.some(t, first, n) for t in rows)
        mixed = None if streams is None else tuple(gemv.some(t, first, n) for t in streams)
        choices = bias, expert if table is None else table, token
        given = x, logits, *choices, a.factor, a.eps, *of_routed, a.limit, *of_own, a.own_limit, mixed
        launch(of_tokens(shape, n), *given, hidden.view(-1, hidden.shape[-1]), *made, early)
    return y
