"""Products of stored weights by bf16 tensor cores: weights become pairs of bf16 in registers; vectors lie in shared memory in
the order in which the tensor cores take them, in bf16. An fp32 number is three such ones."""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, const_expr

from dsv4_compile.kernels import stored
from dsv4_compile.kernels.stored import LANES

MOST = 8  # vectors: columns of an instruction


def vector_bytes(dtype: str, M: int, columns: int) -> int:
    return columns * M * 2 * stored.PARTS[dtype]


class Pairs:
    """What `stream.Stream` computes with, where its tiles have 16 rows."""

    def prepare(self):
        """Before anything runs."""
        self.parts = stored.PARTS[self.work.dtype]
        self.sums = 4
        self.in_turn = stored.BITS[self.format.name] == 4
        self.back = self.format.lift**-1 / self.format.unit

    def allocate_vectors(self, smem):
        units = self.segments * self.columns // 32 * self.parts * self.M  # rows of four 16-byte vectors
        self.vectors = smem.allocate_tensor(Int32, cute.make_layout((units * 16,)), 128)

    @cute.jit
    def stage_vectors(self, x, factor, thread):
        """x: M rows of segments K numbers, of which this block has `part` from `from_column` on. factor: None, or what
        multiplies each segment."""
        runs, filled = self.part // 8, self.columns // 8
        count = self.segments * filled
        turns = -(-count // self.threads)
        size = 4 if self.dtype is BFloat16 else 8  # words of a run
        ahead = max(1, min(turns, 32 // (size * self.M)))  # loads that fly together
        for i in cutlass.range(-(-turns // ahead), unroll=1):
            held = cute.make_rmem_tensor((size, self.M, ahead), Int32)
            held.fill(0)
            for c in cutlass.range_constexpr(ahead):
                run = (i * ahead + c) * self.threads + thread
                segment, place = run // filled, run % filled
                if run < count:
                    if place < runs:
                        for m in cutlass.range_constexpr(self.M):
                            words = self.eight(x, m, (segment * self.K + self.from_column) // 8 + place)
                            for j in cutlass.range_constexpr(size):
                                held[j, m, c] = words[j]
            for c in cutlass.range_constexpr(ahead):
                run = (i * ahead + c) * self.threads + thread
                segment, place = run // filled, run % filled
                if run < count:
                    block = segment * (filled * 8 // self.format.block) + place * 8 // self.format.block
                    inside = place % (self.format.block // 8)
                    if const_expr(stored.BITS[self.format.name] == 4):
                        unit, t = inside // 4, inside % 4
                    else:
                        unit, t = inside % self.format.runs, inside // self.format.runs
                    for m in cutlass.range_constexpr(self.M):
                        by = Float32(self.format.lift) * (Float32(1.0) if factor is None else factor[segment])
                        pairs = self.pairs([held[j, m, c] for j in range(size)], by, factor is None)
                        for p in cutlass.range_constexpr(self.parts):
                            row = ((block * self.format.runs + unit) * self.parts + p) * self.M + m
                            words = cute.make_rmem_tensor((4,), Int32)
                            for j in cutlass.range_constexpr(4):
                                words[j] = pairs[j][p]
                            cute.autovec_copy(words, self.vector(row * 4 + t))

    def pairs(self, words, by, only_lifted: bool):
        """Eight numbers times `by` in the order of decoded weights: four lists of parts."""
        order = self.format.order
        if self.dtype is BFloat16 and only_lifted:
            out = [stored.picked(words, order[2 * j], order[2 * j + 1]) for j in range(4)]
            if self.format.lift != 1.0:
                lift = stored.pair(by, by)
                out = [stored.times(w, lift) for w in out]
            return [[w] for w in out]
        if self.dtype is BFloat16:
            values = [v for w in words for v in stored.unpaired(w)]
        else:
            values = [stored.as_float(w) for w in words]
        values = [v * by for v in values]
        return [stored.split(self.parts, values[order[2 * j]], values[order[2 * j + 1]]) for j in range(4)]

    def vector(self, index):
        """The 16 bytes of `vectors` at an index."""
        return cute.zipped_divide(self.vectors, (4,))[None, index]

    @cute.jit
    def consume(self, sums, slot, segment, step):
        """Add the products of a stage to the four sums of a thread: rows g and g + 8, vectors 2t and 2t + 1."""
        size = self.weight_words + self.scale_words
        begin = (self.warp * self.stages + slot) * size
        for j in cutlass.range_constexpr(self.blocks):
            block = (step * self.teams + self.team) * self.blocks + j
            if const_expr(not self.exact):
                if block * self.format.block < self.part:
                    self.consume_block(sums, begin, j, segment, block)
            else:
                self.consume_block(sums, begin, j, segment, block)

    @cute.jit
    def consume_block(self, sums, begin, j: int, segment, block):
        f = self.format
        unit = (segment * (self.columns // f.block) + block) * f.runs
        scales = [self.scale_of(begin, j, r) for r in range(2)] if self.words else None
        four_bits = f.name in ("mxfp4", "nvfp4")
        weights = cute.make_rmem_tensor((4 * f.loads, 2), Int32)
        if const_expr(not four_bits):
            for r in cutlass.range_constexpr(2):
                for l in cutlass.range_constexpr(f.loads):
                    place = begin + (((j * 2 + r) * f.loads + l) * LANES + self.lane) * 4
                    part = cute.make_rmem_tensor((4,), Int32)
                    cute.autovec_copy(cute.zipped_divide(self.ring, (4,))[None, place // 4], part)
                    for i in cutlass.range_constexpr(4):
                        weights[l * 4 + i, r] = part[i]
        total = [sums[i] for i in range(4)]
        if const_expr(f.name == "fp8"):
            part = [Float32(0.0) for _ in range(4)]
            nan = self.nan
            for r in cutlass.range_constexpr(2):
                for i in cutlass.range_constexpr(4):
                    nan[r] = stored.e4m3_nan(nan[r], weights[i, r])
            for u in cutlass.range_constexpr(2):
                xs = self.operand(unit + u)
                for i in cutlass.range_constexpr(2):
                    a, b = stored.e4m3(weights[2 * u + i, 0]), stored.e4m3(weights[2 * u + i, 1])
                    for x in xs:
                        part = stored.mma(part, a[0], b[0], a[1], b[1], x[2 * i], x[2 * i + 1])
            total = [total[i] + part[i] * scales[i // 2][0] for i in range(4)]
        elif const_expr(four_bits):
            for c in cutlass.range_constexpr(4):
                xs = self.operand(unit + c)
                rows = []
                for r in cutlass.range_constexpr(2):
                    word = self.ring[begin + ((j * 2 + r) * LANES + self.turned(c)) * 4 + self.t]
                    rows.append(stored.e2m1(word))
                a, b = rows
                if const_expr(f.name == "nvfp4"):
                    for r in cutlass.range_constexpr(2):
                        s = stored.e4m3_scale(scales[r][c // 2], 2 * (c % 2), self.t // 2)
                        rows[r] = [stored.times(v, s) for v in rows[r]]
                    a, b = rows
                    part = total
                else:
                    part = [Float32(0.0) for _ in range(4)]
                for x in xs:
                    part = stored.mma(part, a[0], b[0], a[1], b[1], x[0], x[1])
                    part = stored.mma(part, a[2], b[2], a[3], b[3], x[2], x[3])
                if const_expr(f.name == "nvfp4"):
                    total = part
                else:
                    factors = [stored.e8m0(scales[r][0], c) for r in range(2)]
                    if const_expr(self.part % f.block != 0):
                        here = block * f.block + c * 32 < self.part
                        factors = [s if here else Float32(0.0) for s in factors]
                    total = [total[i] + part[i] * factors[i // 2] for i in range(4)]
        elif const_expr(f.name == "bf16"):
            total = self.consume_plain(total, weights, self.operand(unit))
        else:
            total = self.consume_wide(total, weights, self.operand(unit))
        for i in cutlass.range_constexpr(4):
            sums[i] = total[i]

    def consume_plain(self, total, weights, xs):
        for x in xs:
            for i in range(2):
                a = [weights[2 * i, 0], weights[2 * i, 1], weights[2 * i + 1, 0], weights[2 * i + 1, 1]]
                total = stored.mma(total, *a, x[2 * i], x[2 * i + 1])
        return total

    def consume_wide(self, total, weights, xs):
        """fp32 weights: products of parts, without those below fp32."""
        for i in range(2):
            parts = []  # [pair of columns][row]
            for k in range(2):
                pairs = [[stored.as_float(weights[4 * i + 2 * k + h, r]) for h in range(2)] for r in range(2)]
                parts.append([stored.split(3, *p) for p in pairs])
            for p in range(3):
                for q in range(min(self.parts, 3 - p)):
                    a = [parts[0][0][p], parts[0][1][p], parts[1][0][p], parts[1][1][p]]
                    total = stored.mma(total, *a, xs[q][2 * i], xs[q][2 * i + 1])
        return total

    def operand(self, unit):
        """The vectors' numbers for one run of a quad, by parts: four pairs of a thread's vector, zeros where there is none."""
        out = []
        for p in range(self.parts):
            index = ((unit * self.parts + p) * self.M + self.g) * 4 + self.t
            out.append(stored.vector_if(self.g < self.M, self.vectors.iterator.toint() + index * 16))
        return out

    def start(self, sums):
        """Before the first product of a tile."""
        sums.fill(0.0)
        self.nan = cute.make_rmem_tensor((2,), Int32)
        self.nan.fill(0)

    @cute.jit
    def finish(self, sums):
        """After the last product of a tile."""
        if const_expr(self.format.name == "fp8"):
            for r in cutlass.range_constexpr(2):
                seen = self.nan[r] & (0x80808080 - 2**32)
                seen = seen | cute.arch.shuffle_sync_bfly(seen, 1)
                seen = seen | cute.arch.shuffle_sync_bfly(seen, 2)
                for i in cutlass.range_constexpr(2):
                    sums[2 * r + i] = Float32(float("nan")) if seen != 0 else sums[2 * r + i]

    @cute.jit
    def put_partial(self, sums, base):
        """A warp's sums, those of vector m and row i of its 16 at base + m sums_of_vector + i."""
        partial = self.partial
        for i in cutlass.range_constexpr(4):
            m = 2 * self.t + i % 2
            if m < self.M:
                partial[base + m * self.sums_of_vector + self.g + i // 2 * 8] = sums[i]
