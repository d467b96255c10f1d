"""What each op is called with in a model of some size: B requests of T tokens each, in bf16 and as checkpoints store it.

Numbers are random, lists as in the model: windows end at their token, of chosen entries all exist. Inputs are made when
they are asked for, since some fill gigabytes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4_compile.lowerings.append import append, norm_rope_append
from dsv4_compile.lowerings.attention import attention, dense_attention
from dsv4_compile.lowerings.compressor import compressor
from dsv4_compile.lowerings.compressor_append import compressor_append, compressor_append_fp8
from dsv4_compile.lowerings.dequantize import dequantize
from dsv4_compile.lowerings.experts import experts
from dsv4_compile.lowerings.grouped_mm import grouped_mm
from dsv4_compile.lowerings.head import head, mtp_join
from dsv4_compile.lowerings.indexer import indexer
from dsv4_compile.lowerings.kv import pack_kv as pack
from dsv4_compile.lowerings.kv import unpack_kv as unpack
from dsv4_compile.lowerings.linear import grouped_linear, linear, linear_wide
from dsv4_compile.lowerings.linears import LINEARS, NORMED
from dsv4_compile.lowerings.mhc import mhc_head, mhc_post, mhc_pre
from dsv4_compile.lowerings.mhc_boundary import mhc_boundary, mhc_enter
from dsv4_compile.lowerings.moe import moe
from dsv4_compile.lowerings.norm import rms_norm, unit_norm
from dsv4_compile.lowerings.output_projection import output_projection
from dsv4_compile.lowerings.pointwise import silu, softmax, softplus, swiglu
from dsv4_compile.lowerings.prologue import PROLOGUES
from dsv4_compile.lowerings.rope import norm_rope, rope
from dsv4_compile.lowerings.router import expert_gates, router
from dsv4_compile.lowerings.shared_expert import shared_expert
from dsv4_compile.lowerings.sinkhorn import sinkhorn
from dsv4_compile.op import Op
from dsv4_compile.reference_model import DSV4Config
from dsv4_compile.reference_model.quant import pack_kv, quantize, quantize_rows
from dsv4_compile.reference_model.schedule import CSA, HCA

CONTEXT = 32768  # tokens behind a decode step
EPS, SINKHORN_EPS = 1e-6, 1e-6
FEW = 4  # tokens whose experts are computed in fp64
DISTINCT = 8  # experts that are drawn; the others are copies of them
bf16 = torch.bfloat16
Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Case:
    """A call of `op`. sample: of inputs that are too large for fp64, those that the first rows of the output need, and the
    number of these rows."""

    what: str
    op: Op
    make: Callable[[], Inputs]
    sample: Callable[[Inputs], tuple[Inputs, int]] | None = None


class Cases:
    """Of a config, for B requests of T tokens on a device. Each method yields the cases of one part of the model."""

    def __init__(self, config: DSV4Config, B: int, T: int, device: torch.device):
        self.c, self.B, self.T, self.N, self.device = config, B, T, B * T, device
        self.seen = T if T > 1 else min(CONTEXT, config.max_position_embeddings)  # tokens that may be attended to

    def __iter__(self) -> Iterator[Case]:
        for part in (
            self.norms,
            self.rotations,
            self.streams,
            self.routing,
            self.attention,
            self.selection,
            self.memory,
            self.products,
            self.experts,
            self.ends,
            self.idioms,
        ):
            yield from part()

    # drawing

    def draw(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device=self.device).to(dtype)

    def x(self, *shape: int) -> Tensor:
        return self.draw(*shape, dtype=bf16)

    def matrix(self, *shape: int, format: str = "none") -> tuple[Tensor, ...]:
        """A weight and its scales."""
        w = self.draw(*shape) * shape[-1] ** -0.5
        return (w.to(bf16),) if format == "none" else tuple(quantize(w, format)[:2])

    def stacked(self, *shape: int, format: str) -> tuple[Tensor, Tensor | None]:
        """A matrix for each expert and its scales."""
        few = self.matrix(DISTINCT, *shape, format=format)
        copies = -(-self.c.n_routed_experts // DISTINCT)
        whole = [repeated(t, copies)[: self.c.n_routed_experts] for t in few]
        return whole[0], whole[1] if len(whole) > 1 else None

    def integers(self, below: int, *shape: int) -> Tensor:
        return torch.randint(0, below, shape, device=self.device)

    def tables(self, B: int, *between: int) -> tuple[Tensor, Tensor]:
        angle = self.draw(B, *between, self.c.qk_rope_head_dim // 2)
        return angle.cos(), angle.sin()

    def visible(self, rate: int) -> Tensor:
        """[B, T]: entries of one of so many tokens that each token may see."""
        if self.T == 1:
            return torch.full((self.B, 1), self.seen // rate, device=self.device)
        return ((torch.arange(self.T, device=self.device) + 1) // rate).expand(self.B, -1).contiguous()

    def entries(self, rate: int) -> int:
        return max(1, self.seen // rate)

    # parts of the model

    def norms(self) -> Iterator[Case]:
        c, N = self.c, self.N
        D, R, h, d = c.hidden_size, c.q_lora_rank, c.num_attention_heads, c.head_dim
        yield Case("norm", rms_norm, lambda: (self.x(N, D), self.draw(D), EPS))
        yield Case("norm of queries' rank", rms_norm, lambda: (self.x(N, R), self.draw(R), EPS))
        yield Case("norm of heads", unit_norm, lambda: (self.x(self.B, self.T, h, d), EPS))

    def rotations(self) -> Iterator[Case]:
        c, B, T = self.c, self.B, self.T
        h, d = c.num_attention_heads, c.head_dim
        heads = lambda: self.x(B, T, h, d)  # noqa: E731
        yield Case("norm and RoPE of queries", norm_rope, lambda: (heads(), None, EPS, *self.tables(B, T, 1)))
        keys = lambda: (self.x(B, T, d), self.draw(d), EPS, *self.tables(B, T))  # noqa: E731
        yield Case("norm and RoPE of keys", norm_rope, keys)
        yield Case("RoPE of the output", rope, lambda: (heads(), *self.tables(B, T, 1), True))

    def streams(self) -> Iterator[Case]:
        c, N = self.c, self.N
        D, n, iters = c.hidden_size, c.hc_mult, c.hc_sinkhorn_iters
        rows = (2 + n) * n
        X = lambda: self.x(N, n, D)  # noqa: E731
        mix = lambda m, k: (self.draw(m, n * D) * (n * D) ** -0.5, self.draw(m), self.draw(k))  # noqa: E731
        last = (iters, SINKHORN_EPS, EPS)
        behind = lambda: (X(), self.x(N, D), self.draw(N, n), self.draw(N, n, n).softmax(-1))  # noqa: E731
        yield Case("mHC before a block", mhc_pre, lambda: (X(), *mix(rows, 3), *last))
        yield Case("mHC behind a block", mhc_post, behind)
        yield Case(
            "mHC and norm before the first block", mhc_enter, lambda: (X(), *mix(rows, 3), self.draw(D), *last, EPS)
        )
        between = lambda: (*behind(), *mix(rows, 3), self.draw(D), *last, EPS)  # noqa: E731
        yield Case("mHC and norm between blocks", mhc_boundary, between)
        yield Case("mHC head", mhc_head, lambda: (X(), *mix(n, 1), SINKHORN_EPS, EPS))
        yield Case("Sinkhorn", sinkhorn, lambda: (self.draw(N, n, n), iters, SINKHORN_EPS))

    def routing(self) -> Iterator[Case]:
        c, N = self.c, self.N
        E, k = c.n_routed_experts, c.num_experts_per_tok
        last = (c.routed_scaling_factor, 1e-20)
        yield Case("router", router, lambda: (self.draw(N, E), self.draw(E), k, *last))
        yield Case("gates of the hash router", expert_gates, lambda: (self.draw(N, E), self.integers(E, N, k), *last))

    def attention(self) -> Iterator[Case]:
        c, B, T = self.c, self.B, self.T
        h, d, W = c.num_attention_heads, c.head_dim, c.sliding_window
        few, many = c.compress_rates[HCA], c.compress_rates[CSA]
        k, all_ = min(c.index_topk, self.entries(many)), self.entries(few)

        def near() -> Inputs:
            rows = W if T == 1 else T
            end = torch.arange(T, device=self.device) if T > 1 else torch.full((1,), W - 1, device=self.device)
            window = (end.unsqueeze(-1) - torch.arange(W - 1, -1, -1, device=self.device)).clamp(min=-1)
            return self.x(B, T, h, d), self.x(B, rows, d), window.expand(B, -1, -1).contiguous(), self.draw(h)

        def far(rate: int, count: int, chosen: bool) -> Inputs:
            E, seen = self.entries(rate), self.visible(rate).unsqueeze(-1)
            index = (
                self.integers(E, B, T, count) if chosen else torch.arange(count, device=self.device).expand(B, T, -1)
            )
            return self.x(B, E, d), torch.where(index < seen, index, -1)

        last = (d**-0.5, False)
        yield Case("attention, window", attention, lambda: (*near(), None, None, *last))
        yield Case(f"attention, window + {k}", attention, lambda: (*near(), *far(many, k, True), *last))
        turned = lambda: (*near(), *far(many, k, True), *last, *self.tables(B, T, 1))  # noqa: E731
        yield Case(f"attention, window + {k}, turned back", attention, turned)
        yield Case(f"attention, window + all {all_}", attention, lambda: (*near(), *far(few, all_, False), *last))
        in_bytes = lambda: self.stored(*near(), *far(many, k, True), *last, *self.tables(B, T, 1))  # noqa: E731
        yield Case(f"attention, window + {k}, turned back, rows in bytes", attention, in_bytes)
        all_in_bytes = lambda: self.stored(*near(), *far(few, all_, False), *last, None, None)  # noqa: E731
        yield Case(f"attention, window + all {all_}, rows in bytes", attention, all_in_bytes)
        S = (W if T == 1 else T) + all_

        def masked() -> Inputs:
            mask = torch.zeros(B, 1, T, S, device=self.device, dtype=bf16)
            low = torch.finfo(bf16).min
            mask += torch.full((T, S), low, device=self.device, dtype=bf16).triu(S - T + 1)
            return self.x(B, T, h, d), self.x(B, S, d), mask, self.draw(h), d**-0.5

        yield Case("attention with a dense mask", dense_attention, masked)

    def stored(self, q: Tensor, keys: Tensor, window: Tensor, sink: Tensor, entries: Tensor, *rest: Any) -> Inputs:
        """Arguments of attention with rows in bytes."""
        dr = self.c.qk_rope_head_dim
        return q, pack_kv(keys, dr), window, sink, pack_kv(entries, dr), *rest, dr

    def selection(self) -> Iterator[Case]:
        c, B, T = self.c, self.B, self.T
        rate = c.compress_rates[CSA]
        h, dh, E = c.index_n_heads, c.index_head_dim, self.entries(rate)

        def scores() -> Inputs:
            q, keys, w = self.x(B, T, h, dh), self.x(B, E, dh), self.draw(B, T, h)
            return q, keys, w, self.visible(rate), min(c.index_topk, E)

        def of_stored() -> Inputs:
            q, keys, w, *rest = scores()
            codes, scale = quantize_rows(keys.float())
            return q, codes, w, *rest, None, None, scale

        yield Case(f"indexer, {E} entries", indexer, scores)
        if dh % 64 == 0:
            yield Case(f"indexer, {E} entries in e4m3", indexer, of_stored)
        for kind, overlap in ((CSA, True), (HCA, False)):
            m = c.compress_rates[kind]
            yield Case(f"compressor, {m} to 1", compressor, lambda m=m, o=overlap: self.windows(m, o))
            written = lambda m=m, o=overlap: self.closed(m, o)  # noqa: E731
            yield Case(f"compressor and its memory, {m} to 1", compressor_append, written)
        yield Case("indexer's compressor and its memory, entries in e4m3", compressor_append_fp8, self.scaled)

    def windows(self, m: int, overlap: bool) -> Inputs:
        """What `compressor` takes: at decode one window, just closed."""
        B, T, R = self.B, self.T, m * (1 + overlap)
        S, n = (R, 1) if T == 1 else (T, max(1, T // m))
        first = (torch.arange(n, device=self.device) + 1).unsqueeze(-1) * m - R if T > 1 else 0
        index = (first + torch.arange(R, device=self.device)).view(1, n, R).clamp(-1, S - 1)
        rows = lambda: self.draw(B, S, self.c.head_dim * (1 + overlap))  # noqa: E731
        of_windows = index.expand(B, -1, -1).contiguous(), self.draw(self.c.head_dim), *self.tables(B, n)
        return rows(), rows(), *of_windows, EPS, overlap

    def closed(self, m: int, overlap: bool) -> Inputs:
        """The same with the rows still to be written."""
        values, gates, index, *of_windows, eps, overlap = self.windows(m, overlap)
        B, T, n, C = self.B, self.T, index.shape[1], values.shape[-1]
        each = lambda count: torch.arange(count, device=self.device).expand(B, -1).contiguous()  # noqa: E731
        rows = self.draw(B, T, C), self.draw(B, T, C), self.draw(m, C), each(T) % m
        entries = self.x(B, self.entries(m) + 1, self.c.head_dim)
        return values, gates, entries, each(T), *rows, index, *of_windows, each(n), eps, overlap

    def scaled(self) -> Inputs:
        """Of the indexer, whose entries are in e4m3."""
        c = self.c
        index = type(self)(c.replace(head_dim=c.index_head_dim), self.B, self.T, self.device)
        values, gates, entries, *rest = index.closed(c.compress_rates[CSA], True)
        return values, gates, *quantize_rows(entries.float()), *rest

    def memory(self) -> Iterator[Case]:
        c, B, T = self.c, self.B, self.T
        d, S = c.head_dim, max(c.sliding_window, T)
        ring = lambda: self.x(B, S, d)  # noqa: E731
        slot = lambda: (torch.arange(T, device=self.device) + 3).remainder(S).expand(B, -1).contiguous()  # noqa: E731
        yield Case("cache write", append, lambda: (ring(), slot(), self.x(B, T, d)))
        keys = lambda: (ring(), slot(), self.x(B, T, d), self.draw(d), EPS, *self.tables(B, T))  # noqa: E731
        yield Case("norm and RoPE of keys, cache write", norm_rope_append, keys)
        kinds = {"": (), ", 128 to 1": (HCA,), ", 4 to 1 twice": (CSA, CSA)}
        for what, compressors in kinds.items():
            queries = lambda: (self.x(B, T, c.num_attention_heads, d), EPS, *self.tables(B, T, 1))  # noqa: E731
            memories = lambda kinds=compressors: (  # noqa: E731
                x for kind in kinds for x in self.closed(c.compress_rates[kind], kind == CSA)
            )
            made = lambda q=queries, m=memories: (*q(), *keys(), *m())  # noqa: E731
            yield Case(f"before attention{what}", PROLOGUES[len(compressors)], made)
        stored = lambda: (*queries(), *keys(), *self.closed(c.compress_rates[CSA], True), *self.scaled())  # noqa: E731
        yield Case("before attention, 4 to 1 twice, keys in e4m3", PROLOGUES["2_fp8"], stored)
        dr = c.qk_rope_head_dim
        yield Case("rows into bytes", pack, lambda: (self.x(B, T, d), dr))
        yield Case("bytes into numbers", unpack, lambda: (pack_kv(self.x(B, T, d), dr), d, dr))

        def all_stored() -> Inputs:
            ring, *of_keys = keys()
            values, gates, entries, *of_entries = self.closed(c.compress_rates[CSA], True)
            memory = values, gates, pack_kv(entries, dr), *of_entries
            return *queries(), pack_kv(ring, dr), *of_keys, *memory, *self.scaled()

        yield Case("before attention, 4 to 1 twice, all in e4m3", PROLOGUES["2_fp8"], all_stored)

    def products(self) -> Iterator[Case]:
        c, N = self.c, self.N
        D, G, R, I = c.hidden_size, c.o_groups, c.o_lora_rank, c.moe_intermediate_size
        K, wide = c.num_attention_heads * c.head_dim // G, c.num_attention_heads * c.head_dim
        layers = {"queries": (wide, c.q_lora_rank), "keys": (c.head_dim, D), "shared expert's gate": (I, D)}
        for format in ("none", "fp8"):
            name = "bf16" if format == "none" else format
            for what, (rows, columns) in layers.items():
                made = lambda s=(rows, columns), f=format: (self.x(N, s[1]), *self.matrix(*s, format=f))  # noqa: E731
                yield Case(f"{what}, {name}", linear, made)
            a = lambda f=format: self.matrix(G * R, K, format=f)  # noqa: E731
            yield Case(f"output, by groups, {name}", grouped_linear, lambda a=a: (self.x(G, N, K), *a()))
            if format == "none":
                both = lambda a=a: (self.x(G, N, K), *a(), *self.matrix(D, G * R))  # noqa: E731
            else:

                def both(a=a) -> Inputs:
                    (a, a_scale), (b, b_scale) = a(), self.matrix(D, G * R, format="fp8")
                    return self.x(G, N, K), a, b, a_scale, None, b_scale, None

            yield Case(f"output, {name}", output_projection, both)
        wide_layers = {"router's logits": c.n_routed_experts, "compressor's values": 2 * c.head_dim}
        for what, rows in wide_layers.items():
            yield Case(what, linear_wide, lambda rows=rows: (self.x(N, D), *self.matrix(rows, D)))
        yield from self.of_the_same_vectors()
        yield Case("numbers of an fp8 matrix", dequantize, lambda: self.matrix(D, G * R, format="fp8"))

    def of_the_same_vectors(self) -> Iterator[Case]:
        """Rows of each matrix, and which results are wide."""
        c, D = self.c, self.c.hidden_size
        q, d, index = c.q_lora_rank, c.head_dim, c.index_head_dim
        both, I = (2 * index, 2 * index, 2 * d, 2 * d), c.moe_intermediate_size
        readers = {
            "queries and indexer's": (q, (c.num_attention_heads * d, c.index_n_heads * index), 0b00),
            "router and shared expert": (D, (c.n_routed_experts, I, I), 0b001),
            "readers of y, 128 to 1": (D, (q, d, d, d), 0b1100),
            "compressors and indexer's weights": (D, (c.index_n_heads, *both), 0b11110),
            "readers of y, 4 to 1, but for one": (D, (q, d, *both), 0b111100),
            "readers of y, 4 to 1": (D, (q, d, c.index_n_heads, *both), 0b1111000),
        }
        for what, (K, rows, wide) in readers.items():
            op = LINEARS[len(rows)]
            yield Case(what, op, lambda K=K, rows=rows, wide=wide: (self.x(self.N, K), *self.several(rows, K), wide))

        for rows in ((c.num_attention_heads * d,), (c.num_attention_heads * d, c.index_n_heads * index)):
            what = "norm and queries" + (", and indexer's" if len(rows) > 1 else "")
            made = lambda rows=rows: (self.x(self.N, q), self.draw(q), EPS, *self.several(rows, q), 0)  # noqa: E731
            yield Case(what, NORMED[len(rows)], made)

        def stored() -> Inputs:
            (a, a_scale), (b, b_scale) = self.matrix(q, D, format="fp8"), self.matrix(d, D, format="fp8")
            return self.x(self.N, D), a, b, 0b00, a_scale, b_scale

        yield Case("queries and keys, fp8", LINEARS[2], stored)

    def several(self, rows: tuple[int, ...], K: int) -> list[Tensor]:
        return [self.matrix(r, K)[0] for r in rows]

    def experts(self) -> Iterator[Case]:
        c, N = self.c, self.N
        D, I, X, k = c.hidden_size, c.moe_intermediate_size, c.n_routed_experts, c.num_experts_per_tok
        chosen = lambda: torch.rand(N, X, device=self.device).topk(k, -1).indices  # noqa: E731

        def stored(format: str) -> Inputs:
            sizes = (I, D), (I, D), (D, I)
            (w1, s1), (w3, s3), (w2, s2) = (self.stacked(*s, format=format) for s in sizes)
            gate = torch.rand(N, k, device=self.device)
            return self.x(N, D), chosen(), gate, w1, w3, w2, c.swiglu_limit, s1, s3, s2

        def few(args: Inputs) -> tuple[Inputs, int]:  # the experts of the first tokens, numbered anew
            x, expert, gate, *weights = args
            hit, expert = expert[:FEW].unique(return_inverse=True)
            picked = (rows_of(t, hit) if isinstance(t, Tensor) else t for t in weights)
            return (x[:FEW], expert, gate[:FEW], *picked), len(expert)

        for format in ("none", "mxfp4"):
            name = "bf16" if format == "none" else format
            yield Case(f"experts, {name}", moe, lambda f=format: stored(f), few)

        def shared(format: str) -> Inputs:
            weight, *scale = self.matrix(D, I, format=format)
            routed = self.draw(N, D)
            return self.x(N, I), self.x(N, I), weight, routed, c.swiglu_limit, *scale

        for format in ("none", "fp8"):
            name = "bf16" if format == "none" else format
            yield Case(f"shared expert's end, {name}", shared_expert, lambda f=format: shared(f))

        def into_streams() -> Inputs:
            n = c.hc_mult
            coefficients = torch.rand(N, n, device=self.device), torch.rand(N, n, n, device=self.device)
            return *shared("none"), None, None, self.x(N, n, D), *coefficients

        yield Case("shared expert's end and mHC, bf16", shared_expert, into_streams)

        def whole(format: str, own: str) -> Inputs:
            (w1, s1), (w3, s3), (w2, s2) = (self.stacked(*s, format=format) for s in ((I, D), (I, D), (D, I)))
            (v1, *r1), (v3, *r3), (v2, *r2) = (self.matrix(*s, format=own) for s in ((I, D), (I, D), (D, I)))
            r = [r1[0], r3[0], r2[0]] if r1 else [None] * 3
            gates = self.draw(N, X), k, c.routed_scaling_factor, EPS
            rest = c.swiglu_limit, self.draw(X) * 0.1, None, s1, s3, s2, None, None, None, *r
            return self.x(N, D), *gates, w1, w3, w2, c.swiglu_limit, v1, v3, v2, *rest

        def few_of(args: Inputs) -> tuple[Inputs, int]:  # with the experts that they choose, in their order
            a = experts.arguments(*args)
            x, logits = a["x"][:FEW], a["logits"][:FEW]
            hit = router.meaning(logits, a["bias"], k, 1.0, EPS)[0].unique()
            for name in ("w1", "w3", "w2", "s1", "s3", "s2", "bias"):
                if a[name] is not None:
                    a[name] = rows_of(a[name], hit)
            return tuple((a | dict(x=x, logits=logits[:, hit])).values()), len(x)

        for format, own in (("none", "none"), ("mxfp4", "fp8")):
            name = "bf16" if format == "none" else f"{format} and {own}"
            yield Case(f"all experts, {name}", experts, lambda f=format, o=own: whole(f, o), few_of)

        def grouped() -> Inputs:
            count = (chosen().flatten().unsqueeze(-1) == torch.arange(X, device=self.device)).sum(0)
            return self.x(N * k, D), self.stacked(I, D, format="none")[0], count.cumsum(0)

        def first(args: Inputs) -> tuple[Inputs, int]:
            x, w, ends = args
            rows = min(len(x), FEW * k)
            ends = ends.clamp(max=rows)
            hit = ends.diff(prepend=ends.new_zeros(1)) > 0
            return (x[:rows], w[hit], ends[hit]), rows

        yield Case("experts' first matrix, bf16", grouped_mm, grouped, first)

    def ends(self) -> Iterator[Case]:
        c, N = self.c, self.N
        n, D, V = c.hc_mult, c.hidden_size, c.vocab_size
        mix = lambda: (self.draw(n, n * D) * (n * D) ** -0.5, self.draw(n), self.draw(1))  # noqa: E731
        logits = lambda: (self.x(N, n, D), *mix(), self.draw(D), *self.matrix(V, D), SINKHORN_EPS, EPS, EPS, True)  # noqa: E731
        yield Case("model's end", head, logits)

        def join() -> Inputs:
            (e, e_scale), (h, h_scale) = (self.matrix(D, D, format="fp8") for _ in "eh")
            return self.x(N, D), self.x(N, n, D), self.draw(D), self.draw(D), e, h, e_scale, h_scale, EPS, EPS

        yield Case("MTP's beginning", mtp_join, join)

    def idioms(self) -> Iterator[Case]:
        c, N = self.c, self.N
        I, k, E = c.moe_intermediate_size, c.num_experts_per_tok, c.n_routed_experts
        yield Case("SwiGLU", swiglu, lambda: (self.x(N * k, I), self.x(N * k, I), c.swiglu_limit))
        yield Case("SiLU", silu, lambda: (self.x(N * k, I),))
        yield Case("softplus", softplus, lambda: (self.draw(N, E),))
        yield Case("softmax", softmax, lambda: (self.draw(N, c.num_attention_heads, c.sliding_window), -1))


def rows_of(t: Tensor, index: Tensor) -> Tensor:
    """t[index], of any type."""
    return as_bytes(t)[index].view(t.dtype)


def repeated(t: Tensor, times: int) -> Tensor:
    """t, of any type, so often."""
    return as_bytes(t).repeat(times, *[1] * (t.dim() - 1)).view(t.dtype)


def as_bytes(t: Tensor) -> Tensor:
    """Types of one byte as numbers that can be copied."""
    return t.view(torch.uint8) if t.dtype.itemsize == 1 else t
