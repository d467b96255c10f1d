"""Products of stored weights by e4m3 tensor cores (Hopper): nothing of FP8 is decoded, and four bits take half the work that
bf16 asks for.

A bf16 number is four digits to the base 32 of a fixed point that 128 columns of a vector share: whole numbers of at most 16,
which e4m3 holds. The digits are columns of the right operand of wgmma.m64n8k32, so that one or two vectors fill the eight that
there are at least. Sums of 32 products of such a digit with e2m1 are exact; of e4m3, as good as the 14 bits that the unit
keeps, which are added up in fp32 every 128 columns. A digit's weight and the point are a factor of these sums.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass._mlir import ir
from cutlass._mlir.dialects import llvm

from dsv4_compile.kernels import stored
from dsv4_compile.kernels.stored import as_float, assembled

DIGITS = 4
POINT = 128  # columns that share one
BACK = {"fp8": 1.0, "mxfp4": 2.0**6, "nvfp4": 2.0**6}  # what weights must be multiplied by
STEP = 32  # columns of one instruction
AT_ONCE = 32  # fp32 numbers that instructions on their way write, of a thread


def eights(format: str, M: int) -> int:
    """Columns of the right operand, by eight; NVFP4 has one for either half of 32, each with a scale of its own."""
    return M if format == "nvfp4" else -(-M * DIGITS // 8)


def step_bytes(format: str, M: int) -> int:
    """Digits of 32 columns. The 16 bytes between them keep threads that write neighbours off each other's banks."""
    return 256 * eights(format, M) + 16


def vector_bytes(format: str, M: int, columns: int) -> int:
    return columns // STEP * step_bytes(format, M) + columns // POINT * eights(format, M) * 8 * 4


def e2m1(word):
    """Eight e2m1 -> e4m3 of unit 2^-6: those of even places, those of odd ones."""
    signs, rest = 0x80808080 - 2**32, 0x1C1C1C1C
    return [((word << 4) & signs) | ((word << 2) & rest), (word & signs) | ((word >> 2) & rest)]


def split(values):
    """Four numbers below 2^19 -> for each digit, the word that holds those of all four."""
    lines = ["{ .reg .f32 t, d<4>, x<4>; .reg .b16 h<2>;"]
    lines += [f"mov.f32 x{i}, ${DIGITS + i};" for i in range(4)]
    for p in range(DIGITS):
        bits = 5 * (DIGITS - 1 - p)
        unit, minus = (f"0f{(127 - bits) << 23:08X}", f"0f{((127 + bits) << 23) | 1 << 31:08X}")
        for i in range(4):  # 1.5 2^23 rounds to whole numbers
            lines.append(f"fma.rn.f32 t, x{i}, {unit}, 0f4B400000; sub.rn.f32 d{i}, t, 0f4B400000;")
            if bits:
                lines.append(f"fma.rn.f32 x{i}, d{i}, {minus}, x{i};")
        for h in range(2):
            lines.append(f"cvt.rn.satfinite.e4m3x2.f32 h{h}, d{2 * h + 1}, d{2 * h};")
        lines.append(f"mov.b32 ${p}, {{h0, h1}};")
    out = assembled("!llvm.struct<(i32, i32, i32, i32)>", " ".join(lines) + " }", "=r,=r,=r,=r,f,f,f,f", *values)
    i32 = ir.IntegerType.get_signless(32)
    return [Int32(llvm.extractvalue(i32, out, [p])) for p in range(DIGITS)]


def larger(a, b):
    """Of pairs of 16-bit numbers."""
    return Int32(assembled("i32", "max.u16x2 $0, $1, $2;", "=r,r,r", Int32(a), Int32(b)))


def products(chains, wide: int, descriptor, stride: int):
    """For each chain of (left operand: four words, which 32 columns): the sum of its products, 4 `wide` numbers of a thread.
    descriptor: lower word of that of the digits of the first columns; it grows by `stride` for each 32."""
    count, outs, lines, operands = 4 * wide, 4 * wide * len(chains), [], []
    lines += [
        "{ .reg .pred no, yes; .reg .b32 l, h; .reg .b64 b; mov.b32 h, 8;"
    ]  # 128 bytes from eight columns to eight
    lines += ["setp.ne.b32 no, h, 8; setp.eq.b32 yes, h, 8; wgmma.fence.sync.aligned;"]
    for c, chain in enumerate(chains):
        sums = ", ".join(f"${c * count + i}" for i in range(count))
        for first, (left, step) in enumerate(chain):
            a = ", ".join(f"${outs + 1 + len(operands) + i}" for i in range(4))
            operands += [Int32(x) for x in left]
            lines.append(f"add.s32 l, ${outs}, {step * stride}; mov.b64 b, {{l, h}};")
            lines.append(f"wgmma.mma_async.sync.aligned.m64n{8 * wide}k32.f32.e4m3.e4m3 {{{sums}}}, {{{a}}}, b,")
            lines.append(f"{'yes' if first else 'no'}, 1, 1;")
    lines.append("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; }")
    constraints = ",".join(["=f"] * outs + ["r"] * (1 + len(operands)))
    f32 = ir.F32Type.get()
    found = llvm.inline_asm(
        ir.Type.parse(f"!llvm.struct<({', '.join(['f32'] * outs)})>"),
        [x.ir_value() for x in (Int32(descriptor), *operands)],
        " ".join(lines),
        constraints,
        has_side_effects=True,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )
    numbers = [Float32(llvm.extractvalue(f32, found, [i])) for i in range(outs)]
    return [numbers[c * count : (c + 1) * count] for c in range(len(chains))]


class Digits:
    """What `stream.Stream` computes with, where its tiles have 64 rows or more: its columns are all there."""

    def prepare(self):
        """Before anything runs."""
        self.wide = eights(self.format.name, self.M)
        self.stride = step_bytes(self.format.name, self.M)
        self.halves = self.format.name == "nvfp4"
        self.sums = (2 if self.halves else 4) * self.wide
        self.back = BACK[self.format.name]
        self.per_point = (self.M * DIGITS) if self.halves else self.wide * 8

    def allocate_vectors(self, smem):
        steps = self.segments * self.columns // STEP
        self.digits = smem.allocate_tensor(Int32, cute.make_layout((steps * self.stride // 4,)), 128)
        self.points = smem.allocate_tensor(
            Float32, cute.make_layout((self.segments * self.columns // POINT * self.wide * 8,)), 16
        )

    @cute.jit
    def stage_vectors(self, x, factor, thread):
        """See `Pairs.stage_vectors`. Sixteen threads have the 128 columns of a point."""
        runs = self.columns // 8
        count, points = self.segments * runs, self.points
        turns = -(-count // self.threads)
        for i in cutlass.range(turns, unroll=1):
            run = i * self.threads + thread
            segment, place = run // runs, run % runs
            held = cute.make_rmem_tensor((4, self.M), Int32)
            held.fill(0)
            if run < count:
                for m in cutlass.range_constexpr(self.M):
                    words = self.eight(x, m, (segment * self.K + self.from_column) // 8 + place)
                    for j in cutlass.range_constexpr(4):
                        held[j, m] = words[j]
            for m in cutlass.range_constexpr(self.M):
                top = Int32(0)
                for j in cutlass.range_constexpr(4):
                    top = larger(top, held[j, m] & 0x7FFF7FFF)
                for b in cutlass.range_constexpr(4):
                    top = larger(top, cute.arch.shuffle_sync_bfly(top, 1 << b))
                exponent = cutlass.max((top & 0xFFFF) >> 7, top >> 23)
                kept = cutlass.max(exponent, Int32(20))  # what is below 2^-107 loses digits
                by = as_float((272 - kept) << 23)  # the largest becomes less than 2^19
                # not finite: the vector's results are NaN
                point = as_float(Int32(0x7FC00000) if exponent == 255 else (kept - 3) << 23)
                if const_expr(factor is not None):
                    point = point * factor[segment]
                values = [v * by for j in range(4) for v in stored.unpaired(held[j, m])]
                if run < count:
                    if place % 16 == 0:
                        base = run // 16 * self.per_point + m * DIGITS
                        for p in cutlass.range_constexpr(DIGITS):
                            points[base + p] = point * Float32(2.0 ** (-5 * p))
                    self.put_digits(values, m, run)
        cute.arch.fence_proxy("async.shared", space="cta")

    def put_digits(self, values, m: int, run):
        """The digits of eight columns."""
        if self.format.name == "fp8":  # a thread multiplies 16 columns in a row, in two steps
            step, word = run // 8 * 2 + run % 2, run % 8 // 2
            pieces = [values[:4], values[4:]]
        else:
            step, word = run // 4, run % 4
            pieces = [values[0::2], values[1::2]]
        at = self.digits.iterator.toint() + step * self.stride + word * 4
        for k, piece in enumerate(pieces):
            for p, digits in enumerate(split(piece)):
                if self.halves:
                    n = 8 * m + 2 * p
                    upper = Int32(0) - word // 2  # all bits, or none
                    target = at + (k * self.wide + n // 8) * 128 + n % 8 * 16
                    stored.put_word(target, digits & (upper ^ -1))
                    stored.put_word(target + 16, digits & upper)
                else:
                    n = DIGITS * m + p
                    stored.put_word(at + (k * self.wide + n // 8) * 128 + n % 8 * 16, digits)

    @cute.jit
    def consume(self, sums, slot, segment, step):
        """Add the products of a stage to a thread's sums."""
        begin = (self.warp * self.stages + slot) * (self.weight_words + self.scale_words)
        first = (step * self.teams + self.team) * self.blocks  # block of the segment
        unit = segment * (self.columns // STEP) + first * (self.format.block // STEP)
        at = (self.digits.iterator.toint() & 0x3FFFF) // 16  # in a cluster, the upper bits name the block
        at = at + unit * (self.stride // 16)
        descriptor = at | Int32(self.wide * 8 << 16)  # bytes by 16 from 16 columns to the next 16
        per_point = POINT // self.format.block
        for j in cutlass.range_constexpr(self.blocks // per_point):
            point = (segment * (self.columns // POINT) + first // per_point + j) * self.per_point
            if const_expr(self.format.name == "fp8"):
                self.consume_bytes(sums, begin, j, descriptor, point)
            else:
                self.consume_halves(sums, begin, j, descriptor, point)

    @cute.jit
    def consume_bytes(self, sums, begin, j: int, descriptor, point):
        """FP8, 128 columns: two blocks."""
        chain = []
        for b in cutlass.range_constexpr(2):
            words = cute.make_rmem_tensor((4, 2), Int32)
            for r in cutlass.range_constexpr(2):
                place = begin + (((j * 2 + b) * 2 + r) * stored.LANES + self.lane) * 4
                part = cute.make_rmem_tensor((4,), Int32)
                cute.autovec_copy(cute.zipped_divide(self.ring, (4,))[None, place // 4], part)
                for i in cutlass.range_constexpr(4):
                    words[i, r] = part[i]
            for u in cutlass.range_constexpr(2):
                left = [words[2 * u + i, r] for i in range(2) for r in range(2)]
                chain.append((left, 4 * j + 2 * b + u))
        (part,) = products([chain], self.wide, descriptor, self.stride // 16)
        scales = [self.scale_of(begin, 2 * j, r)[0] for r in range(2)]
        for n in cutlass.range_constexpr(self.wide):
            points = self.two_points(point, n)
            for i in cutlass.range_constexpr(4):
                sums[4 * n + i] = sums[4 * n + i] + part[4 * n + i] * (scales[i // 2] * points[i % 2])

    @cute.jit
    def consume_halves(self, sums, begin, j: int, descriptor, point):
        """Four bits, 128 columns: a block."""
        scales = [self.scale_of(begin, j, r) for r in range(2)]
        at_once = max(1, min(4, AT_ONCE // (4 * self.wide)))
        inner = [Float32(0.0) for _ in range(self.sums)]
        for first in cutlass.range_constexpr(0, 4, at_once):
            chains = []
            for c in cutlass.range_constexpr(first, first + at_once):
                rows = []
                for r in cutlass.range_constexpr(2):
                    rows.append(e2m1(self.ring[begin + ((j * 2 + r) * stored.LANES + self.turned(c)) * 4 + self.t]))
                chains.append([([rows[0][0], rows[1][0], rows[0][1], rows[1][1]], 4 * j + c)])
            parts = products(chains, self.wide, descriptor, self.stride // 16)
            for k in cutlass.range_constexpr(at_once):
                c = first + k
                if const_expr(self.halves):
                    for r in cutlass.range_constexpr(2):
                        low, high = stored.e4m3_scales(scales[r][c // 2], c % 2)
                        for n in cutlass.range_constexpr(self.wide):
                            part = parts[k][4 * n + 2 * r] * low
                            inner[2 * n + r] = inner[2 * n + r] + part + parts[k][4 * n + 2 * r + 1] * high
                else:
                    factors = [stored.e8m0(scales[r][0], c) for r in range(2)]
                    for i in cutlass.range_constexpr(self.sums):
                        inner[i] = inner[i] + parts[k][i] * factors[i // 2 % 2]
        for n in cutlass.range_constexpr(self.wide):
            if const_expr(self.halves):
                point_here = self.points[point + n * DIGITS + self.t]
                for r in cutlass.range_constexpr(2):
                    sums[2 * n + r] = sums[2 * n + r] + inner[2 * n + r] * point_here
            else:
                points = self.two_points(point, n)
                for i in cutlass.range_constexpr(4):
                    sums[4 * n + i] = sums[4 * n + i] + inner[4 * n + i] * points[i % 2]

    def two_points(self, point, n: int):
        """The factors of a thread's two columns of the n-th eight."""
        part = cute.make_rmem_tensor((2,), Float32)
        index = (point + 8 * n) // 2 + self.t
        cute.autovec_copy(cute.zipped_divide(self.points, (2,))[None, index], part)
        return part[0], part[1]

    def start(self, sums):
        """Before the first product of a tile."""
        sums.fill(0.0)

    @cute.jit
    def finish(self, sums):
        """After the last product of a tile."""

    @cute.jit
    def put_partial(self, sums, base):
        """A warp's sums, those of vector m and row i of its 16 at base + m rows + i."""
        partial = self.partial
        for n in cutlass.range_constexpr(self.wide):
            for r in cutlass.range_constexpr(2):
                if const_expr(self.halves):
                    total, m = sums[2 * n + r], Int32(n)
                    total = total + cute.arch.shuffle_sync_bfly(total, 1)
                    total = total + cute.arch.shuffle_sync_bfly(total, 2)
                    if self.t == 0:
                        partial[base + m * self.rows_of_tile + self.g + 8 * r] = total
                else:
                    total, m = sums[4 * n + 2 * r] + sums[4 * n + 2 * r + 1], 2 * n + self.t // 2
                    total = total + cute.arch.shuffle_sync_bfly(total, 1)
                    if self.t % 2 == 0:
                        if m < self.M:
                            partial[base + m * self.rows_of_tile + self.g + 8 * r] = total
