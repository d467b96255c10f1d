"""Cases for every op that has a kernel, made from a seed: few static sizes, which are compiled in, and many of what a launch
may change: numbers of tokens, lengths of lists, what is in them. This file holds no tests.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from draws import Draw
from torch import Tensor

from dsv4_compile.lowerings.append import norm_rope_append
from dsv4_compile.lowerings.attention import attention
from dsv4_compile.lowerings.compressor import compressor
from dsv4_compile.lowerings.compressor_append import compressor_append, compressor_append_fp8
from dsv4_compile.lowerings.experts import experts
from dsv4_compile.lowerings.head import head
from dsv4_compile.lowerings.indexer import indexer
from dsv4_compile.lowerings.kv import unpack_kv
from dsv4_compile.lowerings.linear import grouped_linear, linear, linear_wide
from dsv4_compile.lowerings.linears import LINEARS, NORMED
from dsv4_compile.lowerings.mhc import mhc_head, mhc_post, mhc_pre
from dsv4_compile.lowerings.mhc_boundary import mhc_boundary, mhc_enter
from dsv4_compile.lowerings.moe import moe
from dsv4_compile.lowerings.norm import rms_norm, unit_norm
from dsv4_compile.lowerings.output_projection import output_projection
from dsv4_compile.lowerings.prologue import PROLOGUES
from dsv4_compile.lowerings.rope import norm_rope, rope
from dsv4_compile.lowerings.router import expert_gates, router
from dsv4_compile.lowerings.shared_expert import shared_expert
from dsv4_compile.op import Op

bf16, fp32, e4m3 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
EPS = 1e-6
Arguments = dict[str, Any]
LENGTHS = (
    0,
    1,
    2,
    31,
    32,
    33,
    63,
    64,
    65,
    96,
    127,
    128,
    129,
    200,
    320,
)  # around tiles of 32 and 64, and several of them
TOKENS = (1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 31, 32, 33, 47, 63, 64)


@dataclass(frozen=True)
class Family:
    """Cases of an op. specs: static sizes, in turn by seed. meaning: what is right, where the op's own is not it. lists: whose
    lengths say how many terms are added up one by one; as many may be one and the same, whose roundings all point one way."""

    op: Op
    specs: tuple[tuple[Any, ...], ...]
    make: Callable[..., Arguments]
    meaning: Callable[[Op, Arguments], Any] | None = None
    lists: tuple[str, ...] = ()

    def terms(self, arguments: Arguments) -> int:
        return sum(arguments[n].shape[-1] for n in self.lists if arguments[n] is not None)

    def case(self, seed: int, other: bool = False) -> Arguments:
        """All arguments by name, in one piece each."""
        draw, spec = Draw(self.op.name, seed, other), self.specs[seed % len(self.specs)]
        made = self.op.arguments(**self.make(draw, *spec))
        return {n: a.contiguous() if isinstance(a, Tensor) else a for n, a in made.items()}

    def right(self, arguments: Arguments) -> Any:
        """In fp64."""
        wide = {n: a.double() if isinstance(a, Tensor) and a.dtype in (bf16, fp32) else a for n, a in arguments.items()}
        return self.op.meaning(**wide) if self.meaning is None else self.meaning(self.op, wide)


# Norms, rotations, memory


def of_norm(d: Draw, D: int, dtype: torch.dtype, weight: torch.dtype | None = None) -> Arguments:
    lead = d.size.choice(((0,), (1,), (2, 3), (257,), *((n,) for n in TOKENS)))
    found = dict(x=d.normal(*lead, D, dtype=dtype, spread=True), eps=EPS)
    return found if weight is None else found | dict(weight=d.weight(D, weight))


def of_norm_rope(d: Draw, D: int, dr: int, dtype: torch.dtype, weight: torch.dtype | None) -> Arguments:
    B, T, h = d.size.choice(((1, 1, 1), (1, 1, 5), (2, 3, 4), (1, 64, 2), (3, 1, 17), (0, 1, 3)))
    table = d.size.choice(((B, T, 1), (1, T, 1), (B, 1, h))) if B * T * h else (B, T, 1)
    cos, sin = d.tables(*table, dr // 2)
    weight_ = None if weight is None else d.weight(D, weight)
    return dict(x=d.normal(B, T, h, D, dtype=dtype, spread=True), weight=weight_, eps=EPS, cos=cos, sin=sin)


def of_norm_rope_append(d: Draw, D: int, dr: int, dtype: torch.dtype, ring: torch.dtype | str) -> Arguments:
    B, T = d.size.choice(((1, 1), (3, 1), (2, 5), (1, 33), (64, 1)))
    S = T + d.size.choice((0, 1, 7, 100))
    slot = d.slots(B, S, T) + S * d.how.choice((0, 1, 9))  # positions beyond the ring
    cos, sin = d.tables(d.size.choice((1, B)), T, dr // 2)
    x = d.normal(B, T, D, dtype=dtype, spread=True)
    return dict(ring=d.cache(ring, dr, B, S, D), slot=slot, x=x, weight=d.weight(D), eps=EPS, cos=cos, sin=sin)


def windows(d: Draw, B: int, n: int, R: int, S: int) -> Tensor:
    """Lists [B, n, R] of rows: some windows miss their oldest rows, some all of them."""
    missing = torch.tensor([d.how.choice((0, 0, 1, R // 2, R - 1, R)) for _ in range(B * n)]).view(B, n, 1)
    return torch.where(torch.arange(R) < missing, -1, d.integers(0, S, B, n, R))


def of_compressor(d: Draw, D: int, m: int, dr: int, overlap: bool, weight: torch.dtype) -> Arguments:
    B, n = d.size.choice(((1, 1), (3, 1), (2, 7), (1, 33), (2, 0), (64, 1)))
    R, C = m * (1 + overlap), D * (1 + overlap)
    S = R + d.size.choice((0, 1, 40))
    cos, sin = d.tables(B, n, dr // 2)
    found = dict(c=d.normal(B, S, C), z=2 * d.normal(B, S, C), index=windows(d, B, n, R, S), weight=d.weight(D, weight))
    return found | dict(cos=cos, sin=sin, eps=EPS, overlap=overlap)


def of_compressor_append(
    d: Draw, D: int, m: int, dr: int, overlap: bool, entries: torch.dtype | str, B: int | None = None
) -> Arguments:
    B, R, C = B or d.size.choice((1, 2, 5, 64)), m * (1 + overlap), D * (1 + overlap)
    S, P = R + d.size.choice((0, 1, 40)), d.size.choice((1, 2, 33))
    slot, index = d.slots(B, S, 1), windows(d, B, 1, R, S)
    index[:, :, -1] = torch.where(index[:, :, -1] < 0, -1, slot)  # reads what is written
    cos, sin = d.tables(B, 1, dr // 2)
    found = dict(values=d.normal(B, S, C), gates=2 * d.normal(B, S, C), entries=d.cache(entries, dr, B, P, D))
    found |= dict(slot=slot + S * d.how.choice((0, 3)), c=d.normal(B, 1, C), z=d.normal(B, 1, C), ape=d.normal(m, C))
    found |= {} if entries != e4m3 else dict(scales=2.0 ** d.integers(-9, 1, B, P, 1).float())
    found |= dict(place=d.integers(0, 9 * m, B, 1), index=index, weight=d.weight(D), cos=cos, sin=sin)
    return found | dict(target=d.slots(B, P, 1), eps=EPS, overlap=overlap)


def of_prologue(d: Draw, h: int, D: int, dr: int, dtype: Any, ring: Any, *compressors: tuple[Any, ...]) -> Arguments:
    """A decode step's queries, keys, and compressors of one number of sequences."""
    B, S = d.size.choice((1, 2, 5, 64)), d.size.choice((1, 8, 129))
    (q_cos, q_sin), (cos, sin) = (
        d.tables(d.size.choice((1, B)), 1, 1, dr // 2),
        d.tables(d.size.choice((1, B)), 1, dr // 2),
    )
    found = dict(
        q=d.normal(B, 1, h, D, dtype=dtype, spread=True), q_eps=EPS, q_cos=q_cos, q_sin=q_sin, cos=cos, sin=sin
    )
    found |= dict(ring=d.cache(ring, dr, B, S, D), slot=d.slots(B, S, 1) + S * d.how.choice((0, 2)), eps=EPS)
    found |= dict(x=d.normal(B, 1, D, dtype=dtype, spread=True), weight=d.weight(D))
    for i, spec in enumerate(compressors):
        found |= {f"{name}{i}": x for name, x in of_compressor_append(d, *spec, B=B).items()}
    return found


# Attention and the choice of entries


def of_attention(
    d: Draw, h: int, D: int, dtype: torch.dtype, second: bool, on_window: bool, dr: int, stored: int = 0
) -> Arguments:
    """stored: rotary channels of rows in bytes."""
    B, T = d.size.choice(((1, 1), (1, 1), (3, 1), (2, 2), (8, 1), (21, 3)))
    W, K = d.size.choice(LENGTHS), d.size.choice(LENGTHS) if second else None
    if B * T == 1 and second and d.size.random() < 0.3:
        K = 2500  # several blocks, and clusters of them, for one query
    S, E = d.size.choice((1, 40, 200)), d.size.choice((1, 300))
    found: Arguments = dict(
        q=d.normal(B, T, h, D, dtype=dtype), sink=d.normal(h), scale=D**-0.5, sink_on_window=on_window, stored=stored
    )
    pairs = [("keys", "window", S, W)] + ([("entries", "index", E, K)] if second else [])
    for rows, lists, count, length in pairs:
        found[lists] = d.among(count, B, T, length)
        found[rows] = d.cache("bytes" if stored else dtype, stored, B, count, D)
    if on_window and not sum(found[lists].shape[-1] for _, lists, _, _ in pairs):
        found["window"] = torch.zeros(B, T, 1, dtype=torch.int64)
    if on_window:  # a query without any row is undefined
        first = next(lists for _, lists, _, _ in pairs if found[lists].shape[-1])
        found[first][..., 0] = found[first][..., 0].clamp(min=0)
    for rows, lists, count, _ in pairs:  # what nobody names is never read
        named = torch.zeros(B, count + 1, dtype=torch.bool).scatter_(1, found[lists].reshape(B, -1) + 1, True)[:, 1:]
        found[rows][~named] = 0xFF if stored else float("nan")  # of a scale infinity, of all else NaN
    found |= {} if second else dict(entries=None, index=None)
    if dr:
        found["cos"], found["sin"] = d.tables(d.size.choice((1, B)), d.size.choice((1, T)), 1, dr // 2)
    return found


def attention_without_strangers(op: Op, arguments: Arguments) -> Tensor:
    """Rows that no list names take no part, whatever is in them; a query without rows gives 0."""
    D, dr = arguments["q"].shape[-1], arguments["stored"]
    plain = {n: x for n in ("keys", "entries") if (x := arguments[n]) is not None}
    plain = {n: (unpack_kv.meaning(x, D, dr).double() if dr else x).nan_to_num() for n, x in plain.items()}
    return op.meaning(**arguments | plain | {"stored": 0})


def of_indexer(d: Draw, h: int, D: int, weights: torch.dtype, dr: int, keys: torch.dtype = bf16) -> Arguments:
    """Small whole numbers: scores are exact in any order of their sums, and many are equal. Turns are quarters. In e4m3
    keys are whole numbers over 4, times scales that are powers of two."""
    B, T = d.size.choice(((1, 1), (1, 1), (3, 1), (2, 2), (8, 1)))
    E = d.size.choice((1, 15, 16, 17, 513, 1000, 2048, 2049) if B * T > 2 else (1, 16, 1023, 5000, 33_000))
    k, turns = min(E, d.size.choice((1, 3, 100, 512))), d.integers(0, 4, d.size.choice((1, B)), T, 1, dr // 2)
    visible = d.integers(0, E + 1, d.size.choice((1, B)), T)
    visible[..., -1] = d.how.choice((0, 1, min(k, E), E, E))
    found: Arguments = dict(q=d.integers(-2, 3, B, T, h, D).to(bf16), keys=d.integers(-1, 2, B, E, D).to(bf16), k=k)
    if keys == e4m3:
        found |= dict(keys=(d.integers(-7, 8, B, E, D) / 4).to(e4m3), scale=2.0 ** d.integers(-2, 3, B, E, 1).float())
    found |= dict(w=(d.integers(-2, 3, B, T, h) / 4).to(weights), visible=visible)
    if dr:
        found |= dict(cos=(turns % 2 == 0) * (1.0 - turns), sin=(turns % 2 == 1) * (2.0 - turns))
    return found


def lower_of_equal(op: Op, arguments: Arguments) -> Tensor:
    """The best entries in ascending order, -1 at the end; of equal scores the lower entries."""
    a = arguments
    q = a["q"] if a["cos"] is None else rope.meaning(a["q"], a["cos"], a["sin"], False)
    keys = a["keys"] if a["scale"] is None else a["keys"].double() * a["scale"]
    score = torch.einsum("bth,bthe->bte", a["w"], torch.relu(torch.einsum("bthd,bed->bthe", q, keys)))
    entry = torch.arange(score.shape[-1], device=score.device)
    score = score.masked_fill(entry >= a["visible"].unsqueeze(-1), float("-inf"))
    best = score.sort(dim=-1, descending=True, stable=True).indices[..., : a["k"]]
    best = torch.where(best < a["visible"].unsqueeze(-1), best, len(entry)).sort(-1).values
    return torch.where(best < len(entry), best, -1)


# Products


def of_linear(d: Draw, M: int, N: int, K: int, format: str, dtype: torch.dtype) -> Arguments:
    w, s, t = d.stored(format, N, K)
    return dict(x=d.normal(M, K, dtype=dtype), weight=w, scale=s, scale_2=t)


def of_grouped(d: Draw, G: int, M: int, R: int, K: int, format: str, dtype: torch.dtype) -> Arguments:
    return of_linear(d, M, G * R, K, format, dtype) | dict(x=d.normal(G, M, K, dtype=dtype))


def of_projection(d: Draw, G: int, M: int, R: int, K: int, D: int, format: str, other: str, dtype: Any) -> Arguments:
    (a, a_scale, a_scale_2), (b, b_scale, b_scale_2) = d.stored(format, G * R, K), d.stored(other, D, G * R)
    scales = dict(a_scale=a_scale, a_scale_2=a_scale_2, b_scale=b_scale, b_scale_2=b_scale_2)
    return dict(x=d.normal(G, M, K, dtype=dtype), a=a, b=b) | scales


def of_wide(d: Draw, M: int, N: int, K: int, format: str, dtype: torch.dtype) -> Arguments:
    return dict(x=d.normal(M, K, dtype=dtype), weight=d.stored(format, N, K)[0])


def of_several(
    d: Draw, M: int, rows: tuple[int, ...], K: int, format: str, wide: int = 0, norm: Any = None
) -> Arguments:
    found = dict(x=d.normal(M, K, dtype=bf16, spread=norm is not None), wide=wide)
    found |= {} if norm is None else dict(norm=d.weight(K, norm), eps=EPS)
    formats = format.split(" and ")  # in turn
    for i, N in enumerate(rows):
        found[f"w{i}"], found[f"s{i}"], _ = d.stored(formats[i % len(formats)], N, K)
    return found


def of_shared_expert(d: Draw, M: int, N: int, K: int, format: str, dtype: torch.dtype) -> Arguments:
    w, s, t = d.stored(format, N, K)
    pair = {n: 2 * d.normal(M, K, dtype=dtype) for n in ("gate", "up")}
    return pair | dict(weight=w, routed=d.normal(M, N), limit=2.0, scale=s, scale_2=t)


def of_moe(d: Draw, N: int, k: int, X: int, D: int, I: int, format: str, dtype: torch.dtype) -> Arguments:
    """Tokens share experts; some choose one twice, or all the same."""
    expert = torch.rand(N, X, generator=d.g).topk(min(k, X), -1).indices
    expert = expert.repeat(1, -(-k // X))[:, :k].contiguous()
    kind = d.how.choice(("different", "twice", "one"))
    if kind == "twice":
        expert[0, 0] = expert[0, -1]
    elif kind == "one":
        expert[:] = int(d.integers(0, X, 1))
    found: Arguments = dict(x=d.normal(N, D, dtype=dtype), expert=expert, gate=d.uniform(0, 1, N, k), limit=3.0)
    for i, shape in ((1, (X, I, D)), (3, (X, I, D)), (2, (X, D, I))):
        found[f"w{i}"], found[f"s{i}"], found[f"t{i}"] = d.stored(format, *shape)
    return found


def of_experts(
    d: Draw, N: int, k: int, X: int, D: int, I: int, H: int, format: str, own: str, chosen: Any, n: int, dtype: Any
) -> Arguments:
    """chosen: False, True, or rows of a table."""
    found = of_moe(d, N, k, X, D, I, format, dtype) | dict(k=k, factor=1.5, eps=1e-20, own_limit=1.5)
    expert, _ = found.pop("expert"), found.pop("gate")
    found |= dict(logits=scores(d, X, N)) | (dict(expert=expert) if chosen else dict(bias=d.integers(0, 3, X) / 7))
    for i, shape in ((1, (H, D)), (3, (H, D)), (2, (D, H))):
        found[f"v{i}"], found[f"r{i}"], found[f"u{i}"] = d.stored(own, *shape)
    if chosen > 1:
        found |= dict(expert=d.integers(0, X, chosen, k), token=d.integers(-chosen, chosen, N))
    if n:
        found |= dict(X=d.normal(N, n, D, dtype=dtype), post=d.uniform(0, 2, N, n), comb=d.normal(N, n, n).softmax(-1))
    return found


# Streams, routers, the model's end


def mixture(d: Draw, n: int, D: int, rows: int, scales: int) -> Arguments:
    fn = d.normal(rows, n * D) * (n * D) ** -0.5
    return dict(fn=fn, base=d.normal(rows), scale=d.uniform(0.5, 2, scales), eps=EPS, rms_eps=EPS)


def of_streams(d: Draw, kind: str, n: int, D: int, dtype: torch.dtype, iters: int, weight: Any = fp32) -> Arguments:
    few = kind in ("mhc_enter", "mhc_boundary")  # beyond 16 tokens their parts are asked
    lead = d.size.choice(((1,), (0, 3), (2, 3), *((N,) for N in TOKENS if N <= 16 or not few)))
    found: Arguments = dict(X=d.normal(*lead, n, D, dtype=dtype, spread=True))
    if kind in ("mhc_post", "mhc_boundary"):
        comb = d.normal(*lead, n, n).softmax(-1)
        found |= dict(y=d.normal(*lead, D, dtype=dtype), post=d.uniform(0, 2, *lead, n), comb=comb)
    if kind != "mhc_post":
        found |= mixture(d, n, D, n, 1) if kind == "mhc_head" else mixture(d, n, D, (2 + n) * n, 3) | dict(iters=iters)
    return found | (dict(weight=d.weight(D, weight), norm_eps=EPS) if few else {})


def of_head(d: Draw, N: int, n: int, D: int, V: int, dtype: torch.dtype, exact: bool) -> Arguments:
    found = dict(X=d.normal(N, n, D, dtype=dtype), weight=d.weight(D), norm_eps=EPS, exact=exact)
    return found | mixture(d, n, D, n, 1) | dict(vocabulary=d.stored("bf16", V, D)[0])


def scores(d: Draw, X: int, N: int | None = None) -> Tensor:
    """Logits [N, X] of few values: many ties, and with the biases no two sums that only rounding tells apart."""
    return d.integers(-9, 10, d.size.choice((0, *TOKENS, 257)) if N is None else N, X) / 2


def of_router(d: Draw, X: int, k: int) -> Arguments:
    return dict(logits=scores(d, X), bias=d.integers(0, 3, X) / 7, k=k, scale=1.5, eps=1e-20)


def of_gates(d: Draw, X: int, k: int) -> Arguments:
    logits = scores(d, X)
    return dict(logits=logits, expert=d.integers(0, X, len(logits), k), scale=1.5, eps=1e-20)


# Static sizes


def of_linears(count: int, *specs: tuple[Any, ...]) -> Family:
    return Family(LINEARS[count], specs, of_several)


def streams(op: Op, *specs: tuple[Any, ...]) -> Family:
    return Family(op, tuple((op.name, *s) for s in specs), of_streams)


NORMS = (
    (4, bf16, fp32),
    (36, fp32, bf16),
    (512, bf16, bf16),
    (1536, fp32, fp32),
    (4096, bf16, fp32),
    (16384, bf16, bf16),
)
TURNED = ((512, 64, bf16, None), (48, 16, bf16, fp32), (36, 6, fp32, bf16), (128, 128, fp32, fp32))
KEYS = (
    *((512, 64, bf16, bf16), (20, 6, bf16, fp32), (64, 16, fp32, bf16), (132, 4, fp32, fp32)),
    *((512, 64, bf16, "bytes"), (144, 16, fp32, "bytes")),
)
WINDOWS = (
    (512, 4, 64, True, fp32),
    (128, 4, 64, True, bf16),
    (512, 128, 64, False, fp32),
    (20, 3, 6, True, fp32),
    (132, 1, 132, False, bf16),
)
MEMORY = (
    (512, 4, 64, True, bf16),
    (128, 4, 64, True, fp32),
    (512, 128, 64, False, bf16),
    (20, 3, 6, True, fp32),
    (132, 1, 132, False, bf16),
    (512, 4, 64, True, "bytes"),
    (512, 128, 64, False, "bytes"),
    (72, 3, 8, True, "bytes"),
)
ATTENTION = (
    (64, 512, bf16, True, False, 64),
    (64, 512, bf16, False, False, 0),
    (128, 512, bf16, True, False, 64),
    (17, 128, bf16, True, False, 0),
    (33, 64, bf16, True, True, 16),
    (1, 64, bf16, False, True, 0),
    (7, 192, bf16, True, False, 8),
    (5, 48, bf16, True, False, 16),
    (6, 64, fp32, True, True, 0),
    (64, 512, fp32, True, False, 64),
    (3, 1000, fp32, False, False, 10),
    (70, 256, bf16, True, True, 16),
    (64, 512, bf16, True, True, 64),
    (64, 512, bf16, True, False, 64, 64),
    (128, 512, bf16, True, False, 0, 64),
    (33, 256, bf16, True, True, 16, 64),
    (5, 256, bf16, False, False, 0, 64),
)
SCALED = ((128, 4, 64, True, e4m3), (20, 3, 6, True, e4m3), (64, 128, 16, False, e4m3), (128, 1, 128, False, e4m3))
INDEXER = (
    *((64, 128, bf16, 64), (64, 128, fp32, 0), (5, 64, fp32, 0), (33, 96, bf16, 8), (1, 32, fp32, 16)),
    *((64, 128, bf16, 64, e4m3), (17, 64, fp32, 8, e4m3), (64, 128, fp32, 0, e4m3)),
)
LINEAR = (
    (1, 17, 64, "bf16", bf16),
    (2, 33, 192, "fp8", bf16),
    (3, 130, 96, "mxfp4", bf16),
    (4, 300, 512, "nvfp4", bf16),
    (5, 200, 1056, "bf16", fp32),
    (6, 1000, 512, "fp8 fp32", bf16),
    (7, 17, 2048, "mxfp4", bf16),
    (8, 1090, 1024, "bf16", bf16),
    (1, 4096, 1024, "fp8", bf16),
    (8, 1090, 1024, "fp8", bf16),
    (1, 1000, 2048, "mxfp4", bf16),
    (8, 513, 1024, "mxfp4", bf16),
    (1, 513, 1024, "nvfp4", fp32),
    (3, 47, 160, "fp8", fp32),
    (2, 15, 72, "fp32", fp32),
    (13, 300, 512, "fp8", bf16),
    (16, 1090, 1024, "mxfp4", bf16),
    (16, 257, 1024, "nvfp4", bf16),
    (40, 130, 512, "fp8 fp32", bf16),
)
GROUPED = (
    (2, 1, 48, 64, "bf16", bf16),
    (3, 2, 51, 288, "fp8", bf16),
    (8, 8, 64, 512, "mxfp4", bf16),
    (5, 3, 17, 96, "nvfp4", fp32),
)
PROJECTION = (
    (2, 3, 48, 64, 130, "fp8", "fp8", bf16),
    (3, 8, 32, 288, 51, "fp8 fp32", "mxfp4", bf16),
    (1, 5, 64, 96, 17, "bf16", "fp8", bf16),
    (8, 1, 128, 512, 256, "fp8", "fp8", bf16),
    (5, 2, 32, 96, 40, "nvfp4", "fp8", fp32),
    (3, 23, 128, 512, 70, "fp8", "fp8", bf16),
)
WIDE = (
    (1, 256, 1024, "bf16", bf16),
    (8, 24, 192, "fp32", bf16),
    (3, 33, 72, "fp32", fp32),
    (5, 100, 4096, "bf16", bf16),
)
MOE = (
    (1, 6, 24, 192, 64, "mxfp4", bf16),
    (2, 1, 4, 32, 32, "bf16", bf16),
    (3, 6, 20, 160, 96, "fp8", bf16),
    (5, 4, 7, 96, 160, "nvfp4", bf16),
    (8, 2, 3, 512, 256, "mxfp4", bf16),
    (4, 3, 9, 1024, 512, "fp8 fp32", bf16),
    (2, 4, 5, 64, 96, "bf16", fp32),
    (7, 2, 16, 256, 64, "bf16", bf16),
)
EXPERTS = (
    (1, 6, 24, 192, 64, 96, "mxfp4", "fp8", False, 4, bf16),
    (3, 4, 40, 512, 256, 128, "bf16", "bf16", False, 0, bf16),
    (8, 2, 64, 256, 96, 160, "fp8", "fp8", True, 4, bf16),
    (2, 6, 33, 160, 96, 32, "nvfp4", "nvfp4", False, 1, bf16),
    (5, 3, 16, 1024, 512, 512, "mxfp4", "bf16", 77, 0, bf16),
    (2, 4, 12, 64, 96, 32, "bf16", "fp8 fp32", False, 3, fp32),
)
PROLOGUE = ((64, 512, 64, bf16, bf16), (3, 48, 16, bf16, fp32), (5, 128, 8, fp32, bf16))
IN_BYTES = (64, 512, 64, bf16, "bytes")
SHARED = (
    (1, 17, 64, "bf16", bf16),
    (2, 200, 1056, "fp8", bf16),
    (3, 33, 512, "mxfp4", bf16),
    (4, 130, 256, "nvfp4", bf16),
    (2, 64, 96, "fp8 fp32", fp32),
)
STREAMS = ((4, 4096, bf16, 20), (4, 192, fp32, 3), (3, 40, bf16, 2), (5, 1028, fp32, 7), (2, 4, bf16, 1))
BOUNDARY = ((4, 4096, bf16, 20), (4, 7168, bf16, 20, bf16), (4, 192, fp32, 3), (3, 40, bf16, 2), (1, 8, fp32, 1))

FAMILIES = {
    family.op.name: family
    for family in (
        Family(rms_norm, NORMS, of_norm),
        Family(unit_norm, ((12, bf16), (132, fp32), (512, bf16), (7168, bf16)), of_norm),
        Family(norm_rope, TURNED, of_norm_rope),
        Family(norm_rope_append, KEYS, of_norm_rope_append),
        Family(compressor, WINDOWS, of_compressor),
        Family(compressor_append, MEMORY, of_compressor_append),
        Family(compressor_append_fp8, SCALED, of_compressor_append),
        Family(attention, ATTENTION, of_attention, attention_without_strangers, ("window", "index")),
        Family(indexer, INDEXER, of_indexer, lower_of_equal),
        Family(linear, LINEAR, of_linear),
        Family(grouped_linear, GROUPED, of_grouped),
        Family(output_projection, PROJECTION, of_projection),
        Family(linear_wide, WIDE, of_wide),
        of_linears(
            2,
            (1, (256, 512), 1024, "fp8"),
            (29, (40, 300), 512, "fp8"),
            (8, (1, 17), 128, "bf16", 0b10),
            (3, (33, 5), 96, "mxfp4"),
        ),
        of_linears(
            3, (2, (15, 16, 33), 192, "mxfp4"), (7, (40, 64, 24), 256, "fp8"), (1, (24, 64, 64), 192, "bf16", 1)
        ),
        of_linears(
            4,
            (3, (300, 3, 130, 47), 2048, "bf16", 0b1100),
            (6, (64, 16, 16, 16), 64, "fp8"),
            (5, (40, 17, 300, 1), 256, "mxfp4 and bf16", 0b10),
        ),
        of_linears(5, (1, (64, 128, 128, 256, 256), 512, "bf16", 0b11110), (5, (1, 2, 3, 4, 5), 64, "mxfp4")),
        of_linears(6, (4, (96, 64, 32, 32, 64, 64), 256, "bf16", 0b111100), (2, (16,) * 6, 128, "fp8")),
        of_linears(
            7,
            (1, (64, 512, 256, 256, 96, 96, 96), 1024, "bf16", 0b1111000),
            (8, (17,) * 7, 128, "bf16", 0b1010),
            (1, (1024, 64, 512, 256, 256, 96, 96), 512, "fp8 and bf16", 0b101000),
        ),
        Family(NORMED[1], ((3, (100,), 1152, "bf16", 0, bf16), (8, (513,), 1024, "fp8", 0, fp32)), of_several),
        Family(NORMED[2], ((1, (640, 256), 1024, "fp8", 0, fp32), (2, (33, 5), 96, "bf16", 0, bf16)), of_several),
        Family(moe, MOE, of_moe),
        Family(shared_expert, SHARED, of_shared_expert),
        Family(experts, EXPERTS, of_experts),
        Family(PROLOGUES[0], (*PROLOGUE, IN_BYTES), of_prologue),
        Family(
            PROLOGUES[1],
            tuple((*p, m) for p, m in zip((*PROLOGUE, IN_BYTES), (*MEMORY[2:4], MEMORY[0], MEMORY[6]), strict=True)),
            of_prologue,
        ),
        Family(
            PROLOGUES[2],
            (
                *((*PROLOGUE[0], MEMORY[0], MEMORY[1]), (*PROLOGUE[1], MEMORY[3], MEMORY[3])),
                (*IN_BYTES, MEMORY[5], MEMORY[1]),
            ),
            of_prologue,
        ),
        Family(
            PROLOGUES["2_fp8"],
            (
                *((*PROLOGUE[0], MEMORY[0], SCALED[0]), (*PROLOGUE[1], MEMORY[3], SCALED[1])),
                (*IN_BYTES, MEMORY[5], SCALED[0]),
            ),
            of_prologue,
        ),
        streams(mhc_pre, *STREAMS),
        streams(mhc_post, *STREAMS),
        streams(mhc_head, *STREAMS),
        streams(mhc_enter, *BOUNDARY),
        streams(mhc_boundary, *BOUNDARY),
        Family(
            head, ((1, 4, 192, 256, bf16, True), (8, 4, 64, 1000, bf16, False), (3, 2, 40, 33, fp32, True)), of_head
        ),
        Family(router, ((256, 6), (384, 6), (7, 7), (33, 1), (1000, 32)), of_router),
        Family(expert_gates, ((256, 6), (24, 4), (7, 9), (2000, 32)), of_gates),
    )
}
