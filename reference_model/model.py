"""DeepSeek-V4 in plain eager PyTorch, one file, to be read top to bottom.

Shapes: B batch, T tokens of the call, N = B T, D hidden size, n streams, h heads, d head dim, W sliding window, m tokens in
a compressor window, E entries, K picked entries, hI x dI indexer heads, X experts, k experts a token, I expert width,
V vocabulary. `acc(x)` is x in at least fp32. Index lists hold -1 for 'none'.

A layer is two sites of manifold-constrained hyper-connections (mHC), one around attention and one around the experts.
Attention reads the last W raw keys and, in two of the three kinds of layer, compressed entries: the best K of one
every m = 4 tokens (CSA) or all of one every m = 128 (HCA).
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import DSV4Config, rope_frequencies
from .layers import (
    Exact,
    ExpertLinear,
    Frequencies,
    Linear,
    RMSNorm,
    acc,
    exact_dtype,
    grouped_mm,
    put,
    rms_norm,
    rope,
    tail,
    take,
)
from .quant import dequantize_rows, quantize_rows, stored_as, unpack_kv
from .repeated import Repeated, known_region, mark_of, region
from .schedule import CSA, HCA, SWA, rotation
from .state import Chunk, CompressorState, Dtype, LayerState, Selection, State, Windows


class HyperConnection(Exact):
    """mHC before a block: n streams -> one input for the block, and how its output goes back."""

    exact = ("fn", "base", "scale")

    def __init__(self, config: DSV4Config):
        super().__init__()
        n, dtype = config.hc_mult, exact_dtype()
        self.iters, self.eps, self.rms_eps = config.hc_sinkhorn_iters, config.hc_eps, config.rms_norm_eps
        self.fn = nn.Parameter(torch.randn((2 + n) * n, n * config.hidden_size, dtype=dtype) * config.hidden_size**-0.5)
        self.base = nn.Parameter(torch.zeros((2 + n) * n, dtype=dtype))
        self.scale = nn.Parameter(torch.ones(3, dtype=dtype))

    def forward(self, X: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # X [B, T, n, D]
        n, eps = X.shape[-2], self.eps
        f = acc(X).flatten(-2)  # [B, T, nD]
        r = torch.rsqrt(f.square().mean(-1, keepdim=True) + self.rms_eps)
        mix = F.linear(f, self.fn) * r  # [B, T, (2 + n) n]
        pre, post, comb = mix.split([n, n, n * n], -1)
        pre_base, post_base, comb_base = self.base.split([n, n, n * n])
        pre = torch.sigmoid(pre * self.scale[0] + pre_base) + eps  # [B, T, n]
        post = 2 * torch.sigmoid(post * self.scale[1] + post_base)  # [B, T, n]
        comb = sinkhorn((comb * self.scale[2] + comb_base).unflatten(-1, (n, n)), self.iters, eps)  # [B, T, n, n]
        x = (pre.unsqueeze(-1) * acc(X)).sum(-2)  # [B, T, D]
        return x.to(X.dtype), post, comb


def sinkhorn(logits: Tensor, iters: int, eps: float) -> Tensor:
    """Nearly doubly stochastic: rows by softmax, then alternately columns and rows; columns last."""
    c = torch.softmax(logits, -1) + eps
    c = c / (c.sum(-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        c = c / (c.sum(-1, keepdim=True) + eps)
        c = c / (c.sum(-2, keepdim=True) + eps)
    return c


def reconnect(X: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """mHC after a block: X'[k] = post[k] y + sum_j comb[j, k] X[j]; the sum runs over the first index of comb."""
    return (post.unsqueeze(-1) * acc(y).unsqueeze(-2) + comb.transpose(-1, -2) @ acc(X)).to(X.dtype)  # [B, T, n, D]


class HyperHead(Exact):
    """The last collapse: n streams -> one hidden state."""

    exact = ("fn", "base", "scale")

    def __init__(self, config: DSV4Config):
        super().__init__()
        n, dtype = config.hc_mult, exact_dtype()
        self.eps, self.rms_eps = config.hc_eps, config.rms_norm_eps
        self.fn = nn.Parameter(torch.randn(n, n * config.hidden_size, dtype=dtype) * config.hidden_size**-0.5)
        self.base = nn.Parameter(torch.zeros(n, dtype=dtype))
        self.scale = nn.Parameter(torch.ones(1, dtype=dtype))

    def forward(self, X: Tensor) -> Tensor:  # X [B, T, n, D]
        f = acc(X).flatten(-2)
        r = torch.rsqrt(f.square().mean(-1, keepdim=True) + self.rms_eps)
        pre = torch.sigmoid(F.linear(f, self.fn) * r * self.scale + self.base) + self.eps  # [B, T, n]
        return (pre.unsqueeze(-1) * acc(X)).sum(-2).to(X.dtype)  # [B, T, D]


class Compressor(Exact):
    """Every m tokens become one entry: a softmax over the rows of a window, channel by channel, then norm and RoPE.

    With overlap (CSA, indexer) each token gives two rows of d channels: the first half feeds the next window's entry,
    the second half its own.
    """

    exact = ("ape",)

    def __init__(self, config: DSV4Config, kind: str, width: int):
        super().__init__()
        self.kind, self.m, self.overlap, self.width = kind, config.rate(kind), kind == CSA, width
        columns = (1 + self.overlap) * width
        self.wkv = Linear(config.hidden_size, columns)
        self.wgate = Linear(config.hidden_size, columns)
        self.ape = nn.Parameter(torch.zeros(self.m, columns, dtype=exact_dtype()))  # gate bias by place in the window
        self.norm = RMSNorm(width, config.rms_norm_eps)

    def forward(self, x: Tensor, step: "Step", state: CompressorState | None) -> Tensor:  # x [B, T, D] -> [B, E, d]
        kind, chunk = self.kind, step.chunk
        windows = step.windows[kind]
        c = F.linear(acc(x), acc(self.wkv.weight))  # [B, T, C]
        z = F.linear(acc(x), acc(self.wgate.weight)) + self.ape[chunk.position % self.m]
        c = chunk.extend(None if state is None else state.values, c)  # [B, S, C]
        z = chunk.extend(None if state is None else state.gates, z)
        cos, sin = step.window_rope[kind]  # [B, n, dr/2]
        e = compress(c, z, windows.index, self.norm.weight, self.norm.eps, cos, sin, self.overlap)  # [B, n, d]
        if state is not None and state.scales is not None:
            codes, scale = quantize_rows(e)
            put(state.entries, windows.slot, codes)
            put(state.scales, windows.slot, scale)
            return dequantize_rows(state.entries[:, :-1], state.scales[:, :-1], e.dtype)
        if state is None:
            return e.to(x.dtype)
        put(state.entries, windows.slot, stored_as(state.entries, e, 2 * cos.shape[-1]))
        return state.entries[:, :-1]


def compress(
    c: Tensor, z: Tensor, index: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, overlap: bool
) -> Tensor:
    """Values c and gates z [B, S, C], the rows `index` [B, n, R] of each window -> entries [B, n, d]; an open window, all
    of whose rows are -1, gives zeros."""
    c, z = take(c, index), take(z, index)  # [B, n, R, C]
    if overlap:  # the older m rows give their first half, the newer m their second
        m, d = index.shape[-1] // 2, c.shape[-1] // 2
        c = torch.cat([c[:, :, :m, :d], c[:, :, m:, d:]], 2)
        z = torch.cat([z[:, :, :m, :d], z[:, :, m:, d:]], 2)
    none = (index < 0).unsqueeze(-1)
    p = torch.softmax(z.masked_fill(none, -1e30), 2)  # finite, so that an open window is not NaN
    e = (p * c.masked_fill(none, 0.0)).sum(2)
    return rope(rms_norm(e, weight, eps), cos, sin)


class Indexer(nn.Module):
    """The lightning indexer of CSA: scores every entry with a small network and picks the best K."""

    def __init__(self, config: DSV4Config):
        super().__init__()
        self.heads, self.width, self.k = config.index_n_heads, config.index_head_dim, config.index_topk
        self.wq_b = Linear(config.q_lora_rank, self.heads * self.width, config.linear_format)
        self.weights_proj = Linear(config.hidden_size, self.heads)
        self.compressor = Compressor(config, CSA, self.width)

    def forward(self, x: Tensor, qr: Tensor, step: "Step", state: CompressorState | None) -> Tensor:
        score = self.score(x, qr, step, state)  # [B, T, E]
        visible = step.windows[CSA].visible.unsqueeze(-1)  # [B, T, 1]
        entry = torch.arange(score.shape[-1], device=x.device)
        score = score.masked_fill(entry >= visible, float("-inf"))
        pick = score.topk(min(self.k, score.shape[-1]), -1).indices  # [B, T, K]
        return torch.where(pick < visible, pick, -1)

    def score(self, x: Tensor, qr: Tensor, step: "Step", state: CompressorState | None) -> Tensor:
        """sum_h w[h] relu(q[h] . key) / sqrt(hI dI), for every entry: [B, T, E]."""
        heads, width = self.heads, self.width
        keys = self.compressor(x, step, state)  # [B, E, dI]
        q = rope(self.wq_b(qr).unflatten(-1, (heads, width)), *step.rope["compress"])  # [B, T, hI, dI]
        w = acc(self.weights_proj(x)) * (heads * width) ** -0.5  # [B, T, hI]
        s = F.relu(acc(q) @ acc(keys).transpose(-1, -2).unsqueeze(1))  # [B, T, hI, E]
        return (s * w.unsqueeze(-1)).sum(-2)


class Attention(Exact):
    """Multi-query attention whose one latent is both key and value; one softmax over window and entries, with a sink."""

    exact = ("attn_sink",)

    def __init__(self, config: DSV4Config, kind: str):
        super().__init__()
        D, h, d, format = config.hidden_size, config.num_attention_heads, config.head_dim, config.linear_format
        self.heads, self.width, self.groups, self.eps = h, d, config.o_groups, config.rms_norm_eps
        self.kind, self.sink_mode = kind, config.sink_mode
        self.attn_sink = nn.Parameter(torch.zeros(h, dtype=exact_dtype()))
        self.wq_a = Linear(D, config.q_lora_rank, format)
        self.q_norm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
        self.wq_b = Linear(config.q_lora_rank, h * d, format)
        self.wkv = Linear(D, d, format)
        self.kv_norm = RMSNorm(d, config.rms_norm_eps)
        self.wo_a = Linear(h * d // config.o_groups, config.o_groups * config.o_lora_rank, format)  # block-diagonal
        self.wo_b = Linear(config.o_groups * config.o_lora_rank, D, format)
        if kind != SWA:
            self.compressor = Compressor(config, kind, d)
        if kind == CSA:
            self.indexer = Indexer(config)

    def forward(
        self, x: Tensor, step: "Step", state: LayerState | None, pick: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:  # x [B, T, D]
        kind, groups = self.kind, self.groups
        cos, sin = step.rope[rotation(kind)]  # [B, T, 1, dr/2]
        qr = self.q_norm(self.wq_a(x))  # [B, T, rq]
        q = self.wq_b(qr).unflatten(-1, (self.heads, self.width))  # [B, T, h, d]
        q = rope(rms_norm(q, None, self.eps), cos, sin)
        kv = rope(self.kv_norm(self.wkv(x)), cos.squeeze(2), sin.squeeze(2))  # [B, T, d]
        memory, dr = None if state is None else state.kv, 2 * cos.shape[-1]
        keys = step.chunk.extend(memory, stored_as(memory, kv, dr))  # [B, S, d], or bytes
        entries = index = None
        if kind != SWA:
            entries = self.compressor(x, step, None if state is None else state.compressor)  # [B, E, d]
        if kind == HCA:
            index = step.all_entries  # [B, T, E]
        elif kind == CSA and pick is None:
            index = pick = self.indexer(x, qr, step, None if state is None else state.indexer)  # [B, T, K]
        elif kind == CSA:
            index = pick
            self.indexer.compressor(x, step, None if state is None else state.indexer)  # its memory goes on
        o = attend(q, keys, step.window, entries, index, self.attn_sink, self.sink_mode, dr)  # [B, T, h, d]
        o = rope(o, cos, -sin).flatten(-2).unflatten(-1, (groups, -1))  # [B, T, g, h d / g]
        wo_a = self.wo_a.dense(x.dtype).unflatten(0, (groups, -1))  # [g, dg, h d / g]
        u = torch.einsum("btgk,grk->btgr", o, wo_a)
        return self.wo_b(u.flatten(-2)), pick


def attend(
    q: Tensor, kv: Tensor, window: Tensor, entries: Tensor | None, index: Tensor | None, sink: Tensor, mode: str, r: int
) -> Tensor:
    """q [B, T, h, d] against the rows `window` [B, T, W] of kv [B, S, d] and `index` [B, T, K] of entries [B, E, d]; or of both
    in bytes, r channels rotary (`pack_kv`).

    "denominator" (as released): the sink is one more logit, without a value. "swa_scale": it is added to the window's
    logits, o = (e^lse_c o_c + e^sink e^lse_w o_w) / (e^lse_c + e^sink e^lse_w).
    """
    W = window.shape[-1]
    rows = take(kv, window)  # [B, T, W, d]
    if entries is not None and index is not None:
        rows = torch.cat([rows, take(entries, index)], 2)  # [B, T, W + K, d]
        window = torch.cat([window, index], 2)
    rows = (unpack_kv(rows, q.shape[-1], r) if rows.dtype == torch.uint8 else rows).to(acc(q).dtype)
    s = acc(q) @ rows.transpose(-1, -2) * q.shape[-1] ** -0.5  # [B, T, h, W + K]
    if mode == "swa_scale":
        s = torch.cat([s[..., :W] + sink.unsqueeze(-1), s[..., W:]], -1)
    s = s.masked_fill((window < 0).unsqueeze(2), float("-inf"))
    if mode == "denominator":
        s = torch.cat([s, sink.unsqueeze(-1).expand(*s.shape[:-1], 1)], -1)
        p = torch.softmax(s, -1)[..., :-1]
    else:
        p = torch.softmax(s, -1)
    return (p @ rows).to(q.dtype)  # [B, T, h, d]


class Router(Exact):
    """Which k experts a token goes to and with what weight: by the best scores, or by a table of token ids (hash)."""

    exact = ("bias",)

    def __init__(self, config: DSV4Config, kind: str):
        super().__init__()
        X, k, hashed = config.n_routed_experts, config.num_experts_per_tok, kind == "hash_moe"
        self.k, self.scale, self.scoring = k, config.routed_scaling_factor, config.scoring_func
        self.uniform = hashed and config.hash_gate == "uniform"
        self.weight = nn.Parameter(torch.randn(X, config.hidden_size) * config.hidden_size**-0.5)
        self.bias = None if hashed else nn.Parameter(torch.zeros(X, dtype=exact_dtype()))
        self.register_buffer("tid2eid", torch.rand(config.vocab_size, X).topk(k, -1).indices if hashed else None)

    def forward(self, x: Tensor, token: Tensor, pick: Tensor | None) -> tuple[Tensor, Tensor]:  # x [N, D], token [N]
        score = self.score(x)  # [N, X]
        if pick is not None:
            expert = pick
        elif self.tid2eid is not None:
            expert = self.tid2eid[token]
        else:
            expert = (score + self.bias).topk(self.k, -1).indices  # [N, k]; the bias selects, it does not weigh
        if self.uniform:
            return expert, torch.full_like(score[:, : self.k], 1 / self.k)
        gate = score.gather(-1, expert)
        return expert, gate / (gate.sum(-1, keepdim=True) + 1e-20) * self.scale

    def score(self, x: Tensor) -> Tensor:
        """Affinity of every expert: [N, X], at least fp32."""
        logits = F.linear(acc(x), acc(self.weight))
        if self.scoring == "sqrtsoftplus":
            return F.softplus(logits).sqrt()
        return torch.softmax(logits, -1) if self.scoring == "softmax" else torch.sigmoid(logits)


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit), in at least fp32."""
    return F.silu(acc(gate).clamp(max=limit)) * acc(up).clamp(-limit, limit)


class Expert(nn.Module):
    """The shared expert: one clamped SwiGLU."""

    def __init__(self, config: DSV4Config):
        super().__init__()
        D, I, self.limit = config.hidden_size, config.moe_intermediate_size, config.swiglu_limit
        self.w1 = Linear(D, I, config.linear_format)
        self.w2 = Linear(I, D, config.linear_format)
        self.w3 = Linear(D, I, config.linear_format)

    def forward(self, x: Tensor) -> Tensor:  # x [N, D]
        return self.w2(swiglu(self.w1(x), self.w3(x), self.limit).to(x.dtype))


class Experts(nn.Module):
    """The routed experts, without a loop and without data-dependent control flow."""

    def __init__(self, config: DSV4Config, format: str):
        super().__init__()
        D, I, X = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
        self.limit = config.swiglu_limit
        self.w1 = ExpertLinear(X, D, I, format)
        self.w2 = ExpertLinear(X, I, D, format)
        self.w3 = ExpertLinear(X, D, I, format)

    def forward(self, x: Tensor, expert: Tensor, gate: Tensor) -> Tensor:  # x [N, D], expert and gate [N, k]
        if expert.numel() <= self.w1.weight.shape[0]:
            return self.gathered(x, expert, gate)
        return self.grouped(x, expert, gate)

    def gathered(self, x: Tensor, expert: Tensor, gate: Tensor) -> Tensor:
        """Few tokens: read the matrices that were chosen, one for each of the N k choices."""
        k, chosen = expert.shape[-1], expert.flatten()
        w1, w2, w3 = (w.rows(chosen, x.dtype).transpose(-1, -2) for w in (self.w1, self.w2, self.w3))
        x_k = x.repeat_interleave(k, 0).unsqueeze(1)  # [N k, 1, D]
        hidden = swiglu(x_k @ w1, x_k @ w3, self.limit).to(x.dtype)  # [N k, 1, I]
        y = acc(hidden @ w2).view(-1, k, x.shape[-1])  # [N, k, D]
        return (y * gate.unsqueeze(-1)).sum(1)

    def grouped(self, x: Tensor, expert: Tensor, gate: Tensor) -> Tensor:
        """Many tokens: sort the N k choices by expert, one grouped matmul over all experts."""
        k, chosen = expert.shape[-1], expert.flatten()
        order = chosen.argsort(stable=True)
        experts = torch.arange(self.w1.weight.shape[0], device=x.device)
        ends = torch.searchsorted(chosen[order], experts, right=True).int()  # [X], where each expert's rows end
        w1, w2, w3 = (w.dense(x.dtype) for w in (self.w1, self.w2, self.w3))
        x_k = x[order // k]  # [N k, D]
        hidden = swiglu(grouped_mm(x_k, w1, ends), grouped_mm(x_k, w3, ends), self.limit).to(x.dtype)
        y = acc(grouped_mm(hidden, w2, ends))[order.argsort()].view(-1, k, x.shape[-1])  # [N, k, D]
        return (y * gate.unsqueeze(-1)).sum(1)


class MoE(nn.Module):
    """Router, routed experts and the shared expert."""

    def __init__(self, config: DSV4Config, kind: str, format: str):
        super().__init__()
        self.gate = Router(config, kind)
        self.experts = Experts(config, format)
        self.shared_experts = Expert(config)

    def forward(self, x: Tensor, tokens: Tensor, pick: Tensor | None) -> tuple[Tensor, Tensor]:  # x [B, T, D]
        flat = x.flatten(0, 1)
        expert, gate = self.gate(flat, tokens.flatten(), pick)
        y = self.experts(flat, expert, gate) + acc(self.shared_experts(flat))
        return y.to(x.dtype).view_as(x), expert


class Step:
    """What all layers of one call share: places, rotations and index lists; none depends on a weight."""

    def __init__(self, config: DSV4Config, tables: nn.ModuleDict, chunk: Chunk, max_len: int | None):
        self.chunk = chunk
        W = config.sliding_window
        columns = min(W, chunk.T) if max_len is None else W
        p = (chunk.position - columns + 1).unsqueeze(-1) + torch.arange(columns, device=chunk.start.device)
        self.window = chunk.find(p, columns if chunk.draft is None else W + chunk.draft)  # [B, T, W]
        self.rope, self.windows, self.window_rope = {}, {}, {}
        for name, table in tables.items():
            cos, sin = table(chunk.position.unsqueeze(-1))
            self.rope[name] = cos, sin  # [B, T, 1, dr/2]
        for kind in sorted({CSA, HCA} & set(config.layer_types)):  # in an order that every process shares
            self.windows[kind] = windows = Windows(chunk, config.rate(kind), kind == CSA, max_len)
            self.window_rope[kind] = tables["compress"](windows.first)  # [B, n, dr/2]
            if kind == HCA:  # CSA picks
                entry = torch.arange(windows.count, device=chunk.start.device)
                self.all_entries = torch.where(entry < windows.visible.unsqueeze(-1), entry, -1)  # [B, T, E]
        parts = {kind: self.parts_of(kind) for kind in sorted({SWA, *config.layer_types})}
        self.parts = {kind: (mark_of(some), some) for kind, some in parts.items()}

    def parts_of(self, kind: str) -> tuple[Any, ...]:
        """What a layer of this kind needs, as `Step.of` takes it."""
        shared = *self.chunk.parts(), self.window, *self.rope[rotation(kind)]
        if kind == SWA:
            return shared
        shared = *shared, *self.windows[kind].parts(), *self.window_rope[kind]
        return (*shared, self.all_entries) if kind == HCA else shared

    @classmethod
    def of(cls, kind: str, parts: Iterator[Any]) -> "Step":
        """The opposite of `parts`."""
        step = cls.__new__(cls)
        step.chunk, step.window = Chunk.of(parts), next(parts)
        step.rope = {rotation(kind): (next(parts), next(parts))}
        if kind != SWA:
            step.windows = {kind: Windows.of(parts)}
            step.window_rope = {kind: (next(parts), next(parts))}
        if kind == HCA:
            step.all_entries = next(parts)
        return step


class Block(Repeated):
    """One layer: mHC around attention, mHC around the experts."""

    def __init__(self, config: DSV4Config, attention: str, router: str, expert_format: str):
        super().__init__()
        self.attn = Attention(config, attention)
        self.ffn = MoE(config, router, expert_format)
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hc_attn = HyperConnection(config)
        self.hc_ffn = HyperConnection(config)

    def forward(
        self,
        X: Tensor,
        tokens: Tensor,
        step: Step,
        state: LayerState | None,
        expert: Tensor | None = None,
        entries: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # X [B, T, n, D]; `expert` and `entries` replay a selection
        found = self.once((X, tokens, expert, entries), state, *step.parts[self.attn.kind])
        return *found, *[None] * (3 - len(found))

    def work(
        self, alike: int, X: Tensor, tokens: Tensor, expert: Tensor | None, entries: Tensor | None, *parts: Any
    ) -> tuple[Tensor, ...]:
        """`forward` on the parts of its step and state; a region may return new tensors only."""
        rest = iter(parts)
        state = LayerState.of(rest) if next(rest) else None
        step = Step.of(self.attn.kind, rest)
        x, post, comb = self.hc_attn(X)
        y, picked = self.attn(self.attn_norm(x), step, state, entries)
        X = reconnect(X, y, post, comb)
        x, post, comb = self.hc_ffn(X)
        y, chosen = self.ffn(self.ffn_norm(x), tokens, expert)
        X = reconnect(X, y, post, comb)
        if expert is not None:
            return (X,)
        return (X, chosen) if picked is None else (X, chosen, picked)

    region, known = region(work), known_region(work)  # layers of one kind are compiled once


class MTP(Block):
    """Multi-token prediction: the streams at t and the embedding of token t + 1 predict token t + 2."""

    def __init__(self, config: DSV4Config):
        super().__init__(config, SWA, "moe", config.mtp_expert_format)
        D, eps, format = config.hidden_size, config.rms_norm_eps, config.linear_format
        self.enorm, self.hnorm, self.norm = RMSNorm(D, eps), RMSNorm(D, eps), RMSNorm(D, eps)
        self.e_proj, self.h_proj = Linear(D, D, format), Linear(D, D, format)
        self.hc_head = HyperHead(config)

    def join(self, e: Tensor, X: Tensor) -> Tensor:
        """e [B, T, D], embeddings of the next tokens, and the streams X [B, T, n, D] -> streams for the block."""
        return self.e_proj(self.enorm(e)).unsqueeze(2) + self.h_proj(self.hnorm(X))


class DSV4(nn.Module):
    """DeepSeek-V4. Parameters are named as in the official checkpoint (experts stacked)."""

    def __init__(self, config: DSV4Config):
        super().__init__()
        self.config = config
        D, V = config.hidden_size, config.vocab_size
        self.embed = nn.Embedding(V, D)
        kinds = zip(config.layer_types, config.mlp_layer_types, strict=True)
        self.layers = nn.ModuleList(Block(config, a, r, config.expert_format) for a, r in kinds)
        self.mtp = nn.ModuleList(MTP(config) for _ in range(config.num_nextn_predict_layers))
        self.norm = RMSNorm(D, config.rms_norm_eps)
        self.head = Linear(D, V)
        self.hc_head = HyperHead(config)
        names = ["main", "compress"] if {CSA, HCA} & set(config.layer_types) else ["main"]
        self.tables = nn.ModuleDict({name: Frequencies(rope_frequencies(config, name)) for name in names})
        if not self.embed.weight.is_meta:  # made on the CPU, that a model without memory may have them too
            self.tables.to(self.embed.weight.device)

    def forward(
        self,
        tokens: Tensor,
        state: State | None = None,
        *,
        last: int | None = None,
        lengths: Tensor | None = None,
        selection: Selection | None = None,
        mtp: bool = False,
        streams: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """tokens [B, T] int64 -> logits [B, T, V], at least fp32.

        With `state` (from `new_state`) the tokens are appended to what was seen before, T >= 1 of them, in any chunking;
        without, they are a whole sequence. `last` = n: logits of the last n tokens only, [B, n, V]. `lengths` [B]: only
        the first lengths[b] tokens of row b are real (at least 1, and at least n with `last`). `selection`: records the
        discrete choices if empty, replays them if not. `mtp`: also the logits [B, T - 1, V] of the token after the next
        (whole sequences only). `streams`: also the streams [B, T, n, D] before the head, for `draft`.
        """
        self.check(tokens, state, last, lengths, mtp)
        with torch.set_grad_enabled(torch.is_grad_enabled() and state is None):  # memory is not differentiable
            return self.run(tokens, state, last, lengths, selection, mtp, streams)

    def run(
        self,
        tokens: Tensor,
        state: State | None,
        last: int | None,
        lengths: Tensor | None,
        selection: Selection | None,
        mtp: bool,
        streams: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`forward`, after its checks."""
        B, T = tokens.shape
        start = state.position if state is not None else torch.zeros(B, device=tokens.device, dtype=torch.int64)
        step = self.step(start, T, lengths, state)
        X = self.embed(tokens).unsqueeze(2).repeat(1, 1, self.config.hc_mult, 1)  # [B, T, n, D]
        replay = selection is not None and len(selection.experts) > 0
        for i, layer in enumerate(self.layers):
            memory = None if state is None else state.layers[i]
            expert, entries = (selection.experts[i], selection.entries[i]) if replay else (None, None)
            X, expert, entries = layer(X, tokens, step, memory, expert, entries)
            if selection is not None and not replay:
                selection.experts.append(expert)
                selection.entries.append(entries)
        if state is not None:
            state.position.copy_(step.chunk.end)
        logits = self.logits(self.norm(self.hc_head(tail(X, last, lengths))))
        if mtp:
            whole = self.step(torch.zeros_like(start), T - 1, None, None)
            return logits, self.predict(tokens[:, 1:], X[:, :-1], whole, None)[0]
        return (logits, X) if streams else logits

    @torch.no_grad()
    def draft(
        self, tokens: Tensor, streams: Tensor, state: State, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One MTP step after a forward of the same T tokens: `tokens` [B, T] are those that follow each of them, `streams`
        [B, T, n, D] as that forward (or the draft step before) returned them. Returns logits [B, T, V] of the tokens
        after those, and the block's own streams."""
        if not self.mtp:
            raise ValueError("this model has no MTP block (num_nextn_predict_layers is 0), so it cannot draft")
        T = tokens.shape[1]
        start = state.position - (T if lengths is None else lengths)
        return self.predict(tokens, streams, self.step(start, T, lengths, state), state.layers[len(self.layers)])

    def predict(self, tokens: Tensor, streams: Tensor, step: Step, state: LayerState | None) -> tuple[Tensor, Tensor]:
        """The MTP block, its own head and norm, the shared embedding and vocabulary."""
        block = self.mtp[0]
        X, _, _ = Block.forward(block, block.join(self.embed(tokens), streams), tokens, step, state)
        return self.logits(block.norm(block.hc_head(X))), X

    def logits(self, h: Tensor) -> Tensor:
        return F.linear(acc(h), acc(self.head.weight))

    def step(self, start: Tensor, T: int, lengths: Tensor | None, state: State | None) -> Step:
        """What the layers share when T tokens follow the `start` [B] that were seen before."""
        chunk = Chunk(T, start, lengths, None if state is None else state.draft)
        return Step(self.config, self.tables, chunk, None if state is None else state.max_len)

    def new_state(
        self, batch: int, max_len: int, draft: int = 0, index_dtype: Dtype = None, kv_dtype: Dtype = None
    ) -> State:
        """Empty generation state (`State.empty`) on the model's device, by default of its compute dtype."""
        weight = self.embed.weight
        return State.empty(self.config, batch, max_len, draft, weight.device, weight.dtype, index_dtype, kv_dtype)

    def check(self, tokens: Tensor, state: State | None, last: int | None, lengths: Tensor | None, mtp: bool) -> None:
        """Reject what would give nonsense later; shapes and dtypes only, never values."""
        if tokens.dim() != 2 or tokens.dtype != torch.int64:
            raise ValueError(f"tokens must be [batch, length] int64, got {list(tokens.shape)} {tokens.dtype}")
        B, T = tokens.shape
        limit, name = self.config.max_position_embeddings, "the model's context (max_position_embeddings)"
        if state is not None:
            limit, name = state.max_len, "the max_len of this state"
            if (rows := state.position.shape[0]) != B:
                raise ValueError(f"tokens have batch {B}, the state was made for {rows}: new_state({B}, ...)")
            if not state.fits(self.config):
                raise ValueError("this state was made for a model of other sizes: use new_state of this one")
        if not 1 <= T <= limit:
            raise ValueError(f"a call takes 1 to {limit} tokens a row ({name}), got {T}")
        if last is not None and not 1 <= last <= T:
            raise ValueError(f"last={last} must lie between 1 and the {T} tokens of the call")
        if lengths is not None and (lengths.shape != (B,) or lengths.dtype != torch.int64):
            raise ValueError(f"lengths must be [{B}] int64, got {list(lengths.shape)} {lengths.dtype}")
        if mtp and (state is not None or T < 2 or not self.mtp):
            raise ValueError("mtp=True needs a model with an MTP block, no state, and at least 2 tokens")
