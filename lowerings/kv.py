"""Rows of keys in bytes: channels without a position in e4m3 with e8m0 scales, rotary ones in bf16."""

import math

import torch

from dsv4_compile.op import Cost, Tensor, op

# Nobody runs these alone: what no larger op takes up is inlined back.

FP8_MAX = 448.0
BLOCK, ALIGNMENT = 64, 16  # channels that share a scale; bytes that a row is a multiple of
LEAST = 1e-4  # the largest magnitude of a block counts as at least this


def layout(width: int, rope: int) -> tuple[int, int, int]:
    """Of rows of `width` channels, the last `rope` rotary: blocks, channels of a block, bytes of a row."""
    block = math.gcd(width - rope, BLOCK)
    blocks = (width - rope) // block
    return blocks, block, -(-(width + rope + blocks) // ALIGNMENT) * ALIGNMENT


@op("dsv4::pack_kv")
def pack_kv(x: Tensor, rope: int) -> Tensor:
    """Rows x [..., d] -> uint8 [..., bytes]: d - rope codes e4m3; `rope` numbers in bf16; for each block of 64 codes (the
    largest power of two that divides them, if 64 does not) the byte of its e8m0 scale; zeros up to a multiple of 16.

    A scale is the least power of two with which the block's largest magnitude, or 1e-4, fits. Source: DeepSeek-V4, KV cache
    schema, FP8 (where the scales stand at the end of a page).
    """
    blocks, block, size = layout(x.shape[-1], rope)
    plain, turned = x[..., :-rope], x[..., -rope:]
    plain = plain.unflatten(-1, (blocks, block))
    bits = (plain.abs().amax(-1, keepdim=True).float().clamp(min=LEAST) / FP8_MAX).view(torch.int32)
    exponent = (((bits - 1) >> 23) + 1).clamp(max=255)
    codes = (plain / (exponent << 23).view(torch.float32)).to(torch.float8_e4m3fn).view(torch.uint8)
    turned = turned.to(torch.bfloat16).contiguous().view(torch.uint8)
    zeros = torch.zeros(*x.shape[:-1], size - x.shape[-1] - rope - blocks, dtype=torch.uint8, device=x.device)
    return torch.cat([codes.flatten(-2), turned, exponent.squeeze(-1).to(torch.uint8), zeros], -1)


@op("dsv4::unpack_kv")
def unpack_kv(rows: Tensor, width: int, rope: int) -> Tensor:
    """The opposite of `pack_kv`: rows uint8 [..., bytes] -> fp32 [..., width], all of them numbers that bf16 has."""
    blocks, block, _ = layout(width, rope)
    codes, turned = rows[..., : width - rope], rows[..., width - rope : width + rope]
    exponent = rows[..., width + rope :][..., :blocks]
    scale = (exponent.int() << 23).view(torch.float32).unsqueeze(-1)
    plain = codes.view(torch.float8_e4m3fn).unflatten(-1, (blocks, block)).float() * scale
    return torch.cat([plain.flatten(-2), turned.view(torch.bfloat16).float()], -1)


@pack_kv.cost
def _(N, d, bytes):
    return Cost(flops=4 * N * d, read=2 * N * d, write=N * bytes)


@pack_kv.sizes
def _(a):
    *lead, d = a.x.shape
    return dict(N=math.prod(lead), d=d, bytes=layout(d, a.rope)[-1])


@unpack_kv.cost
def _(N, d, bytes):
    return Cost(flops=N * d, read=N * bytes, write=4 * N * d)


@unpack_kv.sizes
def _(a):
    *lead, size = a.rows.shape
    return dict(N=math.prod(lead), d=a.width, bytes=size)


def is_packed(rows: Tensor | None) -> bool:
    return rows is not None and rows.dtype == torch.uint8


def in_whole_blocks(width: int, rope: int) -> bool | str:
    """What kernels write."""
    whole = width % 8 == 0 and rope % 8 == 0 and width > rope > 0 and (width - rope) % BLOCK == 0
    return whole or f"rows in bytes of {width} channels, {rope} of them rotary: whole blocks of {BLOCK} are needed"


def rows_for(cache: Tensor, x: Tensor, rope: int) -> Tensor:
    """x as rows of this cache: in bytes or in its dtype."""
    return pack_kv.meaning(x, rope) if is_packed(cache) else x.to(cache.dtype)


def numbers(rows: Tensor, width: int, rope: int) -> Tensor:
    """What rows of a cache stand for."""
    return unpack_kv.meaning(rows, width, rope) if is_packed(rows) else rows
