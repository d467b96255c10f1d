"""What all kernels share that multiply few vectors by stored matrices at the speed of memory.

A block of warps computes a tile of rows at a time: 16 of them, and its warps split K; or 64 and more, and teams of warps do.
Each warp keeps a ring of stages in shared memory full with asynchronous copies that it alone waits for, across tiles too, so
that the memory system never drains. Partial sums are added as a tree, which is the same if half as many teams have two sums
each (`chains`). The blocks of a cluster may split K in turn: they give their sums to each other, and at the end add them up in
their order. Which configurations give the same bits is in `division`.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, const_expr

from dsv4_compile.kernel import arch
from dsv4_compile.kernels import digits, pairs, stored, warps
from dsv4_compile.kernels.stored import LANES

ROWS = 16  # of a warp
TEAM = 4  # warps whose rows one instruction of `digits` takes
AHEAD = 1024  # bytes of a row that go to L2 first
LINE = 128  # bytes of one
LONG = 4096  # numbers of vectors that a block stages
SMS = 132  # processors that the cost model reckons with
SHARED = 227 << 10  # bytes of a block at most
DTYPES = {"bf16": BFloat16, "fp32": Float32}
ONE_MORE = 77 << 10  # bytes of a block of which only two fit


def processors(split: int) -> int:
    """Those that clusters of so many blocks reach: a cluster lies within a group of 16 or 18, some of which are defective."""
    return SMS if split <= 2 else 112


@dataclass(frozen=True)
class Config:
    """warps: of a block. stages: of a warp's ring. blocks: of the format's blocks of K in a stage. resident: thread blocks of
    a processor, which is what the grid is sized for. rows: of a tile, 16, or fours of them. split: blocks of a cluster.
    chains: sums of a warp, to which its stages go in turn. spread: whether `digits` may do so with a single vector."""

    warps: int
    stages: int
    blocks: int
    resident: int
    rows: int = ROWS
    split: int = 1
    chains: int = 1
    spread: bool = True

    @property
    def teams(self) -> int:
        """Between which K is split."""
        return self.warps * ROWS // self.rows

    @property
    def overlaps(self) -> bool:
        """Whether it starts under the launch before it; several blocks of a processor would come to lie unevenly."""
        return self.resident == 1


@dataclass(frozen=True)
class Work:
    """What a kernel streams: `rows` of K columns in `segments` (matrices one after the other, each with its own columns),
    times M vectors, `grids` times (groups, choices, tokens). splits: blocks that may share a row. each: grids of a token, or 0
    where the vectors are the tokens. parts: matrices of so many rows, tiled one after the other."""

    format: str
    e8m0: bool
    dtype: str
    M: int
    K: int
    segments: int
    rows: int
    grids: int
    splits: int = 8
    each: int = 0
    parts: int = 1

    def of(self, tokens: int) -> "Work":
        """The same for another number of tokens."""
        return replace(self, grids=tokens * self.each) if self.each else replace(self, M=tokens)

    @cached_property
    def stored(self) -> stored.Format:
        return stored.Format(self.format, self.e8m0)

    @property
    def bytes(self) -> float:
        """Of all matrices, scales included."""
        row = self.segments * self.stored.row_bytes(self.K) * (1 + self.stored.scale_share)
        return row * self.rows * self.parts * self.grids

    def tiles(self, config: Config) -> int:
        return self.parts * -(-self.rows // config.rows)

    def part(self, config: Config) -> int:
        """Columns of a segment that a block of a cluster has."""
        return self.K // config.split

    def steps(self, config: Config) -> int:
        """Stages that a warp goes through for one segment of one tile."""
        return -(-self.part(config) // self.dealt(config)) * config.chains

    def dealt(self, config: Config) -> int:
        """Columns of which each sum of a block gets one stage."""
        return self.stored.block * config.blocks * config.teams * config.chains

    def columns(self, config: Config) -> int:
        """A block's part of a segment, filled up."""
        return self.steps(config) * config.blocks * config.teams * self.stored.block

    def stage_words(self, config: Config) -> tuple[int, int]:
        """32-bit words of weights and of scales in one stage of one warp."""
        words = self.stored.scale_words(self.K)
        scales = 2 * 8 * (words + 1) if words else 0  # and where they begin
        return config.blocks * 2 * self.stored.loads * LANES * 4, config.blocks * scales

    def shared(self, config: Config) -> int:
        """Bytes of shared memory of a block."""
        return max(self.needed(config), ONE_MORE) if config.overlaps else self.needed(config)

    def needed(self, config: Config) -> int:
        """Bytes of shared memory that are used."""
        ring = config.warps * config.stages * sum(self.stage_words(config)) * 4
        columns = self.segments * self.columns(config)
        if config.rows == ROWS:
            vectors = pairs.vector_bytes(self.dtype, self.M, columns)
        else:
            vectors = digits.vector_bytes(self.format, self.M, columns)
        kept = config.split * self.turns(config) * self.M * config.rows * 4 if config.split > 1 else 0
        sums = 2 * config.teams * self.M * self.sums_of_vector(config) * 4
        return ring + vectors + sums + kept + 8 * self.segments + 16 * self.parts + 256

    def sums_of_vector(self, config: Config) -> int:
        """Room for those of a tile: between two vectors so much that no two threads of a quad meet in a bank."""
        return config.rows + (0 if self.M == 1 else 4 if config.rows == ROWS else 8)

    def grid(self, config: Config) -> int:
        """Thread blocks of one group, or clusters."""
        there = processors(config.split) * config.resident
        return min(self.tiles(config), max(1, there // (self.grids * config.split)))

    def turns(self, config: Config) -> int:
        """Tiles of the block that has most."""
        return -(-self.tiles(config) // self.grid(config))

    def fits(self, config: Config) -> bool:
        wide = config.rows > ROWS
        if not wide and self.M > pairs.MOST:
            return False
        if wide and not (self.dtype == "bf16" and self.format in digits.BACK and arch().startswith("sm_90")):
            return False
        if config.teams == 0 or config.split > self.splits or config.resident * config.warps > 48:
            return False
        part, many = self.part(config), config.resident
        if wide and (part % self.dealt(config) or config.blocks * self.stored.block % digits.POINT):
            return False
        if config.split > 1 and (self.K % config.split or part % 128):
            return False
        return many * (self.shared(config) + 1024) <= SHARED + 1024

    def pays(self, config: Config) -> bool:
        """What is small is not worth a cluster."""
        return config.split == 1 or self.grid(config) * self.grids * config.split >= 64

    def spreads(self, config: Config) -> bool:
        """Whether columns of a single vector lie apart: see `digits`."""
        return config.rows > ROWS and config.spread and digits.spread(self.format, self.M)


class Stream:
    """The part that all kernels of this kind share. They say where rows are (`place`), and what becomes of sums (`put`); what
    is computed with, `Pairs` or `Digits`, is the other half of their class: see `kind`."""

    def __init__(self, work: Work, config: Config):
        self.work, self.config, self.format = work, config, work.stored
        self.M, self.K, self.segments = work.M, work.K, work.segments
        self.tiles, self.grid, self.turns = work.tiles(config), work.grid(config), work.turns(config)
        self.warps, self.teams, self.stages, self.blocks = config.warps, config.teams, config.stages, config.blocks
        self.rows_of_tile, self.split, self.chains = config.rows, config.split, config.chains
        self.sums_of_vector = work.sums_of_vector(config)
        self.threads = LANES * config.warps
        self.steps, self.columns, self.part = work.steps(config), work.columns(config), work.part(config)
        self.weight_words, self.scale_words = work.stage_words(config)
        self.words = self.format.scale_words(work.K)
        self.dtype = DTYPES[work.dtype]
        self.row_bytes = self.format.row_bytes(work.K)
        self.exact = self.columns == self.part
        # scales may begin within a word
        self.shifted = self.words > 0 and not (self.words == 1 and work.format == "fp8" and not work.e8m0)
        # In the last block of four bits what is behind the row's own scales, which zeros are multiplied by, must not be NaN.
        self.cut = False
        if work.format in ("mxfp4", "nvfp4"):
            self.shifted = (work.K // stored.GROUP[work.format]) % 4 != 0
            self.cut = self.part % self.format.block != 0
        self.scale_row, self.scale_matrix = 0, 0
        self.overlaps, self.vectors_first = config.overlaps, False
        # Of fp8, eight rows of a warp have one scale. Blocks that have one; whether a copy takes two blocks of four rows.
        self.alike, self.every, self.paired = work.format == "fp8", 1, False
        self.prepare()

    def allocate(self, arena=None):
        """Memory of a block: all that it gets, or of an `arena` that somebody else made."""
        smem = cutlass.memory.SmemAllocator() if arena is None else arena
        self.ring = smem.allocate_tensor(
            Int32, cute.make_layout((self.warps * self.stages * (self.weight_words + self.scale_words),)), 128
        )
        self.allocate_vectors(smem)
        self.partial = smem.allocate_tensor(
            Float32, cute.make_layout((2 * self.teams * self.M * self.sums_of_vector,)), 16
        )
        if const_expr(self.split > 1):
            sums = self.turns * self.M * self.rows_of_tile
            self.kept = smem.allocate_tensor(Float32, cute.make_layout((sums, self.split)), 16)
            self.arrived = smem.allocate_tensor(Int64, cute.make_layout((1,)), 8).iterator
        room = ONE_MORE - self.work.needed(self.config)
        if const_expr(self.overlaps and room > 0 and arena is None):
            smem.allocate_tensor(Int32, cute.make_layout((room // 4,)), 16)
        return smem

    def follow(self):
        """Wait for the launch before; the next one may come."""
        if self.overlaps:
            cute.arch.griddepcontrol_wait()
            cute.arch.griddepcontrol_launch_dependents()

    @cute.jit
    def enter(self, thread, early):
        """Fill the rings: at once, where no launch that may still run writes what is read (`early`), else behind the launch
        before, while the first rows go to L2, which sees what that one writes. Then wait for it in any case."""
        if const_expr(self.overlaps):
            if early == 0:
                self.fetch_ahead(thread)
                cute.arch.griddepcontrol_wait()
        self.fill()
        self.follow()

    def fetch_row(self, weight, row):
        """The beginning of this block's part of a row."""
        size = self.format.row_bytes(self.part)
        stored.fetch_to_l2(weight + Int64(row) * self.row_bytes + self.rank * size, Int32(min(size, AHEAD)))

    @cute.jit
    def eight(self, x, m, index):
        """Eight numbers of vector m, from 8 index on, as 32-bit words. Kernels that make their vectors as they go say how."""
        return cute.recast_tensor(loaded(x[m, None], index, self.dtype), Int32)

    # the ring

    def begin(self, thread, block):
        """State of the copies: the next tile, segment and step; addresses of the two rows, and of the scales."""
        self.first, self.rank = block // self.split, block % self.split
        if const_expr(self.split > 1):
            self.open(thread)
        self.from_column = self.rank * self.part
        self.warp, self.lane = cute.arch.make_warp_uniform(thread // LANES), thread % LANES
        self.g, self.t = self.lane // 4, self.lane % 4
        per_team = self.rows_of_tile // ROWS
        self.team, self.member = self.warp // per_team, self.warp % per_team
        self.at = cute.make_rmem_tensor((3,), Int32)
        self.at[0], self.at[1], self.at[2] = self.first, 0, 0
        size = 4 * (self.weight_words + self.scale_words)
        self.ring_at = self.ring.iterator.toint() + self.warp * (self.stages * size)
        self.rows = cute.make_rmem_tensor((4 if self.paired else 2,), Int64)
        self.items = max(1, -(-2 * (self.words + self.shifted) // 4))
        self.scales = cute.make_rmem_tensor((self.items,), Int64)
        self.rows.fill(0)
        self.scales.fill(0)

    @cute.jit
    def open(self, thread):
        """Others may write here from now on."""
        if thread == 0:
            cute.arch.mbarrier_init(self.arrived, 1)
            cute.arch.mbarrier_init_fence()
        cute.arch.cluster_arrive_relaxed()

    def fill(self):
        """Start the copies of all stages but one, or of the first alone: see `fill_rest`."""
        for s in range(1 if self.vectors_first else self.stages - 1):
            self.issue(Int32(s))

    @property
    def long_to_stage(self) -> bool:
        """Whether vectors take longer than first rows: then memory is idle less if they come first. A cluster takes its time
        anyway."""
        return self.rows_of_tile > ROWS and self.M * self.segments * self.columns >= (
            LONG if self.split == 1 else 2 * LONG
        )

    def fill_rest(self):
        """Where vectors come first, `stage_vectors` calls this once they are on their way: behind full rings they wait."""
        if self.vectors_first:
            for s in range(1, self.stages - 1):
                self.issue(Int32(s))

    @cute.jit
    def issue(self, slot):
        """Start the copies of the next stage, if there is one."""
        at, rows, scales = self.at, self.rows, self.scales
        if at[0] < self.tiles:
            if at[2] == 0:
                self.rebase()
            ring = self.ring_at + slot * (4 * (self.weight_words + self.scale_words))
            if const_expr(self.paired):
                for i in cutlass.range_constexpr(4):
                    home = ring + self.unit(i // 2, self.eighth(i), self.lane % 8) * 16
                    for p in cutlass.range_constexpr(self.blocks // 2):
                        stored.fetch(home + p * (4 * LANES * 16), rows[i] + LINE * p, Int32(16))
            for j in cutlass.range_constexpr(self.blocks):
                block = (at[2] * self.teams + self.team) * self.blocks + j
                if const_expr(not self.paired):
                    self.issue_block(ring + self.home() * 16, j, block)
                if const_expr(self.words > 0 and j % self.every == 0):
                    self.issue_scales(ring + 4 * self.weight_words, j, block)
            ahead = self.teams * self.blocks
            for r in cutlass.range_constexpr(cute.size(rows)):
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

    @cute.jit
    def issue_block(self, ring, j: int, block):
        """A thread's 16 bytes of rows g and g + 8, as many times as it has some."""
        count = Int32(16)
        if const_expr(not self.exact):
            column = block * self.format.block + self.t * (self.format.block // 4)
            count = Int32(16) if column < self.part else Int32(0)
        for r in cutlass.range_constexpr(2):
            for l in cutlass.range_constexpr(self.format.loads):
                place = ((j * 2 + r) * self.format.loads + l) * LANES * 16
                stored.fetch(ring + place, self.rows[r] + (64 * self.format.loads * j + 16 * l), count)

    def eighth(self, i: int):
        """Which of eight rows this thread copies of the i-th four of a warp's rows: copies of whole lines, which the first
        cache passes on at twice the speed of halves."""
        return 4 * (i % 2) + self.lane // 8

    def unit(self, r: int, row, place):
        """Where the 16 bytes at a place of a line of two blocks lie, of row `row` of the first (r = 0) or the second eight: so
        that neither a row's eight places, nor four of two rows each, nor one of all rows meet in a bank."""
        return r * 64 + row * 8 + (place ^ ((row & 1) << 2 | row >> 1))

    def home(self):
        """Where a thread's 16 bytes lie among those of its warp. Where a quad reads in turn the runs of four-bit rows that
        share a scale: turned so that neither writing nor reading meets in one bank."""
        return self.turned(self.t) if self.in_turn else self.lane

    def turned(self, place):
        """The 16 bytes at a place of row g."""
        return self.g * 4 + (place ^ (self.g // 2))

    def scale_offset(self, block):
        """Bytes from the first scale of a row to that of a block."""
        if self.format.name == "fp8":
            return block * self.format.block // 128 * (1 if self.format.e8m0 else 4)
        return block * (self.format.block // stored.GROUP[self.format.name])

    def own(self, r: int):
        """See `place`: of rows g and g + 8, of the tile and the segment that copies are at."""
        return self.place(self.at[0], self.at[1], r, self.g)

    @cute.jit
    def rebase(self):
        """Addresses at the beginning of a segment."""
        rows, scales, start = self.rows, self.scales, self.team * self.blocks + self.from_column // self.format.block
        for r in cutlass.range_constexpr(cute.size(rows)):
            base, row, _, _ = self.place(self.at[0], self.at[1], r // 2, self.eighth(r)) if self.paired else self.own(r)
            within = self.lane % 8 * 16 if self.paired else self.t * (16 * self.format.loads)
            rows[r] = base + Int64(row) * self.row_bytes + (start * (64 * self.format.loads) + within)
        if const_expr(self.words > 0):
            for i in cutlass.range_constexpr(self.items):
                item = i * 4 + self.t
                first = item < self.words + self.shifted
                _, row_0, base_0, _ = self.own(0)
                _, row_1, base_1, _ = self.own(1)
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
            if const_expr(self.alike):
                wanted = wanted and self.g == 0
            if const_expr(not self.exact):
                wanted = wanted and block * self.format.block < self.part
            if wanted:
                r, w = item // per_row, item % per_row
                begin = self.scales[i] + self.scale_offset(j)
                target = ring + (((j * 2 + r) * (self.words + 1) + w) * 8 + self.g) * 4
                if const_expr(not (self.shifted or self.cut)):
                    stored.fetch_word(target, begin + 4 * w)
                elif w < self.words:
                    self.fetch_scales(target, begin, r, w)
                else:
                    warps.store(target, Int32(begin & Int64(3)) * 8)

    @cute.jit
    def fetch_scales(self, target, begin, r, w):
        """The w-th word of them, with zeros behind those of the row if its last block is cut short."""
        _, row_0, base_0, end_0 = self.own(0)
        _, row_1, base_1, end_1 = self.own(1)
        word = (begin & Int64(-4)) + 4 * w if const_expr(self.shifted) else begin + 4 * w
        if const_expr(self.cut):
            row, base = (row_0 if r == 0 else row_1), (base_0 if r == 0 else base_1)
            there = Int32(base + Int64(row + 1) * self.scale_row - word)
            stored.fetch_part(target, word, cutlass.max(cutlass.min(there, 4), 0))
        else:
            last = (end_0 - 1 if r == 0 else end_1 - 1) & Int64(-4)
            stored.fetch_word(target, word if word < last else last)

    @cute.jit
    def scale_of(self, begin, j: int, r: int):
        """The scales of row g (r = 0) or g + 8 in a block: fp8 one number, else the words of their bytes."""
        base = begin + self.weight_words + (j * 2 + r) * (self.words + 1) * 8 + (0 if self.alike else self.g)
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
        """Go through all stages of one tile; returns the slot after the last. sums [numbers, chains]: at the end the first has
        all of them."""
        self.start(sums)
        for segment in cutlass.range(self.segments, unroll=1):
            for first in cutlass.range(0, self.steps, self.chains, unroll=1):
                for chain in cutlass.range_constexpr(self.chains):
                    cute.arch.cp_async_wait_group(self.stages - 2)
                    cute.arch.sync_warp()
                    before = slot - 1 if slot > 0 else Int32(self.stages - 1)
                    self.issue(before)  # what lay there was consumed one step ago
                    self.consume(sums[None, chain], slot, segment, first + chain)
                    slot = slot + 1 if slot < self.stages - 1 else Int32(0)
        for chain in cutlass.range_constexpr(self.chains):
            self.finish(sums[None, chain])
        for i in cutlass.range_constexpr(self.sums):
            sums[i, 0] = tree([sums[i, chain] for chain in range(self.chains)])
        return slot

    @cute.jit
    def run(self, thread):
        """All tiles of this block."""
        sums = cute.make_rmem_tensor((self.sums, self.chains), Float32)
        slot, parity, turn = Int32(0), Int32(0), Int32(0)
        if const_expr(self.split > 1):
            cute.arch.cluster_wait()
        for tile in cutlass.range(self.first, self.tiles, self.grid, unroll=1):
            self.before(tile)
            slot = self.tile_sums(sums, slot)
            base = (parity * self.teams + self.team) * (self.M * self.sums_of_vector) + self.member * ROWS
            self.put_partial(sums[None, 0], base)
            cute.arch.barrier()
            self.emit(tile, turn, parity, thread)
            parity, turn = parity ^ 1, turn + 1
        if const_expr(self.split > 1):
            self.exchange(thread, turn)

    @cute.jit
    def before(self, tile):
        """Of each tile."""

    @cute.jit
    def emit(self, tile, turn, parity, thread):
        """What the teams have of a tile, added up; with a cluster, for the block that adds up what all of its blocks have."""
        count = self.M * self.rows_of_tile
        for i in cutlass.range_constexpr(-(-count // self.threads)):
            index = i * self.threads + thread
            if index < count:
                m, row = index // self.rows_of_tile, index % self.rows_of_tile
                if const_expr(self.split > 1):
                    place = turn * count + index
                    at = self.kept.iterator.toint() + 4 * (self.rank * self.turns * count + place)
                    block = place // self.threads % self.split
                    barrier = warps.of_block(self.arrived.toint(), block)
                    warps.send(warps.of_block(at, block), self.total(parity, m, row), barrier)
                else:
                    self.put(tile, m, row, self.total(parity, m, row))

    def total(self, parity, m, row):
        """Of row `row` of the tile and vector m: the teams' sums."""
        first = parity * self.teams
        return tree([self.partial[((first + w) * self.M + m) * self.sums_of_vector + row] for w in range(self.teams)])

    @cute.jit
    def exchange(self, thread, turns):
        """Add up what the blocks of the cluster have of `turns` tiles; each finishes a share of it."""
        per_tile, step = self.M * self.rows_of_tile, self.threads * self.split
        if thread == 0:
            count = turns * per_tile
            rest = cutlass.min(cutlass.max(count % step - self.rank * self.threads, 0), self.threads)
            mine = count // step * self.threads + rest
            cute.arch.mbarrier_arrive_and_expect_tx(self.arrived, 4 * self.split * mine)
        warps.wait_for_sent(self.arrived.toint(), 0)
        for i in cutlass.range_constexpr(-(-self.turns * per_tile // step)):
            index = i * step + self.rank * self.threads + thread
            turn, place = index // per_tile, index % per_tile
            tile = self.first + turn * self.grid
            if index < self.turns * per_tile:
                if tile < self.tiles:
                    total = Float32(0.0)
                    for b in cutlass.range_constexpr(self.split):
                        total = total + self.kept[index, b]
                    self.put(tile, place // self.rows_of_tile, place % self.rows_of_tile, total)


def tree(numbers):
    """The sum of a power of two of numbers: one half is added to the other, and so on. Sum c of team t is number
    c teams + t, so that the teams begin this, each with its own sums, and `Stream.total` goes on."""
    while len(numbers) > 1:
        half = len(numbers) // 2
        numbers = [numbers[i] + numbers[i + half] for i in range(half)]
    return numbers[0]


@cute.jit
def loaded(row, index, dtype: cutlass.Constexpr):
    """Eight numbers of a row, from 8 index on."""
    part = cute.make_rmem_tensor((8,), dtype)
    cute.autovec_copy(cute.zipped_divide(row, (8,))[None, index], part)
    return part


def kind(kernel: type, config: Config) -> type:
    """The class of a kernel, with what its configuration computes with."""
    way = pairs.Pairs if config.rows == ROWS else digits.Digits
    return type(kernel.__name__, (way, kernel), {})
