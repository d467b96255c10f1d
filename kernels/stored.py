"""Stored weights in a stream: how the bytes of 16 rows become operands of the tensor cores.

Weights are the left operand of mma.m16n8k16, vectors the right one. Which k a thread multiplies is free as long as both
operands agree, so each thread takes runs of 8 consecutive ones. Four threads (a quad) share a row; the k of a quad, 64 bytes
of each row or 128 where they are fp32, are a block.
"""

from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass._mlir import ir
from cutlass._mlir.dialects import llvm

BITS = {"bf16": 16, "fp32": 32, "fp8": 8, "mxfp4": 4, "nvfp4": 4}
GROUP = {"fp8": 128, "mxfp4": 32, "nvfp4": 16}  # columns that share a scale
PARTS = {"bf16": 1, "fp32": 3}  # bf16 numbers whose sum is a number of the vector
LANES = 32


@dataclass(frozen=True)
class Format:
    """name: as the keys of BITS. e8m0: whether the scales of fp8 are bytes, not fp32."""

    name: str
    e8m0: bool = True

    @property
    def loads(self) -> int:
        """16-byte loads of a thread, of one row of one block."""
        return 2 if self.name == "fp32" else 1

    @property
    def block(self) -> int:
        """Columns."""
        return 512 * self.loads // BITS[self.name]

    @property
    def runs(self) -> int:
        """Of 8 columns, of a thread."""
        return self.block // 32

    @property
    def unit(self) -> float:
        """What decoded weights are multiples of: their bits are put where bf16 has them, and its exponents begin at 2^-126."""
        return {"fp8": 2.0**-120, "mxfp4": 2.0**-126, "nvfp4": 2.0**-64}.get(self.name, 1.0)

    @property
    def lift(self) -> float:
        """What vectors are multiplied by, so that products of small numbers stay exact; those beyond 2^79 overflow."""
        return 1.0 if self.unit == 1.0 else 2.0**48

    @property
    def order(self) -> tuple[int, ...]:
        """The columns of a run in the order in which the decoded pairs hold them."""
        if BITS[self.name] == 4:
            return 0, 4, 1, 5, 2, 6, 3, 7
        return (0, 2, 1, 3, 4, 6, 5, 7) if self.name == "fp8" else tuple(range(8))

    @property
    def scale_share(self) -> float:
        """Bytes of scales for a byte of weights."""
        return 0.0 if self.name in ("bf16", "fp32", "fp8") else 8 / BITS[self.name] / GROUP[self.name]

    def row_bytes(self, K: int) -> int:
        return K * BITS[self.name] // 8

    def scale_bytes(self, N: int, K: int) -> tuple[int, int]:
        """Of a row of scales, and of a matrix of them."""
        if self.name not in GROUP:
            return 0, 0
        groups = -(-K // GROUP[self.name])
        if self.name == "fp8":
            row = groups * (1 if self.e8m0 else 4)
            return row, row * -(-N // 128)
        return groups, groups * N

    def scale_words(self, K: int) -> int:
        """32-bit words that hold the scales of one row of one block, wherever they begin."""
        if self.name not in GROUP:
            return 0
        if self.name == "fp8":
            return 1
        needed = self.block // GROUP[self.name] // 4
        return needed if (K // GROUP[self.name]) % 4 == 0 else needed + 1


def assembled(result: str, text: str, constraints: str, *operands):
    """Inline PTX without side effects."""
    values = [x.ir_value() for x in operands]
    return llvm.inline_asm(
        ir.Type.parse(result),
        values,
        text,
        constraints,
        has_side_effects=False,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )


def mma(c, a0, a1, a2, a3, b0, b1):
    """c + A B for A [16, 16], B [16, 8]: four fp32 numbers of each thread."""
    text = (
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};"
    )
    operands = [Int32(x) for x in (a0, a1, a2, a3, b0, b1)] + [Float32(x) for x in c]
    out = assembled("!llvm.struct<(f32, f32, f32, f32)>", text, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", *operands)
    f32 = ir.F32Type.get()
    return [Float32(llvm.extractvalue(f32, out, [i])) for i in range(4)]


# The instruction that converts e4m3 does 16 numbers a clock, fewer than arrive: bits are moved instead. Shifts to the left
# are multiplications, which do not wait for the other integer operations.
SIGNS = 0x80008000 - 2**32


def e4m3(word):
    """Four e4m3 -> two pairs, of unit 2^-120. NaN becomes 480: see `e4m3_nan`."""
    rest = 0x07F007F0
    return [((word << 8) & SIGNS) | ((word << 4) & rest), (word & SIGNS) | ((word >> 4) & rest)]


def e4m3_nan(seen, word):
    """`seen` with the top bit of a byte set if one of the four e4m3 is NaN."""
    return seen | ((word & 0x7F7F7F7F) + 0x01010101)


def e2m1(word):
    """Eight e2m1 -> four pairs, of unit 2^-126."""
    rest, upper = 0x01C001C0, word >> 8
    return [((w << s) & SIGNS) | ((w << (s - 6)) & rest) for w in (word, upper) for s in (12, 8)]


def times(a, b):
    """Pairs."""
    return Int32(assembled("i32", "mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", Int32(a), Int32(b)))


def e4m3_scale(word, place: int, second):
    """The pair (s, s) 2^62 of byte `place`, or of the one after it, of four e4m3."""
    text = (
        "{ .reg .b16 l, h; .reg .b32 w; .reg .f32 f; .reg .pred p; mov.b32 {l, h}, $1; "
        f"cvt.rn.f16x2.e4m3x2 w, {'lh'[place // 2]}; mov.b32 {{l, h}}, w; setp.ne.s32 p, $2, 0; selp.b16 l, h, l, p; "
        "cvt.f32.f16 f, l; mul.f32 f, f, 0f5E800000; cvt.rn.bf16x2.f32 $0, f, f; }"
    )
    return Int32(assembled("i32", text, "=r,r,r", Int32(word), Int32(second)))


def e4m3_scales(word, place: int):
    """Bytes 2 `place` and the next one of four e4m3, as fp32."""
    text = (
        "{ .reg .b16 l, h; .reg .b32 w; mov.b32 {l, h}, $2; "
        f"cvt.rn.f16x2.e4m3x2 w, {'lh'[place]}; mov.b32 {{l, h}}, w; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }}"
    )
    out = assembled("!llvm.struct<(f32, f32)>", text, "=f,=f,r", Int32(word))
    f32 = ir.F32Type.get()
    return [Float32(llvm.extractvalue(f32, out, [i])) for i in range(2)]


def e8m0(word, place: int | None):
    """2^(byte - 127) of byte `place`, as fp32; None: it is where an exponent is. The last bit of the mantissa is set, so that
    255 is NaN; 0 counts as none."""
    shifted = word if place is None else word << (23 - 8 * place) if place < 3 else word >> 1
    exponent = "lop3.b32 $0, $1, 0x7F800000, 1, 0xEA;"  # and, or
    return as_float(Int32(assembled("i32", exponent, "=r,r", Int32(shifted))))


def as_float(bits) -> Float32:
    return Float32(assembled("f32", "mov.b32 $0, $1;", "=f,r", Int32(bits)))


def pair(low, high) -> Int32:
    """Two fp32 rounded to a pair."""
    return Int32(assembled("i32", "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f", Float32(high), Float32(low)))


def unpaired(word):
    """A pair as two fp32."""
    return [as_float(word << 16), as_float(word & (0xFFFF0000 - 2**32))]


def split(parts: int, low, high):
    """Pairs whose sum is (low, high), the largest first."""
    out = []
    for p in range(parts):
        out.append(pair(low, high))
        if p + 1 < parts:
            here = unpaired(out[-1])
            low, high = low - here[0], high - here[1]
    return out


def picked(words, low: int, high: int) -> Int32:
    """The pair of numbers `low` and `high` of pairs."""
    if high == low + 1 and low % 2 == 0:
        return words[low // 2]
    selector = (low % 2 * 0x22 + 0x10) | (high % 2 * 0x2200 + 0x5400)
    operands = Int32(words[low // 2]), Int32(words[high // 2])
    return Int32(assembled("i32", f"prmt.b32 $0, $1, $2, {selector};", "=r,r,r", *operands))


def fetch(shared, address, count) -> None:
    """Start to copy 16 bytes to shared memory, of which those beyond `count` become zeros."""
    cute.arch.inline_ptx(
        "cp.async.cg.shared.global.L2::128B [{$r0}], [{$r1}], 16, {$r2};", read_only_args=[shared, address, count]
    )


def fetch_to_l2(address, count) -> None:
    """Start to bring bytes, a multiple of 16, to the second cache."""
    cute.arch.inline_ptx("cp.async.bulk.prefetch.L2.global [{$r0}], {$r1};", read_only_args=[address, count])


def fetch_word(shared, address) -> None:
    """Start to copy 4 bytes to shared memory, by way of the first cache: neighbours are read soon."""
    cute.arch.inline_ptx("cp.async.ca.shared.global [{$r0}], [{$r1}], 4;", read_only_args=[shared, address])


def fetch_part(shared, address, count) -> None:
    """As `fetch_word`, but those beyond `count` become zeros."""
    cute.arch.inline_ptx(
        "cp.async.ca.shared.global [{$r0}], [{$r1}], 4, {$r2};", read_only_args=[shared, address, count]
    )


def vector_if(wanted, shared):
    """Four words of shared memory where they are wanted, anything elsewhere."""
    text = "{ .reg .pred p; setp.ne.b32 p, $4, 0; @p ld.shared.v4.b32 {$0, $1, $2, $3}, [$5]; }"
    operands = [Int32(wanted).ir_value(), Int32(shared).ir_value()]
    out = llvm.inline_asm(
        ir.Type.parse("!llvm.struct<(i32, i32, i32, i32)>"),
        operands,
        text,
        "=r,=r,=r,=r,r,r",
        has_side_effects=True,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )
    i32 = ir.IntegerType.get_signless(32)
    return [Int32(llvm.extractvalue(i32, out, [i])) for i in range(4)]
