"""Numbers as codes e4m3 with a scale that neighbours share, and rows of them in bytes: codes of channels without a position;
rotary channels in bf16; for each 64 codes the byte of their scale; zeros."""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Uint8

from dsv4_compile.kernels.stored import as_float, assembled

BLOCK, ALIGNMENT = 64, 16  # channels that share a scale; bytes
LEAST = 1e-4  # the largest magnitude of a block counts as at least this


def row_bytes(D: int, rope: int) -> int:
    """Of D channels, the last `rope` rotary."""
    return -(-(D + rope + (D - rope) // BLOCK) // ALIGNMENT) * ALIGNMENT


def bits_of(x) -> Int32:
    return Int32(assembled("i32", "mov.b32 $0, $1;", "=r,f", x))


def exponent(numbers, lanes: int, least: float):
    """Of the least power of two, as a byte, with which those of so many neighbouring lanes fit e4m3: the exponent of the
    largest over 1.75 2^8."""
    largest = Float32(least)
    for x in numbers:
        largest = cute.arch.fmax(largest, cute.arch.fmax(x, -x))
    largest = cute.arch.warp_reduction_max(largest, threads_in_group=lanes)
    return ((bits_of(largest) + Int32(0x1FFFFF)) >> 23) - 8


def over(scale):
    """1 / scale of a power of two."""
    return as_float(Int32(254 << 23) - bits_of(scale))


def codes(four, factor) -> Int32:
    """Four numbers times a factor as e4m3, the first in the lowest byte."""
    text = (
        "{ .reg .b16 l, h; cvt.rn.satfinite.e4m3x2.f32 l, $2, $1; cvt.rn.satfinite.e4m3x2.f32 h, $4, $3; "
        "mov.b32 $0, {l, h}; }"
    )
    return Int32(assembled("i32", text, "=r,f,f,f,f", *(x * factor for x in four)))


@cute.jit
def store(numbers, row, v, wanted, D, rope):
    """Vector v of a row: 4 or 8 fp32. All lanes of a warp come here; those that are `wanted` write. row: its bytes [size]."""
    width, plain = len(numbers), D - rope
    shared = exponent(numbers, BLOCK // width, LEAST)
    scale = as_float(shared << 23)
    start = D + rope
    if wanted:
        if v < plain // width:
            words = cute.recast_tensor(cute.zipped_divide(row, (width,))[None, v], Int32)
            for w in cutlass.range_constexpr(width // 4):
                words[w] = codes(numbers[4 * w : 4 * w + 4], over(scale))
            if v % (BLOCK // width) == 0:
                row[start + v // (BLOCK // width)] = Uint8(shared)
        else:
            narrow = cute.make_rmem_tensor((width,), BFloat16)
            for j in cutlass.range_constexpr(width):
                narrow[j] = numbers[j].to(BFloat16)
            part = cute.zipped_divide(row, (2 * width,))[None, v - plain // width + plain // (2 * width)]
            cute.autovec_copy(narrow, cute.recast_tensor(part, BFloat16))
        if v < row_bytes(D, rope) - start - plain // BLOCK:
            row[start + plain // BLOCK + v] = Uint8(0)
