"""Attention over index lists: one softmax over raw and compressed keys, with a sink."""

import torch

from dsv4_compile.lowerings.kv import is_packed, numbers
from dsv4_compile.lowerings.norm import DTYPES
from dsv4_compile.lowerings.rope import rope
from dsv4_compile.op import Cost, Tensor, acc, at_least, capability, compact, known, op


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
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    stored: int = 0,
) -> Tensor:
    """Multi-query attention whose keys are its values, each query reading the rows that its index lists name.

    q [B, T, h, d]; keys [B, S, d] with `window` [B, T, W] int64; optionally entries [B, E, d] with `index` [B, T, K] int64;
    -1 in a list is 'none'; sink [h] (at least fp32). Returns [B, T, h, d] of q's dtype, computed in at least fp32.

    With s = scale q . k: o = sum_j e^s_j k_j / (sum_j e^s_j + e^sink), or, `sink_on_window`, the sink added to the
    window's logits instead. Source: DeepSeek-V4, attention core. A query whose lists are all -1 gives 0 in the first form
    and is undefined in the second. With cos and sin [B, T, 1, dr/2], B or T of them possibly 1, the output is turned back:
    `rope(o, cos, sin, inverse=True)`; nobody has to round o to q's dtype before. With `stored` keys and entries are rows of
    bytes as `pack_kv` makes them, so many of their channels rotary.
    """
    if cos is not None and sin is not None:
        o = attention(q, keys, window, sink, entries, index, scale, sink_on_window, stored=stored)
        return rope(o, cos, sin, True)
    batch = torch.arange(q.shape[0], device=q.device).view(-1, 1, 1)
    rows = keys[batch, window.clamp(min=0)]
    W = window.shape[-1]
    if entries is not None and index is not None:
        rows = torch.cat([rows, entries[batch, index.clamp(min=0)]], 2)
        window = torch.cat([window, index], 2)
    rows = numbers(rows, q.shape[-1], stored).to(acc(q).dtype)
    s = acc(q) @ rows.transpose(-1, -2) * scale
    if sink_on_window:
        s = torch.cat([s[..., :W] + sink.unsqueeze(-1), s[..., W:]], -1)
    s = s.masked_fill((window < 0).unsqueeze(2), float("-inf"))
    if not sink_on_window:
        s = torch.cat([s, sink.unsqueeze(-1).expand(*s.shape[:-1], 1)], -1)
    p = torch.softmax(s, -1)
    return (p[..., : rows.shape[2]] @ rows).to(q.dtype)


@attention.cost
def _(B, T, h, d, W, K, dr, bytes):
    """bytes: of a row."""
    rows, q = B * T * (W + K), 2 * B * T * h * d
    return Cost(flops=4 * h * d * rows + 3 * B * T * h * dr, read=(bytes + 8) * rows + q + 4 * B * T * dr, write=q)


@attention.sizes
def _(a):
    B, T, h, d = a.q.shape
    K = 0 if a.index is None else a.index.shape[-1]
    bytes = a.keys.shape[-1] if is_packed(a.keys) else 2 * d
    return dict(B=B, T=T, h=h, d=d, W=a.window.shape[-1], K=K, dr=rotary(a), bytes=bytes)


def rotary(a) -> int:
    """Channels that are turned back."""
    return 0 if a.cos is None else 2 * a.cos.shape[-1]


@op("dsv4::dense_attention")
def dense_attention(
    q: Tensor,
    rows: Tensor,
    mask: Tensor,
    sink: Tensor,
    scale: float,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Tensor:
    """The same core over all rows, with a mask that is added to the logits: for masks that only the data knows.

    q [B, T, h, d]; rows [B, S, d]; mask [B, 1, T, S]; sink [h] (at least fp32); cos, sin as above. Returns [B, T, h, d] of
    q's dtype, computed in at least fp32. Source: DeepSeek-V4, attention core.
    """
    if cos is not None and sin is not None:
        return rope(dense_attention(q, rows, mask, sink, scale), cos, sin, True)
    k = acc(rows).unsqueeze(1)
    s = acc(q).transpose(1, 2) @ k.transpose(-1, -2) * scale + acc(mask)
    s = torch.cat([s, sink.view(1, -1, 1, 1).expand(*s.shape[:-1], 1)], -1)
    return (torch.softmax(s, -1)[..., :-1] @ k).transpose(1, 2).to(q.dtype)


@dense_attention.cost
def _(B, T, h, d, S, dr):
    q = 2 * B * T * h * d
    return Cost(
        flops=2 * q * S + 3 * B * T * h * dr,
        read=2 * B * S * d + 4 * B * T * (S + dr) + q,
        write=q,
    )


@dense_attention.sizes
def _(a):
    B, T, h, d = a.q.shape
    return dict(B=B, T=T, h=h, d=d, S=a.rows.shape[1], dr=rotary(a))


BLOCK = 1 << 18  # elements of gathered rows at a time: they stay in a core's L2 cache


def not_turned(a) -> bool | str:
    return same_batch(a) if a.cos is None else "turned back by loops that Inductor makes"


def same_batch(a) -> bool | str:
    """The plain case: lists and keys of one batch size."""
    return known(a.keys.shape[0] == a.q.shape[0]) or "q and keys differ in batch"


@attention.on("cpu", when=not_turned, worth=at_least(16, rows=lambda a: a.q.shape[0] * a.q.shape[1]))
def _(q, keys, window, sink, entries, index, scale, sink_on_window, cos, sin, stored):
    B, T, h, d = q.shape
    N, wide = B * T, acc(q).dtype
    lists = [(window, keys)] if index is None else [(window, keys), (index, entries)]
    sources = [(flat_rows(i, x), x.reshape(-1, x.shape[-1])) for i, x in lists]
    none = (torch.cat([i.reshape(N, -1) for i, _ in lists], 1) < 0).unsqueeze(1)  # [N, 1, W + K]
    q, sink, out = q.reshape(N, h, d), sink.to(wide).view(h, 1), torch.empty(N, h, d, dtype=q.dtype)
    W, columns = window.shape[-1], none.shape[-1]
    step = max(1, BLOCK // max(1, columns * d))
    for start in range(0, N, step):
        part = slice(start, start + step)
        q_n = q[part].to(wide) * scale
        picked = (x.index_select(0, i[part].view(-1)) for i, x in sources)
        rows = [numbers(x, d, stored).to(wide).view(len(q_n), -1, d) for x in picked]
        s = [torch.bmm(q_n, r.transpose(1, 2)) for r in rows]  # [n, h, W] and [n, h, K]
        if sink_on_window:
            s[0] += sink
        else:
            s.append(sink.expand(len(q_n), h, 1))
        p = torch.cat(s, 2)
        p[..., :columns].masked_fill_(none[part], float("-inf"))
        p = torch.softmax(p, -1)
        o = torch.bmm(p[..., :W], rows[0])
        if len(rows) > 1:
            o.baddbmm_(p[..., W:columns], rows[1])
        out[part] = o
    return out.view(B, T, h, d)


def flat_rows(index: Tensor, x: Tensor) -> Tensor:
    """index [B, T, W] into the rows of x [B, S, d] -> [B T, W] into those of x [B S, d]; -1 reads any row."""
    index = index.clamp(min=0)
    if len(x) > 1:
        index += torch.arange(len(x)).view(-1, 1, 1) * x.shape[1]
    return index.flatten(0, 1)


# On a GPU

LARGEST = 1024  # channels


def fits_the_kernel(a) -> bool | str:
    """What kernels/attention.py is written for, and kernels/attention_stored.py for rows in bytes."""
    if a.stored:
        return fits_in_bytes(a)
    if a.q.dtype not in DTYPES or any(x is not None and x.dtype != a.q.dtype for x in (a.keys, a.entries)):
        return "queries, keys and entries must be of one dtype, bfloat16 or float32"
    d, h = a.q.shape[-1], a.q.shape[2]
    if not isinstance(d, int) or not isinstance(h, int) or d > LARGEST:
        return f"heads of {d} channels: {LARGEST} at most"
    if any(i is not None and i.dtype != torch.int64 for i in (a.window, a.index)):
        return "lists must be int64"
    return same_batch(a)


def fits_in_bytes(a) -> bool | str:
    if a.q.dtype != torch.bfloat16 or any(x is not None and x.dtype != torch.uint8 for x in (a.keys, a.entries)):
        return "keys and entries in bytes are read by queries in bfloat16"
    d, h = a.q.shape[-1], a.q.shape[2]
    if d not in (256, 512) or a.stored != 64 or not isinstance(h, int) or (a.cos is not None and rotary(a) % 4):
        return f"rows in bytes of {d} channels, {a.stored} of them rotary: 256 or 512, and 64, are needed"
    if any(i is not None and i.dtype != torch.int64 for i in (a.window, a.index)):
        return "lists must be int64"
    return same_batch(a)


@attention.on("cuda", arch="sm_90+", when=fits_the_kernel)
def _(q, keys, window, sink, entries, index, scale, sink_on_window, cos=None, sin=None, stored=0):
    from dsv4_compile.kernels.attention import Shape, launch

    B, T, h, d = q.shape
    out = torch.empty(B, T, h, d, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    tables = [None if x is None else of_tokens(x, B, T) for x in (cos, sin)]
    shape = Shape(d, h, index is not None, sink_on_window, 0 if cos is None else 2 * cos.shape[-1])
    launch(
        shape,
        "bytes" if stored else DTYPES[q.dtype],
        capability(q.device) == (9, 0),
        compact(q.reshape(B * T, h, d)),
        rows_in_order(keys),
        compact(window.reshape(B * T, window.shape[-1])),
        None if entries is None else rows_in_order(entries),
        None if index is None else compact(index.reshape(B * T, index.shape[-1])),
        compact(sink.float()),
        *tables,
        out.view(B * T, h, d),
        scale,
        T,
    )
    return out


def rows_in_order(x: Tensor) -> Tensor:
    """x [B, S, d] with the rows of a request behind each other; requests may lie apart, as in a part of a cache."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else compact(x)


def of_tokens(table: Tensor, B: int, T: int) -> Tensor:
    """A table [B or 1, T or 1, 1, n] for heads as [B T or T, n] fp32: token b T + t reads its row modulo their number."""
    lead = B if table.shape[0] > 1 else 1
    return compact(table.expand(lead, T, 1, table.shape[-1]).reshape(lead * T, -1).float())
