"""The lightning indexer: scores of all entries that a token may see, and the k best of them, as a set in ascending order.

A score (kernels/indexer_scores.py) is kept as an integer which sorts like it, in shared memory, by a cluster of blocks, each
with its part of the entries. The k-th best is found by its digits, 11 bits at a time: every block counts the digits of its
candidates, adds its counts to those of all blocks, and all blocks come to the same conclusion. At last each block writes its
chosen entries behind those of the blocks before it; of equal ones at the end the lower.

Few tokens with many entries leave most processors without work that way. Then all of them write scores first, by a launch
of its own, which the clusters read.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, Uint8, Uint32, const_expr

from dsv4_compile.kernel import Kernel, arch, by_twos, fake, rounded, stream
from dsv4_compile.kernels import warps as of_warp
from dsv4_compile.kernels.indexer_scores import TILE, Scores, Shape, rooms, sortable

BINS = 2048
DIGITS = ((21, BINS), (10, BINS), (0, 1024))  # of a score: where each starts, and how many values it has
SMS = 132  # processors that the cost model reckons with
MOST_BLOCKS = 16  # of a cluster
AHEAD = 4  # entries of a thread that are looked at together
SHARED = 227 * 1024 - 1024
MOST, MANY = 1 << 22, 1 << 12  # scores that are written: 16 MB; of so many tokens
LARGEST = 319488  # entries that a cluster has room for
RING, DEEPEST = 9 << 14, 8  # bytes of a block's rings, and tiles of one


@dataclass(frozen=True)
class Config:
    """blocks: of a cluster, which has the entries of a token. room: entries of a block, a multiple of 16. warps: of a block.
    apart: scores by a launch of their own. scorers: warps of a block that scores, which is `warps` where it also chooses; more
    than 8 do not find the registers unless `grouped`: four of them multiply together, which Hopper can. stages: tiles of a
    warp's ring, at least 2; 0: one tile ahead, in registers."""

    blocks: int
    room: int
    warps: int
    apart: bool
    scorers: int = 8
    grouped: bool = False
    stages: int = 0

    def covers(self, entries: int) -> bool:
        return self.blocks * (self.room - TILE) >= entries

    @property
    def sparse(self) -> bool:
        """Whether so many entries are reckoned with that the first digit leaves few of 32: only those are looked at again."""
        return self.blocks == MOST_BLOCKS and self.room > 8192


class Plan:
    """Where what lies in shared memory, in words."""

    def __init__(self, config: Config):
        self.counts = config.room  # of this block, digit by digit
        self.merged = self.counts + (len(DIGITS) * BINS if config.blocks > 1 else 0)
        self.sums = self.merged + len(DIGITS) * BINS  # of warps, digit by digit; then of this block alone
        self.found = self.sums + (len(DIGITS) + 1) * 32
        self.totals = self.found + (len(DIGITS) + 1) * 4  # of warps: entries that are better, and that are equal
        self.before = self.totals + 2 * 32  # the same of the cluster's blocks
        self.weights = self.before + 2 * MOST_BLOCKS  # of heads
        self.words = self.weights + 64


def count(address, many, local: bool):
    """Add to a number in shared memory, of this block or at an address that `of_block` gave."""
    space = "shared" if local else "relaxed.cluster.shared::cluster"
    cute.arch.inline_ptx(f"red.{space}.add.u32 [{{$r0}}], {{$r1}};", read_only_args=[address, many])


class Program(Scores):
    def __init__(self, shape: Shape, config: Config):
        super().__init__(shape, config.scorers, config.stages, config.grouped, config.apart)
        self.blocks, self.room, self.apart = config.blocks, config.room, config.apart
        self.warps, self.threads = config.warps, 32 * config.warps
        self.marks = -(-config.room // (1024 * config.warps)) if config.sparse else 0  # masks of a lane
        self.plan = Plan(config)

    @cute.jit
    def __call__(self, q, keys, scales, w, visible, cos, sin, scores, out, T: Int32, width: Int32, stream):
        N = q.shape[0]
        if const_expr(self.apart):
            self.write_scores(q, keys, scales, w, visible, cos, sin, scores, out.shape[1], T).launch(
                grid=[width, N, 1], block=[32 * self.scorers, 1, 1], min_blocks_per_mp=1, stream=stream, use_pdl=True
            )
        self.select(q, keys, scales, w, visible, cos, sin, scores, out, T).launch(
            grid=[self.blocks * N, 1, 1],
            block=[self.threads, 1, 1],
            cluster=[self.blocks, 1, 1],
            min_blocks_per_mp=1,
            stream=stream,
            use_pdl=True,
        )

    # Scores

    @cute.kernel
    def write_scores(self, q, keys, scales, w, visible, cos, sin, scores, k, T):
        of_warp.follow()
        thread, _, _ = cute.arch.thread_idx()
        block, token, _ = cute.arch.block_idx()
        width, _, _ = cute.arch.grid_dim()
        allocator = cutlass.memory.SmemAllocator()
        weights, room = allocator.allocate_tensor(Float32, cute.make_layout((64,)), 128), self.allocate(allocator)
        n = self.seen(visible, keys, token)
        if const_expr(self.early):
            self.ask_ahead(q, cos, sin, token, thread, room[2])
        if n > k:
            first, step = block * self.scorers + cute.arch.make_warp_uniform(thread // 32), width * self.scorers
            last, target = cute.ceil_div(n, TILE), cute.recast_tensor(scores[token, None], Float32)
            self.score(q, keys, scales, w, cos, sin, weights, room, token, T, first, last, step, target, 0)
        else:
            cute.arch.cp_async_wait_group(0)

    # The best

    @cute.kernel
    def select(self, q, keys, scales, w, visible, cos, sin, scores, out, T):
        if const_expr(not self.apart):
            of_warp.follow()
        thread, _, _ = cute.arch.thread_idx()
        place, _, _ = cute.arch.block_idx()
        rank, token = place % self.blocks, place // self.blocks
        plan, k = self.plan, out.shape[1]
        allocator = cutlass.memory.SmemAllocator()
        room = allocator.allocate_tensor(Int32, cute.make_layout((plan.words,)), 128)
        start, arrived = room.iterator.toint(), allocator.allocate_tensor(Int64, cute.make_layout((1,)), 8).iterator
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
            if const_expr(self.blocks > 1):
                if thread == 0:
                    cute.arch.mbarrier_init(arrived, 1)
                    cute.arch.mbarrier_init_fence()
                    cute.arch.mbarrier_arrive_and_expect_tx(arrived, 8 * self.blocks)
                cute.arch.cluster_arrive()  # others may add to these counts: they wait for it before they do
            if const_expr(self.apart):
                of_warp.follow()
                cute.arch.barrier()
                self.fetch(cute.recast_tensor(scores[token, None], Float32), first, mine, room, start, thread)
            else:
                warp = cute.arch.make_warp_uniform(thread // 32)
                tile, last = first // TILE, (first + mine + TILE - 1) // TILE
                weights = cute.make_tensor(
                    cute.recast_ptr(room.iterator + plan.weights, dtype=Float32), cute.make_layout((64,))
                )
                rings = self.allocate(allocator)
                first_tile, step = tile + warp, self.warps
                self.score(q, keys, scales, w, cos, sin, weights, rings, token, T, first_tile, last, step, room, first)
                cute.arch.barrier()
                for i in cutlass.range(thread, mine, self.threads, unroll=AHEAD):
                    self.count_first(room[i], start)
            cute.arch.barrier()
            shift, prefix, need, masks = self.threshold(k, mine, room, start, thread)
            self.write_chosen(
                out[token, None], rank, first, mine, shift, prefix, need, masks, room, start, arrived, thread
            )

    def count_first(self, key, start):
        """The first digit of a score."""
        counts = self.plan.merged if self.blocks == 1 else self.plan.counts
        count(start + 4 * (counts + Int32(Uint32(key) >> Uint32(DIGITS[0][0]))), Int32(1), True)

    @cute.jit
    def fetch(self, scores, first, mine, room, start, thread):
        """This block's part of the scores that another launch wrote, their first digits counted; of its last 4 words some may
        be anything."""
        source = cute.zipped_divide(scores, (4,))
        target = cute.zipped_divide(cute.make_tensor(room.iterator, cute.make_layout((self.room,))), (4,))
        for v in cutlass.range(thread, cute.ceil_div(mine, 4), self.threads, unroll=4):
            part, found = cute.make_rmem_tensor((4,), Int32), cute.make_rmem_tensor((4,), Float32)
            cute.autovec_copy(source[None, first // 4 + v], found)
            for j in cutlass.range_constexpr(4):
                part[j] = sortable(found[j])
            cute.autovec_copy(part, target[None, v])
            for j in cutlass.range_constexpr(4):
                if 4 * v + j < mine:
                    self.count_first(part[j], start)

    @cute.jit
    def threshold(self, k, mine, room, start, thread):
        """Digit by digit, the first one counted already: shift and prefix, so that what is above `prefix` when shifted is
        chosen, and of what is equal to it the first `need`; and which entries the first digit left, see `mark`."""
        plan = self.plan
        shift, prefix, need, done = Int32(32), Uint32(0), Int32(k), Int32(0)
        masks = cute.make_rmem_tensor((max(1, self.marks),), Int32)
        for p in cutlass.range_constexpr(len(DIGITS)):
            low, bins = DIGITS[p]
            if done == 0:
                merged = plan.merged + p * BINS
                counts = merged if const_expr(self.blocks == 1) else plan.counts + p * BINS
                if const_expr(p > 0):
                    self.count_next(masks, mine, DIGITS[p - 1][0], prefix, low, bins, counts, room, start, thread)
                    cute.arch.barrier()
                if const_expr(self.blocks > 1):
                    least = Int32(0)
                    if const_expr(p == 0 and self.marks > 0):
                        # where so many are better in this block alone, what is below is not among the best of all
                        least, _, _ = self.crossing(counts, bins, len(DIGITS), need, room, thread)
                    if const_expr(p == 0):
                        cute.arch.cluster_wait()
                    for j in cutlass.range_constexpr(bins // self.threads):
                        here = j * self.threads + thread
                        many = room[counts + here]
                        if many > 0 and here >= least:
                            for b in cutlass.range_constexpr(self.blocks):
                                count(of_warp.of_block(start + 4 * (merged + here), b), many, False)
                    of_warp.everybody(self.blocks)
                digit, above, equal = self.crossing(merged, bins, p, need, room, thread)
                prefix = prefix * Uint32(bins) + Uint32(digit)
                need = need - above
                shift = Int32(low)
                done = Int32(1) if equal == need else Int32(0)
                if const_expr(p == 0 and self.marks > 0):
                    self.mark(masks, mine, low, prefix, room, thread)
        return shift, prefix, need, masks

    @cute.jit
    def count_next(self, masks, mine, above: int, prefix, low: int, bins: int, counts, room, start, thread):
        """The next digits of those that have a prefix."""
        if const_expr(self.marks == 0):
            for i in cutlass.range(thread, mine, self.threads, unroll=AHEAD):
                self.count_one(Uint32(room[i]), above, prefix, low, bins, counts, start)
        else:
            begin, _ = self.part(mine, thread)
            for m in cutlass.range_constexpr(self.marks):
                groups = self.left(masks[m])
                while groups != 0:
                    g, groups = self.lowest(groups)
                    if self.is_left(masks[m], g, thread):
                        key = Uint32(room[begin + m * 1024 + 32 * g + thread % 32])
                        self.count_one(key, above, prefix, low, bins, counts, start)

    @cute.jit
    def count_one(self, key, above: int, prefix, low: int, bins: int, counts, start):
        if key >> Uint32(above) == prefix:
            digit = Int32((key >> Uint32(low)) & Uint32(bins - 1))
            count(start + 4 * (counts + digit), Int32(1), True)

    # Of few that are left: a warp has consecutive entries, 32 at a time, and its lane l, in its m-th mask, those of the
    # (32 m + l)-th 32 that are left.

    def part(self, mine, thread):
        """Where a warp's entries begin and end."""
        warp = cute.arch.make_warp_uniform(thread // 32)
        share = cute.ceil_div(cute.ceil_div(mine, 32), self.warps) * 32
        return warp * share, cutlass.min((warp + 1) * share, mine)

    @cute.jit
    def mark(self, masks, mine, shift: int, prefix, room, thread):
        """Those that are not below a prefix."""
        lane = thread % 32
        begin, end = self.part(mine, thread)
        masks.fill(0)
        for m in cutlass.range_constexpr(self.marks):
            here = begin + m * 1024
            for g in cutlass.range(cutlass.min(32, cute.ceil_div(end - here, 32)), unroll=AHEAD):
                i, left = here + 32 * g + lane, cutlass.Boolean(False)
                if i < end:
                    left = Uint32(room[i]) >> Uint32(shift) >= prefix
                found = cute.arch.vote_ballot_sync(left)
                masks[m] = Int32(found) if lane == g else masks[m]

    def left(self, mask):
        """Which lanes know of any."""
        return Uint32(cute.arch.vote_ballot_sync(mask != 0))

    def is_left(self, mask, group, thread):
        """Whether a lane's entry is, of 32 that lane `group` knows of."""
        return (cute.arch.shuffle_sync(mask, group) >> (thread % 32)) & 1 != 0

    def lowest(self, bits):
        """The place of the lowest bit, and the others."""
        rest = bits & (bits - Uint32(1))
        return Int32(31) - Int32(cute.arch.clz(Int32(bits ^ rest))), rest

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
    def write_chosen(self, out, rank, first, mine, shift, prefix, need, masks, room, start, arrived, thread):
        """In order: each warp starts behind the chosen ones of the warps and blocks before it."""
        plan = self.plan
        warp, lane = cute.arch.make_warp_uniform(thread // 32), thread % 32
        none = Int32(0)
        above, equal = self.through(None, none, none, first, mine, shift, prefix, need, masks, room, thread)
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
                there, counted = (
                    of_warp.of_block(address, thread)
                    for address in (start + 4 * (plan.before + 2 * rank), arrived.toint())
                )
                of_warp.send(there, all_above, counted)
                of_warp.send(there + 4, all_equal, counted)
            of_warp.wait_for_sent(arrived.toint(), 0)
            for b in cutlass.range_constexpr(self.blocks):
                of_above, of_equal = room[plan.before + 2 * b], room[plan.before + 2 * b + 1]
                above, equal = above + (of_above if b < rank else 0), equal + (of_equal if b < rank else 0)
        self.through(out, above, equal, first, mine, shift, prefix, need, masks, room, thread)

    @cute.jit
    def through(self, out, above, equal, first, mine, shift, prefix, need, masks, room, thread):
        """A warp's entries in order: how many are above the threshold and at it, with those before them, `above` and `equal`.
        out: where the chosen ones go, or None."""
        begin, end = self.part(mine, thread)
        lane = thread % 32
        if const_expr(self.marks == 0):
            for i in cutlass.range(begin, end, 32, unroll=AHEAD):
                wanted = i + lane < end
                above, equal = self.of_32(
                    out, i + lane, first + i + lane, wanted, above, equal, shift, prefix, need, room, lane
                )
        else:
            for m in cutlass.range_constexpr(self.marks):
                groups = self.left(masks[m])
                while groups != 0:
                    g, groups = self.lowest(groups)
                    i, wanted = begin + m * 1024 + 32 * g + lane, self.is_left(masks[m], g, thread)
                    above, equal = self.of_32(out, i, first + i, wanted, above, equal, shift, prefix, need, room, lane)
        return above, equal

    @cute.jit
    def of_32(self, out, i, entry, wanted, above, equal, shift, prefix, need, room, lane):
        """The same of 32 entries, of which a lane has the one at `i`, if it is wanted, which is `entry` of all."""
        better, same = self.compared(i, wanted, shift, prefix, room)
        if const_expr(out is not None):
            below = Int32(cute.arch.lanemask_lt())
            at, tied = above + cute.arch.popc(better & below), equal + cute.arch.popc(same & below)
            chosen = (better >> lane) & 1
            if tied < need:
                chosen = chosen | ((same >> lane) & 1)
            if chosen != 0:
                out[at + cutlass.min(tied, need)] = Int64(entry)
        return above + cute.arch.popc(better), equal + cute.arch.popc(same)

    @cute.jit
    def compared(self, i, wanted, shift, prefix, room):
        """Which lanes have an entry above the threshold, and which one at it."""
        better, same = cutlass.Boolean(False), cutlass.Boolean(False)
        if wanted:
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


def used(shape: Shape, config: Config) -> int:
    """Bytes of shared memory of a block that chooses."""
    scoring = 0 if config.apart else sum(rooms(shape, config.scorers, config.stages, config.grouped)) + 256
    return 4 * Plan(config).words + scoring


def configs(shape: Shape) -> Iterator[Config]:
    deep = {n: max(2, min(DEEPEST, RING // (n * shape.stage))) for n in (8, 16)}
    if arch().startswith("sm_90"):
        ways = [(False, 8, 8, True, 3), (False, 16, 16, True, 2)]
        ways += [(True, 16, 8, True, deep[8]), (True, 16, 16, True, deep[16])]
    else:
        usual, other = (0, deep[8]) if shape.keys == "bf16" else (deep[8], 0)
        ways = [
            (False, 8, 8, False, 0),
            *((True, warps, 8, False, usual) for warps in (16, 32)),
            (True, 16, 8, False, other),
        ]
    for apart, warps, scorers, grouped, stages in ways:
        for blocks in (MOST_BLOCKS, 8, 4, 2, 1) if apart else (8, 4, 2, 1):
            for room in (2048, 8192, 40960):
                with_ring, without = (Config(blocks, room, warps, apart, scorers, grouped, n) for n in (stages, 0))
                if used(shape, with_ring) <= SHARED:
                    yield with_ring
                elif used(shape, without) <= SHARED:
                    yield without


READ = {"bf16": (6.9e-5, 6.9e-5), "fp8": (5.6e-5, 5.2e-5)}  # us for a key, by 8 and by 16 warps
WAIT = {1: 0.0, 2: 1.2, 4: 1.4, 8: 1.6, MOST_BLOCKS: 2.1}  # us for each other, by blocks of a cluster
ALONE = {1: 4.6, 2: 6.3, 4: 6.4, 8: 6.7}  # us of a cluster that scores, but for its scores


def estimate(shape: Shape, config: Config, tokens: int, entries: int) -> float:
    """Microseconds, fitted to timings on an H200: entries of each block, where it scores itself; else a launch that reads all
    keys, and blocks that go through their share of the scores. Large clusters wait for room where all processors score."""
    share, size = -(-entries // config.blocks), shape.heads * shape.d / 8192
    usable = SMS if config.blocks < 4 else SMS * 7 // 8 // config.blocks * config.blocks
    if config.blocks == MOST_BLOCKS:  # few groups of processors have so many
        usable = 4 * MOST_BLOCKS
    if config.apart and config.blocks < MOST_BLOCKS:
        usable *= max(1, min(32 // config.warps, SHARED // used(shape, config)))
    rounds, more = -(-tokens * config.blocks // usable), config.scorers > 8
    if not config.apart:
        each = 6.7e-3 if not config.grouped else 5.2e-3 if more else 5.9e-3
        return rounds * (ALONE[config.blocks] + each * size * share)
    wait = WAIT[config.blocks]
    if tokens > 1 and config.blocks > 1:
        wait += 0.5 if tokens * entries < 1 << 16 else 1.5 if config.blocks < 8 else 3.5
    read = READ[shape.keys][more] * size * tokens * entries + (0.7 if more else 0.0)
    return 5.0 + 0.05 * min(tokens, 64) + read + rounds * (wait + (2.8e-4 if config.sparse else 4.5e-4) * share)


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
        width = max(1, min(-(-tiles // config.scorers), SMS // len(q)))
    KERNEL.launcher(shape, config)(q, keys, scales, w, visible, cos, sin, scores, out, T, width)
