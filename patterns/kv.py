"""Rows of keys in bytes, made and read."""

import torch

from dsv4_compile.lowerings.kv import layout, pack_kv, unpack_kv
from dsv4_compile.match import Match, T, known, rule

# 36 channels, 6 of them rotary; 3 blocks of 10; 50 bytes.
D, ROPE, BLOCKS, BLOCK, ZEROS = 36, 6, 3, 10, 5
SIZE = D + ROPE + BLOCKS + ZEROS


def laid_out(match: Match, size: object) -> bool | str:
    """Whether blocks are as the ops have them."""
    width, plain, blocks, block = (match.sizes[n] for n in (D, D - ROPE, BLOCKS, BLOCK))
    match.arguments["rope"] = rope = match.sizes[2 * ROPE] // 2
    if not (isinstance(width, int) and isinstance(rope, int) and plain + rope == width):
        return "channels without a position, then rotary ones"
    return known((blocks, block, size) == layout(width, rope)) or f"blocks as {layout(width, rope)} has them"


def packed(match: Match) -> bool | str:
    return laid_out(match, match.sizes[SIZE])


def unpacked(match: Match) -> bool | str:
    match.arguments["width"] = match.sizes[D]
    return laid_out(match, match.sizes[SIZE])


@rule(pack_kv, name="raise.kv", anchor="amax", example=dict(x=T(7, 13, D)), check=packed, any_rank=True)
def pack(x):
    plain = x[..., : D - ROPE].unflatten(-1, (BLOCKS, BLOCK))
    bits = (plain.abs().amax(-1, keepdim=True).float().clamp(min=1e-4) / 448.0).view(torch.int32)
    exponent = (((bits - 1) >> 23) + 1).clamp(max=255)
    codes = (plain / (exponent << 23).view(torch.float32)).to(torch.float8_e4m3fn).view(torch.uint8)
    turned = x[..., D - ROPE :].to(torch.bfloat16).contiguous().view(torch.uint8)
    zeros = torch.zeros(*x.shape[:-1], ZEROS, dtype=torch.uint8, device=x.device)
    return torch.cat([codes.flatten(-2), turned, exponent.squeeze(-1).to(torch.uint8), zeros], -1)


@rule(
    unpack_kv,
    name="raise.kv",
    anchor="__lshift__",
    example=dict(rows=T(7, 13, SIZE, dtype=torch.uint8)),
    check=unpacked,
    any_rank=True,
)
def unpack(rows):
    codes, turned = rows[..., : D - ROPE], rows[..., D - ROPE : D + ROPE]
    exponent = rows[..., D + ROPE :][..., :BLOCKS]
    scale = (exponent.int() << 23).view(torch.float32).unsqueeze(-1)
    plain = codes.view(torch.float8_e4m3fn).unflatten(-1, (BLOCKS, BLOCK)).float() * scale
    return torch.cat([plain.flatten(-2), turned.view(torch.bfloat16).float()], -1)
