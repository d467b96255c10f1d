"""bf16 numbers as sums of two e4m3, which tensor cores of Hopper multiply with stored e4m3 as they are.

The first part leaves at most four bits of the eight, which the second one has, as a multiple of 2^-5. Numbers share a point,
which their largest one sets; what lies more than 2^13 below that loses bits.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from cutlass._mlir import ir
from cutlass._mlir.dialects import llvm

from dsv4_compile.kernels import stored
from dsv4_compile.kernels.stored import as_float, assembled

PARTS = 2  # of a number
SECOND = 2.0**-5  # what the second part is a multiple of


def split(values):
    """Four numbers below 2^8 -> the word of their first parts, and that of the second ones."""
    text = (
        "{ .reg .b32 x<2>, y<2>, by; .reg .b16 h<2>; mov.b32 by, 0x50005000; "  # 32
        "cvt.rn.f16x2.f32 x0, $3, $2; cvt.rn.f16x2.f32 x1, $5, $4; "
        "cvt.rn.satfinite.e4m3x2.f16x2 h0, x0; cvt.rn.satfinite.e4m3x2.f16x2 h1, x1; mov.b32 $0, {h0, h1}; "
        "cvt.rn.f16x2.e4m3x2 y0, h0; cvt.rn.f16x2.e4m3x2 y1, h1; "
        "sub.rn.f16x2 x0, x0, y0; sub.rn.f16x2 x1, x1, y1; mul.rn.f16x2 x0, x0, by; mul.rn.f16x2 x1, x1, by; "
        "cvt.rn.satfinite.e4m3x2.f16x2 h0, x0; cvt.rn.satfinite.e4m3x2.f16x2 h1, x1; mov.b32 $1, {h0, h1}; }"
    )
    out = assembled("!llvm.struct<(i32, i32)>", text, "=&r,=&r,f,f,f,f", *values)
    i32 = ir.IntegerType.get_signless(32)
    return [Int32(llvm.extractvalue(i32, out, [p])) for p in range(PARTS)]


def larger(a, b):
    """Of pairs of 16-bit numbers."""
    return Int32(assembled("i32", "max.u16x2 $0, $1, $2;", "=r,r,r", Int32(a), Int32(b)))


@cute.jit
def pointed(top):
    """top: the largest of pairs without their signs. What numbers must be multiplied by, as a pair, for the largest to become
    less than 2^8, and the inverse of that."""
    exponent = cutlass.max((top & 0xFFFF) >> 7, top >> 23)
    kept = cutlass.max(exponent, Int32(20))  # what is below 2^-107 loses bits
    by = as_float((261 - kept) << 23)
    # not finite: all results are NaN
    return stored.pair(by, by), as_float(Int32(0x7FC00000) if exponent == 255 else (kept - 7) << 23)
