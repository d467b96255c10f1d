"""The attention core: gather rows by index lists, one softmax with a sink, weighted sum of the same rows.

Hugging Face has all rows and a dense mask. Where the mask is one that lists can say, it becomes the same op.
"""

import torch

from dsv4_compile.lowerings.attention import attention, dense_attention
from dsv4_compile.lowerings.kv import unpack_kv
from dsv4_compile.lowerings.pointwise import softmax
from dsv4_compile.match import Int, Made, Match, Scalar, T, rule, shape
from dsv4_compile.patterns.masks import between, index_lists, without_head

LIST = torch.int64
QUERY = dict(q=T(3, 5, 6, 7), keys=T(3, 11, 7), window=T(3, 5, 13, dtype=LIST), sink=T(6))
ENTRIES = dict(entries=T(3, 17, 7), index=T(3, 5, 19, dtype=LIST))


def take(x, index):
    batch = torch.arange(x.shape[0], device=x.device).view(-1, 1, 1)
    return x[batch, index.clamp(min=0)]


def logits(q, rows, window, scale):
    return q @ rows.transpose(-1, -2) * scale


def with_sink(s, sink):
    """The sink as one more logit, whose probability goes nowhere."""
    s = torch.cat([s, sink.unsqueeze(-1).expand(*s.shape[:-1], 1)], -1)
    return torch.softmax(s, -1)[..., :-1]


def on_window(s, sink, W):
    return torch.cat([s[..., :W] + sink.unsqueeze(-1), s[..., W:]], -1)


def absent(s, lists):
    return s.masked_fill((lists < 0).unsqueeze(2), float("-inf"))


def both(keys, window, entries, index):
    """Rows of both lists, and the lists, in one."""
    return torch.cat([take(keys, window), take(entries, index)], 2), torch.cat([window, index], 2)


def weighted(q, rows, lists, sink, scale):
    return with_sink(absent(logits(q, rows, lists, scale), lists), sink) @ rows


def weighted_on_window(q, rows, lists, sink, W, scale):
    s = on_window(logits(q, rows, lists, scale), sink, W)
    return torch.softmax(absent(s, lists), -1) @ rows


SHARED = ("aten.clamp_min", "aten.lt", "aten.cat", "aten.full")  # of index lists, which layers have in common


def declare(match: Match, sink_on_window: bool) -> bool | str:
    a = match.arguments
    a.setdefault("entries", None)
    a.setdefault("index", None)
    a["sink_on_window"] = sink_on_window
    return len(shape(a["q"])) == 4 or "q is not [B, T, h, d]"


def denominator(match: Match) -> bool | str:
    return declare(match, False)


def swa_scale(match: Match) -> bool | str:
    return declare(match, True)


@rule(attention, name="fuse.attention", anchor=softmax, example=QUERY, check=denominator, shared=SHARED)
def window_only(q, keys, window, sink, scale: Scalar):
    return weighted(q, take(keys, window), window, sink, scale)


@rule(attention, name="fuse.attention", anchor=softmax, example=QUERY | ENTRIES, check=denominator, shared=SHARED)
def window_and_entries(q, keys, window, entries, index, sink, scale: Scalar):
    rows, lists = both(keys, window, entries, index)
    return weighted(q, rows, lists, sink, scale)


@rule(attention, name="fuse.attention", anchor=softmax, example=QUERY, check=swa_scale, shared=SHARED)
def window_only_scaled(q, keys, window, sink, scale: Scalar):
    return weighted_on_window(q, take(keys, window), window, sink, window.shape[-1], scale)


@rule(attention, name="fuse.attention", anchor=softmax, example=QUERY | ENTRIES, check=swa_scale, shared=SHARED)
def window_and_entries_scaled(q, keys, window, entries, index, sink, scale: Scalar):
    rows, lists = both(keys, window, entries, index)
    return weighted_on_window(q, rows, lists, sink, window.shape[-1], scale)


# Rows in bytes: 48 of 36 channels, 4 of them rotary.
IN_BYTES = dict(q=T(3, 5, 6, 36), keys=T(3, 11, 48, dtype=torch.uint8), width=36, stored=4)
ENTRIES_IN_BYTES = ENTRIES | dict(entries=T(3, 17, 48, dtype=torch.uint8))


def stored_denominator(match: Match) -> bool | str:
    del match.arguments["width"]
    return declare(match, False)


def stored_swa_scale(match: Match) -> bool | str:
    del match.arguments["width"]
    return declare(match, True)


@rule(
    attention,
    name="fuse.attention",
    anchor=softmax,
    example=QUERY | IN_BYTES,
    check=stored_denominator,
    shared=SHARED,
)
def stored_window_only(q, keys, window, sink, width: Int, stored: Int, scale: Scalar):
    return weighted(q, unpack_kv(take(keys, window), width, stored), window, sink, scale)


@rule(
    attention,
    name="fuse.attention",
    anchor=softmax,
    example=QUERY | IN_BYTES | ENTRIES_IN_BYTES,
    check=stored_denominator,
    shared=SHARED,
)
def stored_window_and_entries(q, keys, window, entries, index, sink, width: Int, stored: Int, scale: Scalar):
    rows, lists = both(keys, window, entries, index)
    return weighted(q, unpack_kv(rows, width, stored), lists, sink, scale)


@rule(
    attention,
    name="fuse.attention",
    anchor=softmax,
    example=QUERY | IN_BYTES,
    check=stored_swa_scale,
    shared=SHARED,
)
def stored_window_only_scaled(q, keys, window, sink, width: Int, stored: Int, scale: Scalar):
    rows = unpack_kv(take(keys, window), width, stored)
    return weighted_on_window(q, rows, window, sink, window.shape[-1], scale)


@rule(
    attention,
    name="fuse.attention",
    anchor=softmax,
    example=QUERY | IN_BYTES | ENTRIES_IN_BYTES,
    check=stored_swa_scale,
    shared=SHARED,
)
def stored_window_and_entries_scaled(q, keys, window, entries, index, sink, width: Int, stored: Int, scale: Scalar):
    rows, lists = both(keys, window, entries, index)
    return weighted_on_window(q, unpack_kv(rows, width, stored), lists, sink, window.shape[-1], scale)


# Rows with an axis for the one head, and as a cache without it has them.
DENSE = [dict(q=T(3, 6, 5, 7), rows=rows, mask=T(3, 1, 5, 11), sink=T(6)) for rows in (T(3, 1, 11, 7), T(3, 11, 7))]


def of_all_rows(q, rows, mask, sink, scale):
    B, h, T, _ = q.shape
    rows = rows if rows.dim() == 4 else rows.unsqueeze(1)
    k = rows.unsqueeze(2).expand(-1, -1, h, -1, -1).reshape(B, h, *rows.shape[2:])
    s = torch.matmul(q, k.transpose(2, 3)) * scale + mask
    s = torch.cat([s, sink.view(1, -1, 1, 1).expand(B, -1, T, -1)], -1)
    p = torch.softmax(s - s.max(-1, keepdim=True).values, -1)[..., :-1]
    return torch.matmul(p, k).transpose(1, 2)


def heads_inside(q):
    return q.transpose(1, 2)


def listed(match: Match) -> bool | str:
    a = match.arguments
    rows, mask = a.pop("rows"), a.pop("mask")
    lists = index_lists(a["q"], rows, mask)
    if isinstance(lists, str):
        return lists
    match.inner = (*match.inner, *between((rows, mask), lists))  # it is known of them what they compute
    a |= lists | {"q": Made(heads_inside, (a["q"],)), "sink_on_window": False}
    return True


def dense(match: Match) -> bool:
    a = match.arguments
    a |= {"q": Made(heads_inside, (a["q"],)), "rows": Made(without_head, (a["rows"],))}
    return True


@rule(attention, name="fuse.attention", anchor=softmax, example=DENSE, check=listed)
def masked_by_lists(q, rows, mask, sink, scale: Scalar):
    return of_all_rows(q, rows, mask, sink, scale)


@rule(dense_attention, name="fuse.attention", anchor=softmax, example=DENSE, check=dense)
def masked(q, rows, mask, sink, scale: Scalar):
    return of_all_rows(q, rows, mask, sink, scale)
