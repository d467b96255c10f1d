"""Products of stored weights by e4m3 tensor cores (Hopper): nothing of FP8 is decoded, and four bits take half the work that
bf16 asks for.

A bf16 number is the sum of two e4m3, as the first leaves at most four bits of its eight; 128 columns of a vector share a point,
which their largest number sets, and what lies more than 2^13 below that loses bits. The parts are columns of the right operand
of wgmma.m64n8k32, so that up to four vectors fill the eight that there are at least. Products are added up as well as the 14
bits allow that the unit keeps, and these sums in fp32 every 128 columns.

A single vector leaves room for more: of four-bit weights, each thread of a quad has columns of the right operand of its own,
where the vector is zero but for the 32 columns of that thread. It gets their sum alone, and multiplies it by a scale once.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from dsv4_compile.kernels import stored, warpgroup, warps
from dsv4_compile.kernels.parts import PARTS, SECOND, larger, pointed, split
from dsv4_compile.kernels.stored import assembled

POINT = 128  # columns that share one
BACK = {"fp8": 1.0, "mxfp4": 2.0**6, "nvfp4": 2.0**6}  # what weights must be multiplied by
STEP = 32  # columns of one instruction
LOADS = 8  # of a thread, of eight numbers each, that fly together
AT_ONCE = 32  # fp32 numbers that instructions on their way write, of a thread


def spread(format: str, M: int) -> bool:
    """Whether threads of a quad have columns of their own."""
    return M == 1 and stored.BITS[format] == 4


def eights(format: str, M: int) -> int:
    """Columns of the right operand, by eight; NVFP4 has one for either half of 32, each with a scale of its own."""
    return -(-M * PARTS * (2 if format == "nvfp4" else 1) // 8)


def step_bytes(format: str, M: int) -> int:
    """Parts of 32 columns. The 16 bytes between them keep threads that write neighbours off each other's banks."""
    return 256 * eights(format, M) + 16


def vector_bytes(format: str, M: int, columns: int) -> int:
    return columns // STEP * step_bytes(format, M) + columns // POINT * eights(format, M) * 4 * 4


def e2m1(word):
    """Eight e2m1 -> e4m3 of unit 2^-6: those of even places, those of odd ones."""
    signs, rest = 0x80808080 - 2**32, 0x1C1C1C1C
    return [((word << 4) & signs) | ((word << 2) & rest), (word & signs) | ((word >> 2) & rest)]


class Digits:
    """What `stream.Stream` computes with, where its tiles have 64 rows or more: its columns are all there."""

    def prepare(self):
        """Before anything runs."""
        self.wide = eights(self.format.name, self.M)
        self.stride = step_bytes(self.format.name, self.M)
        self.spread = self.work.spreads(self.config)
        self.in_turn = stored.BITS[self.format.name] == 4 and not self.spread
        self.every, self.paired = POINT // self.format.block, self.blocks % 2 == 0
        self.halves = self.format.name == "nvfp4" and not self.spread
        self.sums = 2 * self.wide
        self.back = BACK[self.format.name]
        self.per_eight = 1 if self.spread else 2 if self.halves else 4  # vectors
        self.per_point = self.per_eight * self.wide

    def allocate_vectors(self, smem):
        steps = self.segments * self.columns // STEP
        self.parts = smem.allocate_tensor(Int32, cute.make_layout((steps * self.stride // 4,)), 128)
        self.points = smem.allocate_tensor(
            Float32, cute.make_layout((self.segments * self.columns // POINT * self.per_point,)), 16
        )

    @cute.jit
    def stage_vectors(self, x, factor, thread):
        """See `Pairs.stage_vectors`. Sixteen threads have the 128 columns of a point."""
        runs, points = self.columns // 8, self.points
        of_all = self.segments * runs
        turns = -(-of_all * self.M // self.threads)
        ahead = min(turns, LOADS)
        for i in cutlass.range(-(-turns // ahead), unroll=1):
            held = cute.make_rmem_tensor((4, ahead), Int32)
            held.fill(0)
            for c in cutlass.range_constexpr(ahead):
                share = (i * ahead + c) * self.threads + thread
                if share < of_all * self.M:
                    m, run = share // of_all, share % of_all
                    words = self.eight(x, m, (run // runs * self.K + self.from_column) // 8 + run % runs)
                    for j in cutlass.range_constexpr(4):
                        held[j, c] = words[j]
            if i == 0:
                self.fill_rest()
            for c in cutlass.range_constexpr(ahead):
                share = (i * ahead + c) * self.threads + thread
                m, run = share // of_all, share % of_all
                top = Int32(0)
                for j in cutlass.range_constexpr(4):
                    top = larger(top, held[j, c] & 0x7FFF7FFF)
                for b in cutlass.range_constexpr(4):
                    top = larger(top, cute.arch.shuffle_sync_bfly(top, 1 << b))
                by, point = pointed(top)
                if share < of_all * self.M:
                    if const_expr(factor is not None):
                        point = point * factor[run // runs]
                    if run % 16 == 0:
                        points[run // 16 * self.per_point + m] = point
                    self.put_parts([v for j in range(4) for v in stored.unpaired(stored.times(held[j, c], by))], m, run)
        cute.arch.fence_proxy("async.shared", space="cta")

    def put_parts(self, values, m, run):
        """The parts of eight columns."""
        if self.format.name == "fp8":  # a thread multiplies 16 columns in a row, in two steps
            step, word = run // 8 * 2 + run % 2, run % 8 // 2
            pieces = [values[:4], values[4:]]
        else:
            step, word = run // 4, run % 4
            pieces = [values[0::2], values[1::2]]
        if self.spread:
            self.put_spread(pieces, run)
            return
        at = self.parts.iterator.toint() + step * self.stride + word * 4
        for k, piece in enumerate(pieces):
            for p, word_of in enumerate(split(piece)):
                if self.halves:
                    n = 4 * m + 2 * p
                    upper = Int32(0) - word // 2  # all bits, or none
                    target = at + (k * self.wide + n // 8) * 128 + n % 8 * 16
                    warps.store(target, word_of & (upper ^ -1))
                    warps.store(target + 16, word_of & upper)
                else:
                    n = PARTS * m + p
                    warps.store(at + (k * self.wide + n // 8) * 128 + n % 8 * 16, word_of)

    @cute.jit
    def put_spread(self, pieces, run):
        """Of the only vector: a thread of the quad multiplies 32 columns in a row, in four steps. Zeros for its fellows."""
        block, thread = run // 16, run // 4 % 4
        step = block * 4 + run % 4
        at = (step * self.stride + thread * (PARTS * 16)) // 16
        for k, piece in enumerate(pieces):
            for p, word_of in enumerate(split(piece)):
                words = cute.make_rmem_tensor((4,), Int32)
                for i in cutlass.range_constexpr(4):
                    words[i] = word_of if thread == i else Int32(0)
                cute.autovec_copy(words, cute.zipped_divide(self.parts, (4,))[None, at + k * 8 + p])

    @cute.jit
    def consume(self, sums, slot, segment, step):
        """Add the products of a stage to a thread's sums."""
        begin = (self.warp * self.stages + slot) * (self.weight_words + self.scale_words)
        first = (step * self.teams + self.team) * self.blocks  # block of the segment
        unit = segment * (self.columns // STEP) + first * (self.format.block // STEP)
        descriptor = warpgroup.descriptor(self.parts.iterator.toint(), self.wide, unit * (self.stride // 16))
        per_point = POINT // self.format.block
        for j in cutlass.range_constexpr(self.blocks // per_point):
            point = (segment * (self.columns // POINT) + first // per_point + j) * self.per_point
            if const_expr(self.format.name == "fp8"):
                self.consume_bytes(sums, begin, j, descriptor, point)
            elif const_expr(self.spread):
                if const_expr(j % 2 == 0):
                    self.consume_spread(sums, begin, j, min(2, self.blocks - j), descriptor, point)
            else:
                self.consume_halves(sums, begin, j, descriptor, point)

    @cute.jit
    def consume_bytes(self, sums, begin, j: int, descriptor, point):
        """FP8, 128 columns: two blocks."""
        chain = []
        for b in cutlass.range_constexpr(2):
            words = self.two_rows(begin, 2 * j + b)
            for u in cutlass.range_constexpr(2):
                left = [words[r][2 * u + i] for i in range(2) for r in range(2)]
                chain.append((left, 4 * j + 2 * b + u))
        (part,) = warpgroup.products("e4m3", [chain], self.wide, descriptor, self.stride // 16)
        scales = [self.scale_of(begin, 2 * j, r)[0] for r in range(2)]
        for n in cutlass.range_constexpr(self.wide):
            here = self.point_of(point, n)
            for r in cutlass.range_constexpr(2):
                whole = part[4 * n + 2 * r] + part[4 * n + 2 * r + 1] * Float32(SECOND)
                sums[2 * n + r] = sums[2 * n + r] + whole * (scales[r] * here)

    def two_rows(self, begin, j: int):
        """A thread's words of rows g and g + 8 in a block."""
        rows = [cute.make_rmem_tensor((4,), Int32) for _ in range(2)]
        for r, part in enumerate(rows):
            place = begin // 4 + self.piece(j, r, self.t)
            cute.autovec_copy(cute.zipped_divide(self.ring, (4,))[None, place], part)
        return rows

    @cute.jit
    def consume_spread(self, sums, begin, first: int, count: int, descriptor, point):
        """Four bits and one vector, `count` times 128 columns."""
        chains, nvfp4 = [], const_expr(self.format.name == "nvfp4")
        for j in cutlass.range_constexpr(first, first + count):
            rows, chain = self.two_rows(begin, j), []
            for i in cutlass.range_constexpr(4):
                a, b = e2m1(rows[0][i]), e2m1(rows[1][i])
                chain.append(([a[0], b[0], a[1], b[1]], 4 * j + i))
            chains += [chain[:2], chain[2:]] if nvfp4 else [chain]
        parts = warpgroup.products("e4m3", chains, 1, descriptor, self.stride // 16)
        for k in cutlass.range_constexpr(count):
            here = self.points[point + k]
            for r in cutlass.range_constexpr(2):
                factors = self.own_scales(self.scale_of(begin, first + k, r))
                whole = [a[2 * r] + a[2 * r + 1] * Float32(SECOND) for a in parts[: len(factors)]]
                whole = [w * f for w, f in zip(whole, factors, strict=True)]
                total = whole[0] + whole[1] if const_expr(nvfp4) else whole[0]
                sums[r] = sums[r] + total * here
            parts = parts[len(factors) :]

    def own_scales(self, words):
        """Those of the thread's 32 columns in a row's block: one, or two of 16."""
        if self.format.name == "nvfp4":
            place = 2 * self.t
            text = "prmt.b32 $0, $1, $2, $3;"
            both = assembled("i32", text, "=r,r,r,r", words[0], words[1], Int32(place | (place + 1) << 4))
            return stored.e4m3_scales(Int32(both), 0)
        shift = Int32(23) - 8 * self.t  # the last byte goes round
        return [stored.e8m0(assembled("i32", "shf.l.wrap.b32 $0, $1, $1, $2;", "=r,r,r", words[0], shift), None)]

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
                    rows.append(e2m1(self.ring[begin + self.piece(j, r, c) * 4 + self.t]))
                chains.append([([rows[0][0], rows[1][0], rows[0][1], rows[1][1]], 4 * j + c)])
            parts = warpgroup.products("e4m3", chains, self.wide, descriptor, self.stride // 16)
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
                        whole = parts[k][2 * i] + parts[k][2 * i + 1] * Float32(SECOND)
                        inner[i] = inner[i] + whole * factors[i % 2]
        for n in cutlass.range_constexpr(self.wide):
            here = self.point_of(point, n)
            for r in cutlass.range_constexpr(2):
                sums[2 * n + r] = sums[2 * n + r] + inner[2 * n + r] * here

    def piece(self, j: int, r: int, c):
        """Where the c-th 16 bytes of row g or g + 8 of block j lie in a stage. Neither paired nor read in turn, they are those
        that the thread copied."""
        if self.paired:
            return j // 2 * (4 * stored.LANES) + self.unit(r, self.g, j % 2 * 4 + c)
        return (j * 2 + r) * stored.LANES + (self.turned(c) if self.in_turn else self.lane)

    def point_of(self, point, n: int):
        """The factor of the vector that a thread's two columns of the n-th eight belong to."""
        return self.points[point + self.per_eight * n + (self.t // 2 if self.halves else self.t)]

    def start(self, sums):
        """Before the first product of a tile."""
        sums.fill(0.0)

    @cute.jit
    def finish(self, sums):
        """After the last product of a tile: what the threads of a quad have of a row is added up."""
        for i in cutlass.range_constexpr(self.sums):
            total = sums[i]
            if const_expr(self.spread):
                total = total + cute.arch.shuffle_sync_bfly(total, 1)
                total = total + cute.arch.shuffle_sync_bfly(total, 2)
            if const_expr(self.halves):  # a thread has both halves of 32 columns, the next one the second parts
                total = total * Float32(SECOND) if self.t % 2 == 1 else total
                total = total + cute.arch.shuffle_sync_bfly(total, 1)
            sums[i] = total

    @cute.jit
    def put_partial(self, sums, base):
        """A warp's sums, those of vector m and row i of its 16 at base + m sums_of_vector + i."""
        partial = self.partial
        for n in cutlass.range_constexpr(self.wide):
            for r in cutlass.range_constexpr(2):
                m = 4 * n + self.t
                writes = m < self.M
                if const_expr(self.halves):
                    m = 2 * n + self.t // 2
                    writes = m < self.M and self.t % 2 == 0
                if writes:
                    partial[base + m * self.sums_of_vector + self.g + 8 * r] = sums[2 * n + r]
