"""Attention over index lists: one softmax over raw and compressed keys, with a sink."""

import torch

from dsv4_compile.op import Cost, Tensor, acc, known, op


@op("dsv4::attention")
def attention(
    q: Tensor,
    keys: Tensor,
    window: Tensor,
    sink: Tensor,
    entries: Tensor | None,
    index: Tensor | None,
    scale: float,
    sink_on_window: bool,
) -> Tensor:
    """Multi-query attention whose keys are its values, each query reading the rows that its index lists name.

    q [B, T, h, d]; keys [B, S, d] with `window` [B, T, W] int64; optionally entries [B, E, d] with `index` [B, T, K] int64;
    -1 in a list is 'none'; sink [h] (at least fp32). Returns [B, T, h, d] of q's dtype, computed in at least fp32.

    With s = scale q . k: o = sum_j e^s_j k_j / (sum_j e^s_j + e^sink), or, `sink_on_window`, the sink added to the
    window's logits instead. Source: DeepSeek-V4, attention core. A query whose lists are all -1 gives 0 in the first form
    and is undefined in the second.
    """
    batch = torch.arange(q.shape[0], device=q.device).view(-1, 1, 1)
    rows = keys[batch, window.clamp(min=0)]
    W = window.shape[-1]
    if entries is not None and index is not None:
        rows = torch.cat([rows, entries[batch, index.clamp(min=0)]], 2)
        window = torch.cat([window, index], 2)
    rows = acc(rows)
    s = acc(q) @ rows.transpose(-1, -2) * scale
    if sink_on_window:
        s = torch.cat([s[..., :W] + sink.unsqueeze(-1), s[..., W:]], -1)
    s = s.masked_fill((window < 0).unsqueeze(2), float("-inf"))
    if not sink_on_window:
        s = torch.cat([s, sink.unsqueeze(-1).expand(*s.shape[:-1], 1)], -1)
    p = torch.softmax(s, -1)
    return (p[..., : rows.shape[2]] @ rows).to(q.dtype)


@attention.cost
def _(B, T, h, d, W, K):
    rows = B * T * (W + K)
    return Cost(flops=4 * h * d * rows, read=2 * d * rows + 8 * rows + 2 * B * T * h * d, write=2 * B * T * h * d)


BLOCK = 1 << 18  # elements of gathered rows at a time: they stay in a core's L2 cache


def same_batch(a) -> bool | str:
    """The plain case: lists and keys of one batch size."""
    return known(a.keys.shape[0] == a.q.shape[0]) or "q and keys differ in batch"


@attention.on("cpu", when=same_batch)
def _(q, keys, window, sink, entries, index, scale, sink_on_window):
    B, T, h, d = q.shape
    W, K = window.shape[-1], 0 if index is None else index.shape[-1]
    wide = acc(q).dtype
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    sink = sink.to(wide).view(h, 1)
    step = max(1, BLOCK // max(1, (W + K) * d))
    for b in range(B):
        for t in range(0, T, step):
            part = slice(t, min(t + step, T))
            n = part.stop - t
            lists = window[b, part] if K == 0 else torch.cat([window[b, part], index[b, part]], 1)  # [n, W + K]
            if n == 1:  # one query reads only what there is
                lists = lists[lists >= 0].view(1, -1)
                inside = int((window[b, t] >= 0).sum())
            else:
                inside = W
            none = None if n == 1 else lists < 0
            rows = torch.empty(n, lists.shape[1], d, dtype=keys.dtype)
            rows[:, :inside] = keys[b].index_select(0, lists[:, :inside].reshape(-1).clamp(min=0)).view(n, inside, d)
            if K:
                rest = lists[:, inside:]
                rows[:, inside:] = entries[b].index_select(0, rest.reshape(-1).clamp(min=0)).view(n, -1, d)
            rows = rows.to(wide)
            s = torch.bmm(q[b, part].to(wide) * scale, rows.transpose(1, 2))  # [n, h, W + K]
            if sink_on_window:
                s[..., :inside] += sink
            if none is not None:
                s.masked_fill_(none.unsqueeze(1), float("-inf"))
            top = s.amax(-1, keepdim=True) if s.shape[-1] else s.new_full((n, h, 1), float("-inf"))
            if not sink_on_window:
                top = torch.maximum(top, sink)
            p = s.sub_(top).exp_()
            total = p.sum(-1, keepdim=True)
            if not sink_on_window:
                total += torch.exp(sink - top)
            out[b, part] = torch.bmm(p, rows).div_(total)
    return out
