"""Few vectors times a stored matrix, at the speed of memory.

A block of warps computes 16 rows of the matrix at a time; its warps split K. Each warp keeps a ring of stages in shared memory
full with asynchronous copies that it alone waits for, across rows too, so that the memory system never drains. The vectors lie
in shared memory in the order in which the tensor cores take them, in bf16; fp32 is three such numbers. Partial sums of warps
are added in the order of the warps.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, const_expr

from dsv4_compile.kernel import Kernel, fake, stream
from dsv4_compile.kernels import stored

ROWS = 16  # of the matrix at a time
SMS = 132  # processors that the cost model reckons with
SHARED = 227 << 10  # bytes of a block at most
LANES = 32
DTYPES = {"bf16": BFloat16, "fp32": Float32}
AHEAD = 4096  # bytes of a row that are fetched while an earlier kernel runs
IN_FLIGHT = 64 << 10  # bytes of a processor: what memory's latency asks for


@dataclass(frozen=True)
class Config:
    """warps: of a block. stages: of a warp's ring. blocks: of the format's blocks of K in a stage. resident: thread blocks of
    a processor, which is what the grid is sized for."""

    warps: int
    stages: int
    blocks: int
    resident: int


@dataclass(frozen=True)
class Work:
    """What a thread block streams: rows of K columns in `segments` (matrices one after the other, each with its own columns),
    times M vectors, `tiles` times 16 rows, `grids` times (groups, slots, tokens)."""

    format: str
    e8m0: bool
    dtype: str
    M: int
    K: int
    segments: int
    tiles: int
    grids: int

    @property
    def stored(self) -> stored.Format:
        return stored.Format(self.format, self.e8m0)

    def steps(self, config: Config) -> int:
        """Stages that a warp goes through for one segment of one tile."""
        return -(-self.K // (self.stored.block * config.blocks * config.warps))

    def columns(self, config: Config) -> int:
        """K of a segment, filled up."""
        return self.steps(config) * config.blocks * config.warps * self.stored.block

    def stage_words(self, config: Config) -> tuple[int, int]:
        """32-bit words of weights and of scales in one stage of one warp."""
        words = self.stored.scale_words(self.K)
        scales = 2 * 8 * (words + 1) if words else 0  # and where they begin
        return config.blocks * 2 * self.stored.loads * LANES * 4, config.blocks * scales

    def shared(self, config: Config) -> int:
        """Bytes of shared memory."""
        ring = config.warps * config.stages * sum(self.stage_words(config)) * 4
        vectors = self.segments * self.columns(config) * self.M * 2 * stored.PARTS[self.dtype]
        return ring + vectors + 2 * config.warps * self.M * ROWS * 4 + (config.warps + 1) * self.M * 4 + 64

    def grid(self, config: Config) -> int:
        """Thread blocks of one group."""
        return min(self.tiles, max(1, SMS * config.resident // self.grids))


def configs_of(work: Work) -> Iterator[Config]:
    """Those that fit, best first by `cost`."""
    found = []
    for warps in (4, 8, 16):
        for stages in (3, 4, 6, 8):
            for blocks in (1, 2, 4):
                for resident in (1, 2, 3, 4, 6):
                    config = Config(warps, stages, blocks, resident)
                    if resident * (work.shared(config) + 1024) <= SHARED + 1024 and resident * warps <= 48:
                        found.append(config)
    yield from sorted(found, key=lambda c: cost(work, c))


def cost(work: Work, config: Config) -> float:
    """Time in units of what memory needs, roughly: too little in flight or too few warps to decode, uneven shares of the
    processors, columns that are none, vectors staged by every thread block."""
    blocks = work.grid(config) * work.grids
    present = min(config.resident, -(-blocks // SMS))  # thread blocks of a processor
    flying = present * config.warps * (config.stages - 1) * sum(work.stage_words(config)) * 4
    enough = IN_FLIGHT * min(1.0, 2 * work.stored.row_bytes(work.K) * work.segments * ROWS / IN_FLIGHT)
    depth = max(1.0, enough / flying)
    idle = max(1.0, 16 / (present * config.warps)) ** 0.5
    rounds = -(-work.tiles // work.grid(config)) * -(-blocks // (SMS * config.resident))
    even = rounds * SMS * config.resident / (work.tiles * work.grids)
    even = max(even, 1.0) if work.tiles * work.grids >= SMS else 1.0
    staged = present * work.M * work.K * work.segments * 2 / (2 << 20)
    habits = 0.01 * (config.stages - 3) + 0.02 * (config.blocks != 2) + 0.02 * max(0, present * config.warps - 16) / 16
    habits += 0.04 / (work.steps(config) * work.segments)  # every tile ends with a barrier
    return depth * even * idle * work.columns(config) / work.K + staged + habits


class Stream:
    """The part that all kernels of this kind share. They say where rows are (`place`), and what becomes of sums."""

    def __init__(self, work: Work, config: Config):
        self.work, self.config, self.format = work, config, work.stored
        self.M, self.K, self.segments, self.tiles = work.M, work.K, work.segments, work.tiles
        self.warps, self.stages, self.blocks = config.warps, config.stages, config.blocks
        self.threads = LANES * config.warps
        self.steps, self.columns, self.grid = work.steps(config), work.columns(config), work.grid(config)
        self.weight_words, self.scale_words = work.stage_words(config)
        self.words = self.format.scale_words(work.K)
        self.parts = stored.PARTS[work.dtype]
        self.dtype = DTYPES[work.dtype]
        self.row_bytes = self.format.row_bytes(work.K)
        self.exact = self.columns == work.K
        self.back = self.format.lift**-1 / self.format.unit  # what sums must be multiplied by
        # scales may begin within a word
        self.shifted = self.words > 0 and not (self.words == 1 and work.format == "fp8" and not work.e8m0)
        if work.format in ("mxfp4", "nvfp4"):
            self.shifted = (work.K // stored.GROUP[work.format]) % 4 != 0
        self.scale_row, self.scale_matrix = 0, 0

    def allocate(self):
        smem = cutlass.memory.SmemAllocator()
        units = self.segments * self.columns // 32 * self.parts * self.M  # rows of four 16-byte vectors
        self.ring = smem.allocate_tensor(
            Int32, cute.make_layout((self.warps * self.stages * (self.weight_words + self.scale_words),)), 128
        )
        self.vectors = smem.allocate_tensor(Int32, cute.make_layout((units * 16,)), 128)
        self.partial = smem.allocate_tensor(Float32, cute.make_layout((2 * self.warps * self.M * ROWS,)), 16)
        return smem

    # the vectors

    @cute.jit
    def stage_vectors(self, x, factor, thread):
        """x: M rows of segments K numbers. factor: None, or what multiplies each segment."""
        runs, filled = self.K // 8, self.columns // 8
        count = self.segments * filled
        turns = -(-count // self.threads)
        size = 4 if self.dtype is BFloat16 else 8  # words of a run
        ahead = max(1, min(turns, 48 // (size * self.M)))  # loads that fly together
        for i in cutlass.range(-(-turns // ahead), unroll=1):
            held = cute.make_rmem_tensor((size, self.M, ahead), Int32)
            held.fill(0)
            for c in cutlass.range_constexpr(ahead):
                run = (i * ahead + c) * self.threads + thread
                segment, place = run // filled, run % filled
                if run < count:
                    if place < runs:
                        for m in cutlass.range_constexpr(self.M):
                            row = cute.zipped_divide(x[m, None], (8,))
                            part = cute.make_rmem_tensor((8,), self.dtype)
                            cute.autovec_copy(row[None, segment * runs + place], part)
                            words = cute.recast_tensor(part, Int32)
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

    # the ring

    def begin(self, first, warp, lane):
        """State of the copies: the next tile, segment and step; addresses of the two rows, and of the scales."""
        self.warp, self.lane, self.g, self.t = warp, lane, lane // 4, lane % 4
        self.at = cute.make_rmem_tensor((3,), Int32)
        self.at[0], self.at[1], self.at[2] = first, 0, 0
        size = 4 * (self.weight_words + self.scale_words)
        self.ring_at = self.ring.iterator.toint() + warp * (self.stages * size) + self.home() * 16
        self.rows = cute.make_rmem_tensor((2,), Int64)
        self.items = max(1, -(-2 * (self.words + self.shifted) // 4))
        self.scales = cute.make_rmem_tensor((self.items,), Int64)
        self.rows.fill(0)
        self.scales.fill(0)

    @cute.jit
    def issue(self, slot):
        """Start the copies of the next stage, if there is one."""
        at, rows, scales = self.at, self.rows, self.scales
        if at[0] < self.tiles:
            if at[2] == 0:
                self.rebase()
            ring = self.ring_at + slot * (4 * (self.weight_words + self.scale_words))
            for j in cutlass.range_constexpr(self.blocks):
                block = (at[2] * self.warps + self.warp) * self.blocks + j
                count = Int32(16)
                if const_expr(not self.exact):
                    column = block * self.format.block + self.t * (self.format.block // 4)
                    count = Int32(16) if column < self.K else Int32(0)
                for r in cutlass.range_constexpr(2):
                    for l in cutlass.range_constexpr(self.format.loads):
                        place = ((j * 2 + r) * self.format.loads + l) * LANES * 16
                        stored.fetch(ring + place, rows[r] + (64 * self.format.loads * j + 16 * l), count)
                if const_expr(self.words > 0):
                    self.issue_scales(ring - self.home() * 16 + 4 * self.weight_words, j, block)
            ahead = self.warps * self.blocks
            for r in cutlass.range_constexpr(2):
                rows[r] = rows[r] + 64 * self.format.loads * ahead
            if const_expr(self.words > 0):
                for i in cutlass.range_constexpr(self.items):
                    scales[i] = scales[i] + self.scale_offset(ahead)
            at[2] = at[2] + 1
            if at[2] == self.steps:
                at[2] = 0
                at[1] = at[1] + 1
                if at[1] == self.segments:
                    at[1] = 0
                    at[0] = at[0] + self.grid
        cute.arch.cp_async_commit_group()

    def home(self):
        """Where a thread's 16 bytes lie among those of its warp. Of four-bit rows, a quad reads the four runs that share a
        scale: turned so that neither writing nor reading meets in one bank."""
        return self.turned(self.t) if stored.BITS[self.format.name] == 4 else self.lane

    def turned(self, place):
        """The 16 bytes at a place of row g."""
        return self.g * 4 + (place ^ (self.g // 2))

    def scale_offset(self, block):
        """Bytes from the first scale of a row to that of a block."""
        if self.format.name == "fp8":
            return block * self.format.block // 128 * (1 if self.format.e8m0 else 4)
        return block * (self.format.block // stored.GROUP[self.format.name])

    @cute.jit
    def rebase(self):
        """Addresses at the beginning of a segment."""
        rows, scales, start = self.rows, self.scales, self.warp * self.blocks
        for r in cutlass.range_constexpr(2):
            base, row, _, _ = self.place(self.at[0], self.at[1], r)
            within = start * (64 * self.format.loads) + self.t * (16 * self.format.loads)
            rows[r] = base + Int64(row) * self.row_bytes + within
        if const_expr(self.words > 0):
            for i in cutlass.range_constexpr(self.items):
                item = i * 4 + self.t
                first = item < self.words + self.shifted
                _, row_0, base_0, _ = self.place(self.at[0], self.at[1], 0)
                _, row_1, base_1, _ = self.place(self.at[0], self.at[1], 1)
                row, base = (row_0 if first else row_1), (base_0 if first else base_1)
                if const_expr(self.format.name == "fp8"):
                    row = row // 128
                scales[i] = base + Int64(row) * self.scale_row + self.scale_offset(start)

    @cute.jit
    def issue_scales(self, ring, j: int, block):
        """Words of the scales of rows g and g + 8; with them, where in the first word they begin."""
        per_row = self.words + self.shifted
        for i in cutlass.range_constexpr(self.items):
            item = i * 4 + self.t
            wanted = item < 2 * per_row
            if const_expr(not self.exact):
                wanted = wanted and block * self.format.block < self.K
            if wanted:
                r, w = item // per_row, item % per_row
                begin = self.scales[i] + self.scale_offset(j)
                target = ring + (((j * 2 + r) * (self.words + 1) + w) * 8 + self.g) * 4
                if const_expr(not self.shifted):
                    stored.fetch_word(target, begin + 4 * w)
                elif w < self.words:
                    _, _, _, end_0 = self.place(self.at[0], self.at[1], 0)
                    _, _, _, end_1 = self.place(self.at[0], self.at[1], 1)
                    last = (end_0 - 1 if r == 0 else end_1 - 1) & Int64(-4)
                    word = (begin & Int64(-4)) + 4 * w
                    stored.fetch_word(target, word if word < last else last)
                else:
                    stored.put_word(target, Int32(begin & Int64(3)) * 8)

    # the products

    @cute.jit
    def consume(self, sums, slot, segment, step):
        """Add the products of a stage to the four sums of a thread: rows g and g + 8, vectors 2t and 2t + 1."""
        size = self.weight_words + self.scale_words
        begin = (self.warp * self.stages + slot) * size
        for j in cutlass.range_constexpr(self.blocks):
            block = (step * self.warps + self.warp) * self.blocks + j
            if const_expr(not self.exact):
                if block * self.format.block < self.K:
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
                    if const_expr(self.K % f.block != 0):
                        here = block * f.block + c * 32 < self.K
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

    @cute.jit
    def scale_of(self, begin, j: int, r: int):
        """The scales of row g (r = 0) or g + 8 in a block: fp8 one number, else the words of their bytes."""
        base = begin + self.weight_words + (j * 2 + r) * (self.words + 1) * 8 + self.g
        words = [self.ring[base + w * 8] for w in range(self.words)]
        if const_expr(self.shifted):
            shift = self.ring[base + self.words * 8]
            if const_expr(self.format.name != "fp8"):
                low = words
                words = []
                for w in cutlass.range_constexpr(self.words - 1):
                    text = "shf.r.wrap.b32 $0, $1, $2, $3;"
                    words.append(Int32(stored.assembled("i32", text, "=r,r,r,r", low[w], low[w + 1], shift)))
            else:
                byte = (words[0] >> shift) & 0xFF
                bits = byte << 23
                bits = Int32(0x7FC00000) if byte == 255 else bits
                bits = Int32(0x00400000) if byte == 0 else bits
                words = [stored.as_float(bits)]
        elif const_expr(self.format.name == "fp8"):
            words = [stored.as_float(words[0])]
        return words

    # the whole

    @cute.jit
    def tile_sums(self, sums, slot):
        """Go through all stages of one tile; returns the slot after the last."""
        sums.fill(0.0)
        self.nan = cute.make_rmem_tensor((2,), Int32)
        self.nan.fill(0)
        for segment in cutlass.range(self.segments, unroll=1):
            for step in cutlass.range(self.steps, unroll=1):
                cute.arch.cp_async_wait_group(self.stages - 2)
                cute.arch.sync_warp()
                before = slot - 1 if slot > 0 else Int32(self.stages - 1)
                self.issue(before)  # what lay there was consumed one step ago
                self.consume(sums, slot, segment, step)
                slot = slot + 1 if slot < self.stages - 1 else Int32(0)
        if const_expr(self.format.name == "fp8"):
            for r in cutlass.range_constexpr(2):
                seen = self.nan[r] & (0x80808080 - 2**32)
                seen = seen | cute.arch.shuffle_sync_bfly(seen, 1)
                seen = seen | cute.arch.shuffle_sync_bfly(seen, 2)
                for i in cutlass.range_constexpr(2):
                    sums[2 * r + i] = Float32(float("nan")) if seen != 0 else sums[2 * r + i]
        return slot

    @cute.jit
    def gather(self, sums, parity, thread):
        """Partial sums of all warps into shared memory; after this, `total` may be asked."""
        partial = self.partial
        for i in cutlass.range_constexpr(4):
            m = 2 * self.t + i % 2
            if m < self.M:
                partial[((parity * self.warps + self.warp) * self.M + m) * ROWS + self.g + i // 2 * 8] = sums[i]
        cute.arch.barrier()

    def total(self, parity, m, row):
        """Of row `row` of the tile and vector m: the warps' sums in their order."""
        result = Float32(0.0)
        for w in range(self.warps):
            result = result + self.partial[((parity * self.warps + w) * self.M + m) * ROWS + row]
        return result


@dataclass(frozen=True)
class Shape:
    """y[g, m] = W[g] x[g, m]: G groups of R rows of K columns. `dtype` of x and `out` of y: bf16 or fp32; `format` of the
    weight as in `stored.BITS`, e8m0: whether fp8's scales are bytes. M at most 8; rows of the weight 16-byte aligned."""

    M: int
    G: int
    R: int
    K: int
    format: str
    e8m0: bool
    dtype: str
    out: str

    @property
    def work(self) -> Work:
        return Work(self.format, self.e8m0, self.dtype, self.M, self.K, 1, -(-self.R // ROWS), self.G)


class Linear(Stream):
    def __init__(self, shape: Shape, config: Config):
        super().__init__(shape.work, config)
        self.G, self.R, self.out = shape.G, shape.R, DTYPES[shape.out]
        self.early = (
            config.resident == 1
        )  # starts under the kernel before it; smaller blocks would come to lie unevenly
        self.scale_row, self.scale_matrix = self.format.scale_bytes(shape.G * shape.R, shape.K)

    @cute.jit
    def __call__(self, x: cute.Tensor, weight: cute.Tensor, scale, scale_2, y: cute.Tensor, stream):
        self.kernel(x, weight, scale, scale_2, y).launch(
            grid=[self.grid, self.G, 1], block=[self.threads, 1, 1], stream=stream, use_pdl=self.early
        )

    def place(self, tile, segment, r: int):
        """Address of the matrix, row of it; address of its scales, and where they end."""
        row = self.group * self.R + cutlass.min(tile * ROWS + r * 8 + self.g, self.R - 1)
        return self.weight_at, row, self.scale_at, self.scale_at + self.scale_matrix

    @cute.kernel
    def kernel(self, x, weight, scale, scale_2, y):
        thread, _, _ = cute.arch.thread_idx()
        first, group, _ = cute.arch.block_idx()
        warp, lane = cute.arch.make_warp_uniform(thread // LANES), thread % LANES
        self.allocate()
        self.group, self.weight_at = group, weight.iterator.toint()
        self.scale_at = self.weight_at
        if const_expr(scale is not None):
            self.scale_at = scale.iterator.toint()
        if const_expr(self.early):
            if thread < ROWS:  # L2 may have the first rows before what runs now is through; nothing else may be touched
                row = group * self.R + cutlass.min(first * ROWS + thread, self.R - 1)
                ahead = Int32(min(self.row_bytes, AHEAD))
                stored.fetch_to_l2(self.weight_at + Int64(row) * self.row_bytes, ahead)
            cute.arch.griddepcontrol_launch_dependents()
            cute.arch.griddepcontrol_wait()
        self.begin(first, warp, lane)
        for s in cutlass.range_constexpr(self.stages - 1):
            self.issue(Int32(s))
        self.stage_vectors(x[group, None, None], None, thread)
        by = Float32(self.back)
        if const_expr(scale_2 is not None):
            by = by * scale_2[0]
        cute.arch.barrier()
        sums = cute.make_rmem_tensor((4,), Float32)
        slot, parity = Int32(0), Int32(0)
        for tile in cutlass.range(first, self.tiles, self.grid, unroll=1):
            slot = self.tile_sums(sums, slot)
            self.gather(sums, parity, thread)
            for i in cutlass.range_constexpr(-(-self.M * ROWS // self.threads)):
                index = i * self.threads + thread
                m, row = index // ROWS, index % ROWS
                if m < self.M and tile * ROWS + row < self.R:
                    y[group, m, tile * ROWS + row] = (self.total(parity, m, row) * by).to(self.out)
            parity = parity ^ 1


def program(shape: Shape, config: Config):
    """x [G, M, K], weight [G R, row] of 32-bit words, scale (bytes, or fp32) or None, scale_2 [1] fp32 or None
    -> y [G, M, R]."""
    words = stored.Format(shape.format).row_bytes(shape.K) // 4
    arguments = (
        fake(DTYPES[shape.dtype], shape.G, shape.M, shape.K),
        fake(Int32, shape.G * shape.R, words),
        scale_argument(shape.format, shape.e8m0),
        fake(Float32, 1, align=4) if shape.format == "nvfp4" else None,
        fake(DTYPES[shape.out], shape.G, shape.M, shape.R, align=DTYPES[shape.out].width // 8),
        stream(),
    )
    return Linear(shape, config), arguments


def scale_argument(format: str, e8m0: bool):
    """Scales, flat; bytes as such, but beginning at a word."""
    if format not in stored.GROUP:
        return None
    return fake(cutlass.Float32 if format == "fp8" and not e8m0 else cutlass.Uint8, cute.sym_int(), align=4)


def configs(shape: Shape) -> Iterator[Config]:
    return configs_of(shape.work)


KERNEL = Kernel("gemv", __file__, program, configs)


def launch(shape: Shape, x, weight, scale, scale_2, y) -> None:
    """See `program`."""
    KERNEL.launcher(shape)(x, weight, scale, scale_2, y)
