"""The lightning indexer: scores of all entries that a token may see, and the k best of them, as a set in ascending order.

Scores come from tensor cores: a warp keeps the queries of all heads in registers and takes 16 entries at a time, so that
keys go from memory to registers once and nothing but one number of each entry leaves them. That number is an integer which
sorts like the score and is kept in shared memory by a cluster of blocks, each with its part of the entries. The k-th best
is found by its digits, 11 bits at a time: every block counts the digits of its candidates, adds its counts to those of all
blocks, and all blocks come to the same conclusion. At last each block writes its chosen entries behind those of the blocks
before it; of equal ones at the end the lower.

Few tokens with many entries leave most processors without work that way. Then all of them write scores first, by a launch
of its own, which the clusters read. There each lane has a ring in shared memory of what it will itself put into products, so
that several tiles are on their way and nobody waits for another lane.

Keys in e4m3 become bf16 by moving bits, which multiplies them by 2^-120; queries make up for some of it. The scale of an
entry multiplies its score.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, Uint8, Uint32, const_expr

from dsv4_compile.kernel import Kernel, by_twos, fake, rounded, stream
from dsv4_compile.kernels import stored
from dsv4_compile.kernels import warps as of_warp

BINS = 2048
DIGITS = ((21, BINS), (10, BINS), (0, 1024))  # of a score: where each starts, and how many values it has
TILE = 16  # entries of a warp's product
SCORERS = 8  # warps of a block that scores: more would not find the registers
SMS = 132  # processors that the cost model reckons with
MOST_BLOCKS = 16  # of a cluster
AHEAD = 4  # entries of a thread that are looked at together
SHARED = 227 * 1024 - 1024
MOST, MANY = 1 << 22, 1 << 12  # scores that are written: 16 MB; of so many tokens
LARGEST = 319488  # entries that a cluster has room for
RING, DEEPEST = 9 << 14, 8  # bytes of a block's rings, and tiles of one
E4M3 = stored.Format("fp8")
LIFT = stored.Format("fp8").lift  # of queries
LIFTS = (127 + 48) * 0x800080  # a pair of it in bf16


@dataclass(frozen=True)
class Shape:
    """heads: at most 64. d: channels, a multiple of 32 and at most 128. weights: their dtype. rope: trailing channels of the
    queries to turn first, in pairs, a multiple of 8, or 0. keys: "bf16", or "fp8", e4m3 with scales, where d is a multiple of
    64."""

    heads: int
    d: int
    weights: str = "fp32"
    rope: int = 0
    keys: str = "bf16"

    @property
    def row(self) -> int:
        """Bytes of a key."""
        return self.d * (2 if self.keys == "bf16" else 1)

    @property
    def stage(self) -> int:
        """Bytes of a tile in a ring."""
        return TILE * self.row + (0 if self.keys == "bf16" else 128)


@dataclass(frozen=True)
class Config:
    """blocks: of a cluster, which has the entries of a token. room: entries of a block, a multiple of 16. warps: of a block.
    apart: scores by a launch of their own. stages: tiles of a warp's ring, at least 2; 0: one tile ahead, in registers."""

    blocks: int
    room: int
    warps: int
    apart: bool
    stages: int = 0

    def covers(self, entries: int) -> bool:
        return self.blocks * (self.room - TILE) >= entries


class Plan:
    """Where what lies in shared memory, in words."""

    def __init__(self, config: Config):
        self.counts = config.room  # of this block, digit by digit
        self.merged = self.counts + (len(DIGITS) * BINS if config.blocks > 1 else 0)
        self.sums = self.merged + len(DIGITS) * BINS  # of warps, digit by digit
        self.found = self.sums + len(DIGITS) * 32
        self.totals = self.found + len(DIGITS) * 4  # of warps: entries that are better, and that are equal
        self.before = self.totals + 2 * 32  # the same of the cluster's blocks
        self.weights = self.before + 2 * MOST_BLOCKS  # of heads
        self.words = self.weights + 64


def count(address, many, local: bool):
    """Add to a number in shared memory, of this block or at an address that `of_block` gave."""
    space = "shared" if local else "relaxed.cluster.shared::cluster"
    cute.arch.inline_ptx(f"red.{space}.add.u32 [{{$r0}}], {{$r1}};", read_only_args=[address, many])


def store(address, word):
    """Into shared memory of another block."""
    cute.arch.inline_ptx("st.shared::cluster.u32 [{$r0}], {$r1};", read_only_args=[address, word])


def load_pair(address):
    """From shared memory, each time anew: registers that would keep the numbers are needed."""
    return cute.arch.inline_ptx(
        "ld.shared.v2.f32 {{$w0}, {$w1}}, [{$r0}];", write_only_types=[Float32] * 2, read_only_args=[address]
    )


@cute.jit
def sortable(x: Float32) -> Int32:
    """Bits in the order of the floats, as of a number without a sign; both zeros are one."""
    bits = cute.arch.inline_ptx("mov.b32 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[x])
    bits = Int32(0) if bits == Int32(-(2**31)) else bits
    return bits ^ ((bits >> 31) | Int32(-(2**31)))


class Program:
    def __init__(self, shape: Shape, config: Config):
        self.h, self.d, self.rope = shape.heads, shape.d, shape.rope
        self.tiles, self.lines = -(-shape.heads // 8), shape.d // 32  # of 8 heads, of 32 channels
        self.scaled, self.row, self.stage, self.pieces = shape.keys == "fp8", shape.row, shape.stage, shape.row // 64
        self.blocks, self.room, self.apart, self.stages = config.blocks, config.room, config.apart, config.stages
        self.warps, self.threads = config.warps, 32 * config.warps
        self.plan = Plan(config)

    @cute.jit
    def __call__(self, q, keys, scales, w, visible, cos, sin, scores, out, T: Int32, width: Int32, stream):
        N = q.shape[0]
        if const_expr(self.apart):
            self.write_scores(q, keys, scales, w, visible, cos, sin, scores, out.shape[1], T).launch(
                grid=[width, N, 1], block=[32 * SCORERS, 1, 1], min_blocks_per_mp=1, stream=stream, use_pdl=True
            )
        self.select(q, keys, scales, w, visible, cos, sin, scores, out, T).launch(
            grid=[self.blocks * N, 1, 1],
            block=[self.threads, 1, 1],
            cluster=[self.blocks, 1, 1],
            min_blocks_per_mp=1,
            stream=stream,
            use_pdl=True,
        )

    def seen(self, visible, keys, token):
        """Entries that a token may see."""
        return cutlass.min(Int32(visible[token % visible.shape[0]]), keys.shape[1])

    # Scores

    @cute.kernel
    def write_scores(self, q, keys, scales, w, visible, cos, sin, scores, k, T):
        of_warp.follow()
        thread, _, _ = cute.arch.thread_idx()
        block, token, _ = cute.arch.block_idx()
        width, _, _ = cute.arch.grid_dim()
        n = self.seen(visible, keys, token)
        if n > k:
            warp = cute.arch.make_warp_uniform(thread // 32)
            allocator = cutlass.memory.SmemAllocator()
            weights, ring = allocator.allocate_tensor(Float32, cute.make_layout((64,)), 128), Int32(0)
            if const_expr(self.stages > 0):
                words = SCORERS * self.stages * self.stage // 4
                rings = allocator.allocate_tensor(Int32, cute.make_layout((words,)), 128)
                ring = rings.iterator.toint() + warp * (self.stages * self.stage)
            first, last, step = block * SCORERS + warp, cute.ceil_div(n, TILE), width * SCORERS
            target = cute.recast_tensor(scores[token, None], Float32)
            self.score(q, keys, scales, w, cos, sin, weights, ring, token, T, first, last, step, target, 0)

    @cute.jit
    def score(self, q, keys, scales, w, cos, sin, weights, ring, token, T, first, last, step, target, skip):
        """Tiles `first`, `first + step`, ... below `last`, into target[entry - skip]; later tiles are on their way, in the ring
        or in registers."""
        thread, _, _ = cute.arch.thread_idx()
        lane, request = cute.arch.lane_idx(), token // T
        if const_expr(self.stages > 0):
            for i in cutlass.range_constexpr(self.stages - 1):
                self.request_tile(keys, scales, request, first + i * step, last, ring + i * self.stage, lane)
        else:
            here, by = self.load(keys, request, first, lane), self.factor(scales, request, first, lane)
        heads = self.queries(q, cos, sin, token, lane)
        if thread < 64:
            weights[thread] = w[token, thread].to(Float32) if thread < self.h else Float32(0.0)
        cute.arch.barrier()
        if const_expr(self.stages > 0):
            slot = Int32(0)
            for tile in cutlass.range(first, last, step, unroll=1):
                cute.arch.cp_async_wait_group(self.stages - 2)
                entries, times = self.received(ring + slot * self.stage, lane)
                before = slot - 1 if slot > 0 else Int32(self.stages - 1)  # what it held has been used
                coming = tile + (self.stages - 1) * step
                self.request_tile(keys, scales, request, coming, last, ring + before * self.stage, lane)
                self.write(self.products(entries, heads, weights, lane), times, tile, target, skip, lane)
                slot = slot + 1 if slot < self.stages - 1 else Int32(0)
        else:
            for tile in cutlass.range(first, last, step, unroll=1):
                coming, then = (
                    self.load(keys, request, tile + step, lane),
                    self.factor(scales, request, tile + step, lane),
                )
                self.write(self.products(here, heads, weights, lane), by, tile, target, skip, lane)
                here.store(coming.load())
                by = then

    def entry(self, keys, tile, lane, upper):
        """The entry of which a lane has channels, or the one 8 further. Beyond the last entry it is that one."""
        return cutlass.min(tile * TILE + lane // 4 + 8 * upper, keys.shape[1] - 1)

    @cute.jit
    def request_tile(self, keys, scales, request, tile, last, slot, lane):
        """Start to copy a tile into a slot of the ring: each lane what it will read, as `load` has it. In any case a group."""
        if tile < last:
            number = keys.element_type.width // 8
            rows = keys.iterator.toint() + number * (Int64(request) * keys.stride[0]) + 16 * (lane % 4)
            for i in cutlass.range_constexpr(2):
                source = rows + Int64(self.entry(keys, tile, lane, i)) * self.row
                for s in cutlass.range_constexpr(self.pieces):
                    target = slot + (i * self.pieces + s) * 512 + lane * 16
                    of_warp.copy_16(target, source + 64 * s, Int32(16))
            if const_expr(self.scaled):
                place = Int64(request) * scales.stride[0] + self.entry(keys, tile, lane, lane % 2)
                stored.fetch_word(slot + self.pieces * 1024 + lane * 4, scales.iterator.toint() + 4 * place)
        cute.arch.cp_async_commit_group()

    def received(self, slot, lane):
        """A tile out of its slot, as `load` has it, and its factor."""
        part = cute.make_rmem_tensor((4, self.pieces, 2), Int32)
        for i in range(2):
            for s in range(self.pieces):
                words = of_warp.load_four(slot + (i * self.pieces + s) * 512 + lane * 16)
                for j, word in enumerate(words):
                    part[j, s, i] = word
        by = Float32(1.0)
        if self.scaled:
            by = of_warp.load_word(slot + self.pieces * 1024 + lane * 4, True) * Float32(1 / (E4M3.unit * LIFT))
        return part, by

    @cute.jit
    def load(self, keys, request, tile, lane):
        """The entries of a tile: a lane has 16 bytes of each 64, of two entries."""
        many = 128 // keys.element_type.width
        part = cute.make_rmem_tensor((many, self.pieces, 2), keys.element_type)
        for i in cutlass.range_constexpr(2):
            row = cute.zipped_divide(keys[request, self.entry(keys, tile, lane, i), None], (many,))
            for s in cutlass.range_constexpr(self.pieces):
                cute.autovec_copy(row[None, 4 * s + lane % 4], part[None, s, i])
        return cute.recast_tensor(part, Int32)

    def factor(self, scales, request, tile, lane):
        """What makes a score of an entry's products: of lane 0 of four that of the first one, of lane 1 of the second."""
        if not self.scaled:
            return Float32(1.0)
        return scales[request, self.entry(scales, tile, lane, lane % 2)] * Float32(1 / (E4M3.unit * LIFT))

    def run(self, r: int, lane):
        """Which 8 channels of a key are a lane's r-th."""
        return 8 * (r // 2) + 2 * (lane % 4) + r % 2 if self.scaled else 4 * r + lane % 4

    @cute.jit
    def queries(self, q, cos, sin, token, lane):
        """Of all heads, channels as `load` has them; beyond the last head that one again."""
        heads = cute.make_rmem_tensor((8, self.lines, self.tiles), BFloat16)
        for t in cutlass.range_constexpr(self.tiles):
            row = cute.zipped_divide(q[token, cutlass.min(8 * t + lane // 4, self.h - 1), None], (8,))
            for s in cutlass.range_constexpr(self.lines):
                cute.autovec_copy(row[None, self.run(s, lane)], heads[None, s, t])
        if const_expr(self.rope > 0):
            first = self.d - self.rope
            for s in cutlass.range_constexpr(self.lines):
                if const_expr((64 * (s // 2) + 64 if self.scaled else 32 * s + 32) > first):
                    angle = (8 * self.run(s, lane) - first) // 2
                    cosines, sines = cute.make_rmem_tensor((4,), Float32), cute.make_rmem_tensor((4,), Float32)
                    cosines.fill(1.0)
                    sines.fill(0.0)
                    if angle >= 0:
                        for p in cutlass.range_constexpr(4):
                            cosines[p] = cos[token % cos.shape[0], angle + p]
                            sines[p] = sin[token % cos.shape[0], angle + p]
                    for t in cutlass.range_constexpr(self.tiles):
                        x = cute.make_rmem_tensor((8,), Float32)
                        x.store(heads[None, s, t].load().to(Float32))
                        for p in cutlass.range_constexpr(4):
                            a, b = x[2 * p], x[2 * p + 1]
                            x[2 * p] = a * cosines[p] - b * sines[p]
                            x[2 * p + 1] = a * sines[p] + b * cosines[p]
                        heads[None, s, t].store(x.load().to(BFloat16))
        words = cute.recast_tensor(heads, Int32)
        if const_expr(self.scaled):
            pairs = [E4M3.order[i : i + 2] for i in range(0, 8, 2)]  # as decoded keys have them
            for t in cutlass.range_constexpr(self.tiles):
                for s in cutlass.range_constexpr(self.lines):
                    old = [words[p, s, t] for p in range(4)]
                    for p in cutlass.range_constexpr(4):
                        words[p, s, t] = stored.times(stored.picked(old, *pairs[p]), Int32(LIFTS))
        return words

    def decoded(self, part):
        """Pairs of bf16, by runs of 8 channels."""
        if not self.scaled:
            return part
        out = cute.make_rmem_tensor((4, self.lines, 2), Int32)
        for i in range(2):
            for s in range(self.pieces):
                for j in range(4):
                    for p, word in enumerate(stored.e4m3(part[j, s, i])):
                        out[2 * (j % 2) + p, 2 * s + j // 2, i] = word
        return out

    @cute.jit
    def products(self, entries, heads, weights, lane):
        """Scores of two entries: sum_h weight relu(product). Where a product's 16 channels lie does not matter as long as both
        factors have them in the same places."""
        a, b = self.decoded(entries), heads
        low, high = Float32(0.0), Float32(0.0)
        together = 4  # sums that do not wait for each other
        for first in cutlass.range_constexpr(0, self.tiles, together):
            tiles = range(first, min(first + together, self.tiles))
            sums = cute.make_rmem_tensor((4, together), Float32)
            sums.fill(0.0)
            for s in cutlass.range_constexpr(self.lines):
                for p in cutlass.range_constexpr(0, 4, 2):
                    rows = [a[p, s, 0], a[p, s, 1], a[p + 1, s, 0], a[p + 1, s, 1]]
                    for t in tiles:
                        of_warp.multiply(sums[None, t - first], rows, b[p, s, t], b[p + 1, s, t])
            for t in tiles:
                pair = load_pair(weights.iterator.toint() + 4 * (8 * t + 2 * (lane % 4)))
                for i, weight in enumerate(pair):
                    low = low + cute.arch.fmax(sums[i, t - first], Float32(0.0)) * weight
                    high = high + cute.arch.fmax(sums[2 + i, t - first], Float32(0.0)) * weight
        for offset in (1, 2):
            low = low + cute.arch.shuffle_sync_bfly(low, offset)
            high = high + cute.arch.shuffle_sync_bfly(high, offset)
        return low, high

    @cute.jit
    def write(self, both, by, tile, target, skip, lane):
        low, high = both
        if lane % 4 < 2:
            score = low if lane % 4 == 0 else high
            if const_expr(self.scaled):
                score = score * by
            place = tile * TILE + lane // 4 + 8 * (lane % 4) - skip
            target[place] = score if const_expr(self.apart) else sortable(score)

    # The best

    @cute.kernel
    def select(self, q, keys, scales, w, visible, cos, sin, scores, out, T):
        if const_expr(not self.apart):
            of_warp.follow()
        thread, _, _ = cute.arch.thread_idx()
        place, _, _ = cute.arch.block_idx()
        rank, token = place % self.blocks, place // self.blocks
        plan, k = self.plan, out.shape[1]
        room = cutlass.memory.SmemAllocator().allocate_tensor(Int32, cute.make_layout((plan.words,)), 128)
        start = room.iterator.toint()
        n = self.seen(visible, keys, token)
        if n <= k:
            if const_expr(self.apart):
                of_warp.follow()  # the launches behind this one rely on it
            for i in cutlass.range(rank * self.threads + thread, k, self.blocks * self.threads):
                out[token, i] = Int64(i) if i < n else Int64(-1)
        else:
            for i in cutlass.range(plan.counts + thread, plan.weights, self.threads):
                room[i] = Int32(0)
            share = cute.ceil_div(cute.ceil_div(n, TILE), self.blocks) * TILE  # entries of a block
            first = rank * share
            mine = cutlass.max(cutlass.min(n - first, share), 0)
            if const_expr(self.apart):
                of_warp.follow()
                self.fetch(cute.recast_tensor(scores[token, None], Float32), first, mine, room, thread)
            else:
                warp = cute.arch.make_warp_uniform(thread // 32)
                tile, last = first // TILE, (first + mine + TILE - 1) // TILE
                weights = cute.make_tensor(
                    cute.recast_ptr(room.iterator + plan.weights, dtype=Float32), cute.make_layout((64,))
                )
                first_tile, step = tile + warp, self.warps
                self.score(q, keys, scales, w, cos, sin, weights, 0, token, T, first_tile, last, step, room, first)
            of_warp.everybody(self.blocks)  # counts are zero, scores are there
            shift, prefix, need = self.threshold(k, mine, room, start, thread)
            self.write_chosen(out[token, None], rank, first, mine, shift, prefix, need, room, start, thread)

    @cute.jit
    def fetch(self, scores, first, mine, room, thread):
        """This block's part of the scores that another launch wrote; of its last 4 words some may be anything."""
        source = cute.zipped_divide(scores, (4,))
        target = cute.zipped_divide(cute.make_tensor(room.iterator, cute.make_layout((self.room,))), (4,))
        for v in cutlass.range(thread, cute.ceil_div(mine, 4), self.threads, unroll=4):
            part, found = cute.make_rmem_tensor((4,), Int32), cute.make_rmem_tensor((4,), Float32)
            cute.autovec_copy(source[None, first // 4 + v], found)
            for j in cutlass.range_constexpr(4):
                part[j] = sortable(found[j])
            cute.autovec_copy(part, target[None, v])

    @cute.jit
    def threshold(self, k, mine, room, start, thread):
        """Digit by digit: shift and prefix, so that what is above `prefix` when shifted is chosen, and of what is equal to it
        the first `need`."""
        plan = self.plan
        shift, prefix, need, done = Int32(32), Uint32(0), Int32(k), Int32(0)
        for p in cutlass.range_constexpr(len(DIGITS)):
            low, bins = DIGITS[p]
            if done == 0:
                merged = plan.merged + p * BINS
                mask = Uint32(bins - 1)
                counts = merged if const_expr(self.blocks == 1) else plan.counts + p * BINS
                for i in cutlass.range(thread, mine, self.threads, unroll=AHEAD):
                    key = Uint32(room[i])
                    if const_expr(p == 0):
                        count(start + 4 * (counts + Int32(key >> Uint32(low))), Int32(1), True)
                    else:
                        if key >> Uint32(DIGITS[p - 1][0]) == prefix:
                            count(start + 4 * (counts + Int32((key >> Uint32(low)) & mask)), Int32(1), True)
                cute.arch.barrier()
                if const_expr(self.blocks > 1):
                    for j in cutlass.range_constexpr(bins // self.threads):
                        here = j * self.threads + thread
                        many = room[counts + here]
                        if many > 0:
                            for b in cutlass.range_constexpr(self.blocks):
                                count(of_warp.of_block(start + 4 * (merged + here), b), many, False)
                    of_warp.everybody(self.blocks)
                digit, above, equal = self.crossing(merged, bins, p, need, room, thread)
                prefix = prefix * Uint32(bins) + Uint32(digit)
                need = need - above
                shift = Int32(low)
                done = Int32(1) if equal == need else Int32(0)
        return shift, prefix, need

    @cute.jit
    def crossing(self, merged, bins, p, need, room, thread):
        """The digit at which the counts, summed from the highest on, reach `need`; the sum above it; its own count."""
        plan, each = self.plan, bins // self.threads
        warp, lane = thread // 32, thread % 32
        own = cute.make_rmem_tensor((each,), Int32)
        total = Int32(0)
        for j in cutlass.range_constexpr(each):
            own[j] = room[merged + bins - 1 - (thread * each + j)]
            total = total + own[j]
        upto = total
        for s in cutlass.range_constexpr(5):
            other = cute.arch.shuffle_sync_up(upto, 1 << s)
            upto = upto + (other if lane >= (1 << s) else Int32(0))
        if lane == 31:
            room[plan.sums + 32 * p + warp] = upto
        cute.arch.barrier()
        for v in cutlass.range_constexpr(self.warps):
            upto = upto + (room[plan.sums + 32 * p + v] if v < warp else Int32(0))
        above = upto - total
        if above < need and need <= upto:
            for j in cutlass.range_constexpr(each):
                if above < need and need <= above + own[j]:
                    room[plan.found + 4 * p] = bins - 1 - (thread * each + j)
                    room[plan.found + 4 * p + 1] = above
                    room[plan.found + 4 * p + 2] = own[j]
                above = above + own[j]
        cute.arch.barrier()
        return tuple(room[plan.found + 4 * p + i] for i in range(3))

    @cute.jit
    def write_chosen(self, out, rank, first, mine, shift, prefix, need, room, start, thread):
        """In order: each warp has consecutive entries, and starts behind the chosen ones of the warps and blocks before it."""
        plan = self.plan
        warp, lane = cute.arch.make_warp_uniform(thread // 32), thread % 32
        share = cute.ceil_div(cute.ceil_div(mine, 32), self.warps) * 32
        begin, end = warp * share, cutlass.min((warp + 1) * share, mine)
        above, equal = Int32(0), Int32(0)
        for i in cutlass.range(begin, end, 32, unroll=AHEAD):
            better, same = self.compared(i + lane, end, shift, prefix, room)
            above, equal = above + cute.arch.popc(better), equal + cute.arch.popc(same)
        if lane == 0:
            room[plan.totals + 2 * warp] = above
            room[plan.totals + 2 * warp + 1] = equal
        cute.arch.barrier()
        above, equal = Int32(0), Int32(0)
        all_above, all_equal = Int32(0), Int32(0)
        for v in cutlass.range_constexpr(self.warps):
            of_above, of_equal = room[plan.totals + 2 * v], room[plan.totals + 2 * v + 1]
            all_above, all_equal = all_above + of_above, all_equal + of_equal
            above, equal = above + (of_above if v < warp else 0), equal + (of_equal if v < warp else 0)
        if const_expr(self.blocks > 1):
            if thread < self.blocks:
                there = of_warp.of_block(start + 4 * (plan.before + 2 * rank), thread)
                store(there, all_above)
                store(there + 4, all_equal)
            of_warp.everybody(self.blocks)
            for b in cutlass.range_constexpr(self.blocks):
                of_above, of_equal = room[plan.before + 2 * b], room[plan.before + 2 * b + 1]
                above, equal = above + (of_above if b < rank else 0), equal + (of_equal if b < rank else 0)
        below = Int32(cute.arch.lanemask_lt())
        for i in cutlass.range(begin, end, 32, unroll=AHEAD):
            better, same = self.compared(i + lane, end, shift, prefix, room)
            at, tied = above + cute.arch.popc(better & below), equal + cute.arch.popc(same & below)
            chosen = (better >> lane) & 1
            if tied < need:
                chosen = chosen | ((same >> lane) & 1)
            if chosen != 0:
                out[at + cutlass.min(tied, need)] = Int64(first + i + lane)
            above, equal = above + cute.arch.popc(better), equal + cute.arch.popc(same)

    @cute.jit
    def compared(self, i, end, shift, prefix, room):
        """Which lanes have an entry above the threshold, and which one at it."""
        better, same = cutlass.Boolean(False), cutlass.Boolean(False)
        if i < end:
            head = Uint32(room[i]) >> Uint32(shift)
            better, same = head > prefix, head == prefix
        return cute.arch.vote_ballot_sync(better), cute.arch.vote_ballot_sync(same)


def program(shape: Shape, config: Config):
    """q [N, h, d] bf16, keys [B, E, d] bf16, or bytes of e4m3 with scales [B, E] fp32, else None, w [N, h], visible [V]
    int64 (token n reads place n mod V), cos and sin [P, rope / 2] fp32 (token n reads row n mod P) or None, scores [N, S]
    int64, in which 2 S >= E fp32 numbers find room, S a multiple of 8, or None -> out [N, k] int64; T, tokens of a
    request: N = B T; width: blocks of the launch that scores. More than blocks (room - 16) entries have no room."""
    N, B = cute.sym_int(), cute.sym_int()
    table = fake(Float32, cute.sym_int(), shape.rope // 2, align=4) if shape.rope else None
    arguments = (
        fake(BFloat16, N, shape.heads, shape.d),
        fake(BFloat16 if shape.keys == "bf16" else Uint8, B, cute.sym_int(), shape.d),
        fake(Float32, B, cute.sym_int(), align=4) if shape.keys == "fp8" else None,
        fake(BFloat16 if shape.weights == "bf16" else Float32, N, shape.heads, align=4),
        fake(Int64, cute.sym_int(), align=8),
        table,
        table,
        fake(Int64, N, cute.sym_int()) if config.apart else None,
        fake(Int64, N, cute.sym_int(), align=8),
        Int32(1),
        Int32(1),
        stream(),
    )
    return Program(shape, config), arguments


def configs(shape: Shape) -> Iterator[Config]:
    deep = max(2, min(DEEPEST, RING // (SCORERS * shape.stage)))
    usual, other = (0, deep) if shape.keys == "bf16" else (deep, 0)  # rings of bf16 have not been timed
    for apart, warps, stages in ((False, SCORERS, 0), (True, 16, usual), (True, 32, usual), (True, 16, other)):
        for blocks in (MOST_BLOCKS, 8, 4, 2, 1) if apart else (8, 4, 2, 1):
            for room in (2048, 8192, 40960):
                if 4 * Plan(config := Config(blocks, room, warps, apart, stages)).words <= SHARED:
                    yield config


READ = {"bf16": (7.2e-5, 7.2e-5), "fp8": (4.5e-5, 3.6e-5)}  # us for a key: one tile ahead, in rings


def estimate(shape: Shape, config: Config, tokens: int, entries: int) -> float:
    """Microseconds, fitted to timings on an H200: tiles of each block, where it scores itself; else a launch that reads all
    keys, and blocks that go through their share of the scores. Clusters wait for each other, and many warps too."""
    share, size = -(-entries // config.blocks), shape.heads * shape.d / 8192
    usable = SMS if config.blocks < 4 else SMS * 7 // 8 // config.blocks * config.blocks
    if config.blocks == MOST_BLOCKS:  # few groups of processors have so many
        usable = 4 * MOST_BLOCKS
    if config.apart and config.blocks < MOST_BLOCKS:
        usable *= max(1, min(32 // config.warps, SHARED // (4 * Plan(config).words)))
    rounds = -(-tokens * config.blocks // usable)
    if not config.apart:
        return rounds * (7.7 + 0.107 * size * share / TILE)
    wait = 3.0 if config.blocks == 1 else 5.0 if config.blocks < 8 else 5.3 + 0.3 * min(tokens, 8)
    wait += (2.0 if config.warps > 16 else 0.0) + (0.7 if config.blocks == MOST_BLOCKS else 0.0)
    each = 4.1e-4 if config.warps > 16 else 5.3e-4
    return 3.2 + READ[shape.keys][config.stages > 0] * size * tokens * entries + rounds * (wait + each * share)


def rank(shape: Shape, work: tuple[int, ...]) -> list[Config]:
    """Those with room for so many entries, best first for so many tokens."""
    tokens, entries = work
    found = [
        c
        for c in configs(shape)
        if c.covers(entries) and (not c.apart or (tokens <= MANY and tokens * entries <= MOST))
    ]
    tight = [c for c in found if not any(c.room > o.room and c.blocks == o.blocks for o in found)]
    return sorted(tight, key=lambda config: estimate(shape, config, tokens, entries))


KERNEL = Kernel("indexer", __file__, program, configs, rank)


def launch(shape: Shape, q, keys, scales, w, visible, cos, sin, out, T: int) -> None:
    """See `program`."""
    tokens, entries = by_twos(len(q)), keys.shape[1]  # no result depends on the configuration
    config = KERNEL.choice(shape, (tokens, min(rounded(entries), LARGEST)))
    run(shape, config, q, keys, scales, w, visible, cos, sin, out, T)


def run(shape: Shape, config: Config, q, keys, scales, w, visible, cos, sin, out, T: int) -> None:
    """In this configuration, with room for it to work in."""
    scores, width, tiles = None, 1, -(-keys.shape[1] // TILE)
    if config.apart:
        scores = out.new_empty(len(q), tiles * TILE // 2)
        width = max(1, min(-(-tiles // SCORERS), SMS // len(q)))
    KERNEL.launcher(shape, config)(q, keys, scales, w, visible, cos, sin, scores, out, T, width)
