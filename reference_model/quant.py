"""Block-quantised weights: FP8 (e4m3, 128 x 128 blocks), MXFP4 and NVFP4 (e2m1, 32 and 16 columns a block).

`dequantize` and `quantize` are plain PyTorch without branches on values, so they trace, and run on the meta device.
`dequantize` is what a compiler sees in front of every quantised matmul: it has no table, since a table would be a
constant copied to the device at every call, which CUDA graphs forbid; e2m1 is decoded by arithmetic instead.
Source: DeepSeek-V4, Checkpoints.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

FP8_BLOCK = 128  # rows and columns
MXFP4_BLOCK, NVFP4_BLOCK = 32, 16  # columns
FP8_MAX, FP4_MAX = 448.0, 6.0
MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # between the neighbours of 0 0.5 1 1.5 2 3 4 6


def dequantize(
    weight: Tensor, scale: Tensor | None = None, scale_2: Tensor | None = None, format: str = "none"
) -> Tensor:
    """Stored weight -> fp32 [..., N, K]; with format "none" the weight itself, in its own dtype.

    fp8: weight e4m3 [..., N, K], scale e8m0 or fp32 [..., ceil(N/128), ceil(K/128)].
    mxfp4: weight uint8 [..., N, K/2], the low nibble is the even column, scale e8m0 [..., N, K/32].
    nvfp4: weight as mxfp4, scale e4m3 [..., N, K/16], scale_2 fp32 [...].
    All scales multiply; the e8m0 byte 255 is NaN.
    """
    if format == "none":
        return weight
    assert scale is not None, f"format {format!r} needs a scale"
    if format == "fp8":
        row, column = (_block(n, weight.device) for n in weight.shape[-2:])
        return weight.float() * scale.float()[..., row.unsqueeze(-1), column]
    value = _e2m1(weight).unflatten(-1, (scale.shape[-1], -1)) * scale.float().unsqueeze(-1)
    if format == "mxfp4":
        return value.flatten(-2)
    if format == "nvfp4":
        assert scale_2 is not None, "format 'nvfp4' needs a scale_2"
        return value.flatten(-2) * scale_2[..., None, None]
    raise ValueError(f"format {format!r}: expected 'none', 'fp8', 'mxfp4' or 'nvfp4'")


def _block(n: int, device: torch.device) -> Tensor:
    """The FP8 block of each of n rows or columns. In floats: Inductor (torch 2.13) simplifies integer indices of blocks
    that n cuts short, by // or repeat_interleave, to wrong addresses."""
    return (torch.arange(n, dtype=torch.float32, device=device) / FP8_BLOCK).floor().long()


def _e2m1(packed: Tensor) -> Tensor:
    """Two codes a byte, uint8 [..., K/2] -> fp32 [..., K].

    The magnitudes 0 0.5 1 1.5 2 3 4 6 grow ever faster with the code m: they are the upper envelope of three lines.
    """
    code = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
    m = (code & 7).float()
    magnitude = torch.maximum(torch.maximum(m * 0.5, m - 2), m * 2 - 8)
    return torch.where(code > 7, -magnitude, magnitude)


def quantize(weight: Tensor, format: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Float weight [..., N, K] -> (weight, scale, scale_2) as `dequantize` takes them; what a format lacks is None.

    Power-of-two scales are the least with which the block's largest magnitude fits (fp8 amax/448, mxfp4 amax/6); nvfp4
    has scale_2 = amax/2688 of the matrix and e4m3 block scales amax/6/scale_2.  Codes round to nearest, ties to
    even.  RMS error on Gaussian weights: fp8 2.7 %, mxfp4 11.6 %, nvfp4 9.5 %.  A block with a NaN or an infinity, and
    for nvfp4 its matrix, becomes NaN.
    Raises ValueError where K is no multiple of the block of a 4-bit format.
    """
    if format == "none":
        return weight, None, None
    if format not in ("fp8", "mxfp4", "nvfp4"):
        raise ValueError(f"format {format!r}: expected 'none', 'fp8', 'mxfp4' or 'nvfp4'")
    rows, columns = weight.shape[-2:]
    block = {"fp8": 1, "mxfp4": MXFP4_BLOCK, "nvfp4": NVFP4_BLOCK}[format]
    if columns % block:
        raise ValueError(f"{format} needs a multiple of {block} columns, got {columns}: choose format 'none' or 'fp8'")
    if weight.is_meta:
        return _empty(weight, format)
    w = weight.float()
    if format == "fp8":
        blocks = F.pad(w, (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK))
        blocks = blocks.unflatten(-1, (-1, FP8_BLOCK)).unflatten(-3, (-1, FP8_BLOCK))  # [..., R, 128, C, 128]
        scale = _power_of_two(blocks.abs().amax((-3, -1)), FP8_MAX)
        spread = scale.float().repeat_interleave(FP8_BLOCK, -2).repeat_interleave(FP8_BLOCK, -1)[..., :rows, :columns]
        return (w / spread).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale, None
    blocks = w.unflatten(-1, (-1, block))  # [..., N, K/block, block]
    amax = blocks.abs().amax(-1)
    if format == "mxfp4":
        scale = _power_of_two(amax, FP4_MAX)
        return _pack_e2m1(blocks / scale.float().unsqueeze(-1)), scale, None
    least = 2.0**-9  # smallest e4m3, so that an empty block divides by something
    scale_2 = (amax.amax((-2, -1)) / (FP4_MAX * FP8_MAX)).clamp(min=torch.finfo(torch.float32).tiny)
    scale = (amax / FP4_MAX / scale_2[..., None, None]).clamp(least, FP8_MAX).to(torch.float8_e4m3fn)
    whole = scale.float() * scale_2[..., None, None]
    return _pack_e2m1(blocks / whole.unsqueeze(-1)), scale, scale_2


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows x [..., d] -> codes e4m3 [..., d] and a scale for each row, fp32 [..., 1]: what a cache of keys holds, d + 4 bytes.

    The scale is the least power of two with which the row's largest magnitude fits (amax / 448 rounded up, as e8m0 has
    it, at least 2^-100). By a power of two products are exact: code times scale is a bf16 number, so scores are those of
    bf16 keys with these values, to the bit, whether keys or scores are multiplied. Rounding up costs nothing but range:
    e4m3 steps by the same share of a number at any scale. RMS error on Gaussian rows: 2.7 %.
    """
    amax = x.abs().amax(-1, keepdim=True).float()
    bits = (amax / FP8_MAX).clamp(min=2.0**-100).view(torch.int32)
    scale = ((bits + 0x7FFFFF) & -0x800000).view(torch.float32)  # up to the next exponent, no mantissa
    return (x / scale).to(torch.float8_e4m3fn), scale


def dequantize_rows(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The opposite of `quantize_rows`, in `dtype`, which bf16 suffices for."""
    return codes.to(dtype) * scale.to(dtype)


# Rows of a cache of keys whose last channels carry a position: DeepSeek-V4, KV cache schema, FP8.
KV_BLOCK, ALIGNMENT = 64, 16  # channels that share a scale; bytes that a row is a multiple of
LEAST_KV = 1e-4  # the largest magnitude of a block counts as at least this


def kv_layout(width: int, rope: int) -> tuple[int, int, int]:
    """Of rows of `width` channels, the last `rope` rotary: blocks, channels of a block, bytes of a row. Where 64 does not
    divide the others, a block is the largest power of two that does."""
    block = math.gcd(width - rope, KV_BLOCK)
    blocks = (width - rope) // block
    return blocks, block, -(-(width + rope + blocks) // ALIGNMENT) * ALIGNMENT


def pack_kv(x: Tensor, rope: int) -> Tensor:
    """Rows x [..., d] -> uint8 [..., bytes] as `kv_layout` has them: d - rope codes e4m3; `rope` numbers in bf16; for each
    block of codes the byte of its e8m0 scale; zeros. Of the published models: 448 + 128 + 7 + 9 = 592 bytes for 1,024.

    The bytes that FlashMLA reads, but its scales stand at the end of a page: here a row is one piece that every reader can
    have, aligned for copies of 16 bytes, an odd number of which lies in shared memory without conflicts of banks. The
    scale is the least power of two with which the block's largest magnitude fits, and products with it are exact.
    """
    blocks, block, size = kv_layout(x.shape[-1], rope)
    plain, turned = x[..., :-rope], x[..., -rope:]
    plain = plain.unflatten(-1, (blocks, block))
    bits = (plain.abs().amax(-1, keepdim=True).float().clamp(min=LEAST_KV) / FP8_MAX).view(torch.int32)
    exponent = (((bits - 1) >> 23) + 1).clamp(max=255)  # rounded up; of what is not finite 255, which is none
    codes = (plain / (exponent << 23).view(torch.float32)).to(torch.float8_e4m3fn).view(torch.uint8)
    turned = turned.to(torch.bfloat16).contiguous().view(torch.uint8)
    zeros = torch.zeros(*x.shape[:-1], size - x.shape[-1] - rope - blocks, dtype=torch.uint8, device=x.device)
    return torch.cat([codes.flatten(-2), turned, exponent.squeeze(-1).to(torch.uint8), zeros], -1)


def unpack_kv(rows: Tensor, width: int, rope: int) -> Tensor:
    """The opposite of `pack_kv`, fp32; bf16 would suffice."""
    blocks, block, _ = kv_layout(width, rope)
    codes, turned = rows[..., : width - rope], rows[..., width - rope : width + rope]
    exponent = rows[..., width + rope :][..., :blocks]
    scale = (exponent.int() << 23).view(torch.float32).unsqueeze(-1)
    plain = codes.view(torch.float8_e4m3fn).unflatten(-1, (blocks, block)).float() * scale
    return torch.cat([plain.flatten(-2), turned.view(torch.bfloat16).float()], -1)


def stored_as(cache: Tensor | None, x: Tensor, rope: int) -> Tensor:
    """x as this cache holds rows: bytes, or numbers of any dtype."""
    return x if cache is None or cache.dtype != torch.uint8 else pack_kv(x, rope)


def _empty(weight: Tensor, format: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """What `quantize` would return, without computing it: Pro on the meta device takes 3 s instead of 10."""
    *stack, rows, columns = weight.shape
    if format == "fp8":
        grid = (*stack, -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
        return weight.to(torch.float8_e4m3fn), weight.new_empty(grid, dtype=torch.float8_e8m0fnu), None
    packed = weight.new_empty((*stack, rows, columns // 2), dtype=torch.uint8)
    if format == "mxfp4":
        grid = (*stack, rows, columns // MXFP4_BLOCK)
        return packed, weight.new_empty(grid, dtype=torch.float8_e8m0fnu), None
    scale = weight.new_empty((*stack, rows, columns // NVFP4_BLOCK), dtype=torch.float8_e4m3fn)
    return packed, scale, weight.new_empty(stack, dtype=torch.float32)


def _power_of_two(amax: Tensor, largest: float) -> Tensor:
    """The least e8m0 scale s with amax / s <= largest, exactly: frexp, where log2 would round near powers of two."""
    mantissa, exponent = torch.frexp((amax / largest).clamp(min=2.0**-126))
    exponent = exponent - (mantissa == 0.5).int()
    byte = torch.where(amax.isfinite(), (exponent + 127).clamp(max=254), 255)
    return byte.to(torch.uint8).view(torch.float8_e8m0fnu)


def _pack_e2m1(x: Tensor) -> Tensor:
    """Scaled values [..., blocks, block] -> codes, uint8 [..., blocks * block / 2]; beyond +-6 they saturate."""
    magnitude, code = x.abs(), torch.signbit(x).to(torch.uint8) << 3
    for lower, middle in enumerate(MIDPOINTS):  # a value halfway stays with an even lower code and leaves an odd one
        code = code + (magnitude >= middle if lower % 2 else magnitude > middle)
    code = code.flatten(-2).unflatten(-1, (-1, 2))
    return code[..., 0] | code[..., 1] << 4


def mxfp4_to_nvfp4(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """MXFP4 -> NVFP4 of the same values: the codes stay, scale_2 = 2^(k - 8) for the largest scale 2^k of a matrix.

    Raises ValueError where a block with a nonzero code lies more than 2^17 below the largest, which e4m3 cannot span.
    """
    exponent = scale.view(torch.uint8).int() - 127
    largest = exponent.amax((-2, -1))
    offset = exponent - (largest - 8)[..., None, None]
    empty = (weight & 0x77).unflatten(-1, (scale.shape[-1], -1)).amax(-1) == 0
    if bool(((offset < -9) & ~empty).any()) or bool((scale.view(torch.uint8) == 255).any()):
        raise ValueError(
            "this MXFP4 matrix has no exact NVFP4 form (scales spread over more than 2^17, or NaN): keep it as MXFP4"
        )
    block_scale = torch.exp2(offset.clamp(min=-9).float()).to(torch.float8_e4m3fn)
    return weight, block_scale.repeat_interleave(2, -1), torch.exp2((largest - 8).float())
