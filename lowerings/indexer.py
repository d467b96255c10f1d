"""The lightning indexer: which compressed entries each query reads."""

from functools import reduce

import torch
import torch.nn.functional as F

from dsv4_compile.lowerings.attention import of_tokens, rotary
from dsv4_compile.lowerings.norm import DTYPES
from dsv4_compile.lowerings.rope import rope
from dsv4_compile.op import Cost, Tensor, acc, at_least, compact, known, op

BLOCK = 1 << 18  # scores of single heads at a time: they stay in a core's L2 cache


@op("dsv4::indexer")
def indexer(
    q: Tensor,
    keys: Tensor,
    w: Tensor,
    visible: Tensor,
    k: int,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """The k entries with the best sum_h w[h] relu(q[h] . key), among those that a query may see; -1 where there are fewer.

    q [B, T, h, d], keys [B, E, d], w [B, T, h] (up to a positive factor of all), visible [B or 1, T] integers: entries 0 to
    visible - 1 may be seen; k <= E. Scores are in at least fp32. Returns [B, T, k] int64, a set: its order says nothing.
    Where equal scores compete for the last places, torch.topk chooses in the meaning, the lower entry wins elsewhere.
    With cos and sin [B, T, 1, dr/2], B or T of them possibly 1, the queries are turned first: `rope(q, cos, sin)`.
    scale [B, E, 1], positive: keys are multiplied by it, as those stored in e4m3 are; it may multiply the scores instead.
    Source: DeepSeek-V4, indexer.
    """
    if cos is not None and sin is not None:
        return indexer(rope(q, cos, sin, False), keys, w, visible, k, None, None, scale)
    wide = acc(q).dtype
    read = acc(keys) if scale is None else keys.to(wide) * scale.to(wide)
    s = F.relu(acc(q) @ read.mT.unsqueeze(1))
    score = (s * acc(w).unsqueeze(-1)).sum(-2)
    seen = visible.unsqueeze(-1)
    entry = torch.arange(score.shape[-1], device=q.device)
    pick = score.masked_fill(entry >= seen, float("-inf")).topk(k, -1).indices
    return torch.where(pick < seen, pick, -1)


@indexer.cost
def _(B, T, h, d, E, k, bits):
    """bits: of a number in a key, its share of a scale included."""
    scores = B * T * E
    read = 2 * B * T * h * d + B * E * d * bits / 8 + 4 * B * T * h + 8 * B * T
    return Cost(flops=scores * h * (2 * d + 3) + scores, read=read, write=8 * B * T * k)


@indexer.sizes
def _(a):
    B, T, h, d = a.q.shape
    bits = 16 if a.scale is None else 8 + 8 * a.scale.dtype.itemsize / d
    return dict(B=B, T=T, h=h, d=d, E=a.keys.shape[1], bits=bits)


def not_turned(a) -> bool | str:
    return a.cos is None or "turned by loops that Inductor makes"


@indexer.on("cpu", when=not_turned, worth=at_least(16, rows=lambda a: a.q.shape[0] * a.q.shape[1]))
def _(q, keys, w, visible, k, cos=None, sin=None, scale=None):
    """A block of queries at a time, and of the entries only those that some query of the block sees; no score at all where
    they fit into the list. 512 queries, 8 heads of 32, 512 entries, k = 64, one core: 6 ms against 54 in eager PyTorch, which
    copies the keys for every query, and 21 compiled."""
    B, T, h, d = q.shape
    keys = keys if scale is None else keys.to(scale.dtype) * scale
    wide = reduce(torch.promote_types, (acc(x).dtype for x in (q, keys, w)))
    out, place = torch.empty(B, T, k, dtype=torch.int64), torch.arange(k)
    for b in range(B):
        seen = visible[b % len(visible)].unsqueeze(-1)  # [T, 1]
        ends = seen.flatten().clamp(max=keys.shape[1]).tolist()
        step = max(1, BLOCK // max(1, h * max(ends, default=1)))
        for t in range(0, T, step):
            part, most = slice(t, t + step), max(ends[t : t + step])
            if most <= k:
                out[b, part] = torch.where(place < seen[part], place, -1)
                continue
            s = (q[b, part].to(wide).reshape(-1, d) @ keys[b, :most].to(wide).t()).relu_()
            score = torch.bmm(w[b, part].to(wide).unsqueeze(1), s.view(-1, h, most)).squeeze(1)
            score.masked_fill_(torch.arange(most) >= seen[part], float("-inf"))
            pick = best(score, k)
            out[b, part] = torch.where(pick < seen[part], pick, -1)
    return out


def best(score: Tensor, k: int) -> Tensor:
    """The k largest of more, a row at a time; of equal ones at the end of the list the lower entries."""
    value, pick = score.topk(k + 1, -1)
    tied = (value[:, k - 1] == value[:, k]) & (value[:, k] > float("-inf"))
    pick = pick[:, :k]
    if bool(tied.any()):
        pick = pick.clone()
        pick[tied] = score[tied].sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return pick


# On a GPU

LARGEST = 319488  # entries for which the kernel has room
KEYS = {(torch.bfloat16, None): "bf16", (torch.float8_e4m3fn, torch.float32): "fp8"}  # and their scales


def stored_as(keys: Tensor, scale: Tensor | None) -> tuple[torch.dtype, torch.dtype | None]:
    return keys.dtype, None if scale is None else scale.dtype


def fits_the_kernel(a) -> bool | str:
    """What kernels/indexer.py is written for."""
    if a.q.dtype != torch.bfloat16 or a.w.dtype not in DTYPES:
        return "queries must be bfloat16, weights bfloat16 or float32"
    if stored_as(a.keys, a.scale) not in KEYS:
        return "keys must be bfloat16, or float8_e4m3fn with scales in float32"
    h, d = a.q.shape[2:]
    if not isinstance(h, int) or not isinstance(d, int) or h > 64 or d % 32 or d > 128:
        return f"{h} heads of {d} channels: at most 64 of 32, 64, 96 or 128"
    if a.scale is not None and d % 64:
        return f"keys of {d} channels in float8_e4m3fn: 64 or 128 are needed"
    if rotary(a) % 8:
        return f"{rotary(a)} channels are turned: a multiple of 8 is needed"
    return known(a.keys.shape[1] <= LARGEST) or f"more than {LARGEST} entries, or nobody knows how many"


@indexer.on("cuda", arch="sm_90+", when=fits_the_kernel)
def _(q, keys, w, visible, k, cos=None, sin=None, scale=None):
    """The entries in ascending order, -1 at the end; of equal scores at the end of the list the lower entries."""
    from dsv4_compile.kernels.indexer import Shape, launch

    B, T, h, d = q.shape
    out = torch.empty(B, T, k, dtype=torch.int64, device=q.device)
    if out.numel():
        vector = 16 // keys.dtype.itemsize
        in_place = keys.stride(2) == 1 and keys.stride(1) == d and keys.stride(0) % vector == 0
        rows = keys if in_place else compact(keys)
        shape = Shape(h, d, DTYPES[w.dtype], 0 if cos is None else 2 * cos.shape[-1], KEYS[stored_as(keys, scale)])
        launch(
            shape,
            compact(q.reshape(B * T, h, d)),
            rows if scale is None else rows.view(torch.uint8),
            None if scale is None else of_entries(scale),
            compact(w.reshape(B * T, h)),
            compact(visible.reshape(-1).long()),
            None if cos is None else of_tokens(cos, B, T),
            None if sin is None else of_tokens(sin, B, T),
            out.view(B * T, k),
            T,
        )
    return out


def of_entries(scale: Tensor) -> Tensor:
    """[B, E, 1] -> [B, E], those of a sequence in a row."""
    flat = scale.squeeze(-1)
    return flat if flat.stride(1) == 1 else compact(flat)
