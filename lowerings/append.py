"""Rows written into a cache; alone, and as the end of the whole prologue of the keys."""

import math

import torch

from dsv4_compile.lowerings.kv import in_whole_blocks, is_packed, rows_for
from dsv4_compile.lowerings.norm import DTYPES, norm_into
from dsv4_compile.lowerings.rope import fits_with_rope, norm_rope
from dsv4_compile.op import Cost, Tensor, left_to_inductor, op


@op("dsv4::append")
def append(ring: Tensor, slot: Tensor, rows: Tensor) -> Tensor:
    """The cache after a write: ring [B, S, C] with rows [B, T, C], cast to its dtype, at slot [B, T] int64. The slots of one
    call are distinct. Implementations write where the ring lies; the caller's ring changes only if nobody else reads it.
    Source: DeepSeek-V4, generation state.
    """
    batch = torch.arange(ring.shape[0], device=ring.device).unsqueeze(1)
    return ring.index_put((batch, slot), rows.to(ring.dtype))


@append.cost
def _(B, T, C, bits):
    return Cost(flops=0, read=B * T * (C * bits / 8 + 8), write=B * T * C * bits / 8)


@append.sizes
def _(a):
    B, T, C = a.rows.shape
    return dict(B=B, T=T, C=C, bits=8 * a.ring.dtype.itemsize)


@append.on("cpu", in_place="ring", worth=left_to_inductor)
def _(ring, slot, rows):
    batch = torch.arange(len(ring)).unsqueeze(1)
    ring[batch, slot] = rows.to(ring.dtype)


@op("dsv4::norm_rope_append")
def norm_rope_append(
    ring: Tensor, slot: Tensor, x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor
) -> Tensor:
    """All that happens to the keys of a decode step behind their matrix: `norm_rope`, then `append`.

    ring [B, S, d], slot [B, T] int64, not negative, taken modulo S, so that it may be the tokens' positions, x [B, T, d],
    weight [d] or None, cos and sin [B, T, dr/2], B of them possibly 1 -> the ring [B, S, d]. A ring of uint8 takes rows in
    bytes, as `pack_kv` makes them. Source: DeepSeek-V4, attention.
    """
    return append(ring, slot % ring.shape[1], rows_for(ring, norm_rope(x, weight, eps, cos, sin), 2 * cos.shape[-1]))


@norm_rope_append.cost
def _(N, P, d, dr, bytes):
    """bytes: of a row of the ring."""
    return Cost(flops=4 * N * d + 3 * N * dr, read=2 * N * d + 4 * d + 4 * P * dr + 8 * N, write=N * bytes)


@norm_rope_append.sizes
def _(a):
    *lead, d = a.x.shape
    tables = dict(P=math.prod(a.cos.shape[:-1]), dr=2 * a.cos.shape[-1])
    return dict(N=math.prod(lead), d=d, bytes=a.ring.shape[-1] * a.ring.dtype.itemsize, **tables)


@norm_rope_append.on("cpu", in_place="ring", worth=left_to_inductor)
def _(ring, slot, x, weight, eps, cos, sin):
    batch = torch.arange(len(ring)).unsqueeze(1)
    ring[batch, slot % ring.shape[1]] = rows_for(ring, norm_rope(x, weight, eps, cos, sin), 2 * cos.shape[-1])


def fits_with_cache(a) -> bool | str:
    if a.slot.dtype != torch.int64 or not (a.ring.dtype in DTYPES or is_packed(a.ring)):
        return "the cache must be bfloat16, float32 or rows in bytes, slots int64"
    if is_packed(a.ring) and (verdict := in_whole_blocks(a.x.shape[-1], 2 * a.cos.shape[-1])) is not True:
        return verdict
    return fits_with_rope(a)


@norm_rope_append.on("cuda", arch="sm_90+", in_place="ring", when=fits_with_cache)
def _(ring, slot, x, weight, eps, cos, sin):
    norm_into(ring, slot, x, weight, eps, cos, sin)
