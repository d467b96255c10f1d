"""The forward pass that trains `nano`: the reference model's own modules, with one part rewritten for speed.

The reference model gathers the keys of every query by an index list, which suits decoding but costs a gradient scatter
of W + K rows for every token. Training has whole sequences, so here attention multiplies blocks of W queries with the
two blocks of keys that their windows touch and with all entries, and masks what the index list would leave out.
Everything else (mHC, norms, compressors, indexer, experts) is called as it stands; a test holds both passes equal.

The pick of the indexer has no gradient. It learns from a loss of its own instead: the Kullback-Leibler divergence of
its softmax over the visible entries from the attention that the heads give them, on inputs cut off from the rest.

Shapes as in `model.py`; b = T / W blocks.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..layers import acc, rms_norm, rope
from ..model import CSA, DSV4, SWA, Attention, Block, Step, reconnect
from ..schedule import rotation

NEVER = -1e30  # a logit that exp turns into 0; finite, so that a row without entries has no NaN in its gradient


@dataclass
class Pass:
    """What a training step needs. logits, mtp_logits [B, T, V] fp32; loads: tokens of each expert [X], layer by layer,
    the MTP block last; index_loss, captured: one scalar for each CSA layer (captured: share of the entries' attention
    that falls on the picked ones)."""

    logits: Tensor | None = None
    mtp_logits: Tensor | None = None
    loads: list[Tensor] = field(default_factory=list)
    index_loss: list[Tensor] = field(default_factory=list)
    captured: list[Tensor] = field(default_factory=list)


def walk(model: DSV4, tokens: Tensor, step: Step, dense: bool = False) -> Pass:
    """tokens [B, T + 1] -> the logits after each of the first T, and those of the MTP block for the token after.

    `step` = `model.step(zeros(B), T, None, None)`. `dense`: CSA attends to all visible entries, as before the indexer
    has learned anything. T must be a multiple of the window.
    """
    out, now, following = Pass(), tokens[:, :-1], tokens[:, 1:]
    X = embed(model, now).unsqueeze(2).repeat(1, 1, model.config.hc_mult, 1)  # [B, T, n, D]
    for layer in model.layers:
        X = block(layer, X, now, step, dense, out)
    out.logits = model.logits(model.norm(model.hc_head(X)))
    for mtp in model.mtp:
        Y = block(mtp, mtp.join(embed(model, following), X), following, step, dense, out)
        out.mtp_logits = model.logits(mtp.norm(mtp.hc_head(Y)))
    return out


def embed(model: DSV4, tokens: Tensor) -> Tensor:
    """Rows of the embedding [B, T, D], as a matmul: its gradient needs neither a sort nor atomics."""
    weight = model.embed.weight
    return (tokens.unsqueeze(-1) == torch.arange(weight.shape[0], device=tokens.device)).to(weight.dtype) @ weight


def block(layer: Block, X: Tensor, tokens: Tensor, step: Step, dense: bool, out: Pass) -> Tensor:
    """`Block.forward` with the attention below; keeps the expert loads."""
    x, post, comb = layer.hc_attn(X)
    X = reconnect(X, attention(layer.attn, layer.attn_norm(x), step, dense, out), post, comb)
    x, post, comb = layer.hc_ffn(X)
    y, expert = layer.ffn(layer.ffn_norm(x), tokens, None)
    experts = torch.arange(layer.ffn.gate.weight.shape[0], device=expert.device)
    out.loads.append((expert.flatten().unsqueeze(-1) == experts).sum(0))
    return reconnect(X, y, post, comb)


def attention(attn: Attention, x: Tensor, step: Step, dense: bool, out: Pass) -> Tensor:
    """`Attention.forward` on whole sequences x [B, T, D]."""
    B, T, h, d = *x.shape[:2], attn.heads, attn.width
    cos, sin = step.rope[rotation(attn.kind)]
    qr = attn.q_norm(attn.wq_a(x))
    q = rope(rms_norm(attn.wq_b(qr).unflatten(-1, (h, d)), None, attn.eps), cos, sin)
    kv = rope(attn.kv_norm(attn.wkv(x)), cos.squeeze(2), sin.squeeze(2))
    W = min(step.window.shape[-1], T)
    keys, seen = band(kv, W)
    score = entries = visible = None
    if attn.kind != SWA:
        entries = attn.compressor(x, step, None)  # [B, E, d]
        visible = torch.arange(entries.shape[1], device=x.device) < step.windows[attn.kind].visible.unsqueeze(-1)
        keys = torch.cat([keys, entries.unsqueeze(1).expand(-1, T // W, -1, -1)], 2)
        seen = torch.cat([seen.expand(B, -1, -1, -1), visible.unflatten(1, (-1, W))], -1)  # [B, b, W, 2W + E]
    if attn.kind == CSA and visible is not None:
        score = attn.indexer.score(x.detach(), qr.detach(), step, None).masked_fill(~visible, NEVER)  # [B, T, E]
    q = acc(q).unflatten(1, (-1, W)).transpose(2, 3).flatten(2, 3)  # [B, b, h W, d]
    logits = (q @ acc(keys).transpose(-1, -2) * d**-0.5).unflatten(2, (h, W))  # [B, b, h, W, 2W + E]
    logits = logits.masked_fill(~seen.unsqueeze(2), NEVER)
    if score is not None and visible is not None:
        picked = pick(score, visible, attn.indexer.k)
        teach(attn, logits.detach(), score, visible, picked, out)
        if not dense:
            left_out = (visible & ~picked).unflatten(1, (-1, W)).unsqueeze(2)
            window = logits[..., : 2 * W]
            logits = torch.cat([window, logits[..., 2 * W :].masked_fill(left_out, NEVER)], -1)
    weight, total = softmax_parts(logits, attn.attn_sink)
    o = (weight.flatten(2, 3) @ acc(keys)).unflatten(2, (h, W)) / total  # [B, b, h, W, d]
    o = rope(o.transpose(2, 3).flatten(1, 2).to(x.dtype), cos, -sin)  # [B, T, h, d]
    wo_a = attn.wo_a.dense(x.dtype).unflatten(0, (attn.groups, -1))
    return attn.wo_b(torch.einsum("btgk,grk->btgr", o.flatten(-2).unflatten(-1, (attn.groups, -1)), wo_a).flatten(-2))


def band(kv: Tensor, W: int) -> tuple[Tensor, Tensor]:
    """kv [B, T, d] -> for each block of W queries its own and the previous block of keys [B, b, 2W, d], and which of
    them each query sees [1, b, W, 2W]."""
    T = kv.shape[1]
    if T % W:
        raise ValueError(f"{T} tokens: training needs a multiple of the window, {W}")
    blocks = kv.unflatten(1, (-1, W))
    before = torch.cat([torch.zeros_like(blocks[:, :1]), blocks[:, :-1]], 1)
    query, key = torch.arange(W, device=kv.device).unsqueeze(1), torch.arange(2 * W, device=kv.device) - W
    seen = (key <= query) & (key > query - W)  # [W, 2W]
    first = torch.arange(T // W, device=kv.device).view(-1, 1, 1) == 0
    return torch.cat([before, blocks], 2), (seen & ~(first & (key < 0))).unsqueeze(0)


def softmax_parts(logits: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    """exp(logits - max) and its sum with the sink's share [..., 1]; logits [B, b, h, W, C], sink [h]."""
    sink = sink.view(-1, 1, 1)
    top = torch.maximum(logits.detach().amax(-1, keepdim=True), sink.detach())
    weight = torch.exp(logits - top)
    return weight, weight.sum(-1, keepdim=True) + torch.exp(sink - top)


def pick(score: Tensor, visible: Tensor, k: int) -> Tensor:
    """Which of the visible entries are among the best k: bool [B, T, E]."""
    best = score.detach().topk(min(k, score.shape[-1]), -1).indices
    return torch.zeros_like(visible).scatter(-1, best, True) & visible


def teach(attn: Attention, logits: Tensor, score: Tensor, visible: Tensor, picked: Tensor, out: Pass) -> None:
    """Add the indexer's loss: KL(attention on the visible entries, mean of the heads || softmax of the scores).

    logits [B, b, h, W, 2W + E] with all visible entries, without gradient; score, visible, picked [B, T, E].
    """
    weight, total = softmax_parts(logits, attn.attn_sink.detach())
    E = score.shape[-1]
    share = (weight[..., -E:] / total).mean(2).flatten(1, 2)  # [B, T, E]
    target = share / share.sum(-1, keepdim=True).clamp(min=1e-20)
    some = visible[..., :1].to(score.dtype)  # [B, T, 1]: 0 where a query sees no entry yet
    divergence = target * (target.clamp(min=1e-20).log() - torch.log_softmax(score, -1))
    out.index_loss.append((divergence.sum(-1, keepdim=True) * some).sum() / some.sum().clamp(min=1))
    out.captured.append((target * picked * some).sum() / some.sum().clamp(min=1))
