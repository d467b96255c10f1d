"""Attention of many queries over index lists, bf16, with Hopper's products of a warpgroup, which take 64 heads at once.

One warpgroup of a block brings rows, 16 bytes a lane at a time, into a ring of tiles; two multiply. Each of these makes all
scores of a tile and their softmax, in registers, and then sums half of the channels, with the tile, as it lies, as the values.
They take turns, so that one multiplies while the other weighs. A cluster may share the row list of a token. Then, at the end,
every block reads its part of the heads from all of them, in their order, and writes the result.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import BFloat16, Float32, Int32, Int64, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup
from cutlass.tensor_utils import LayoutEnum

from dsv4_compile.kernel import Kernel, alike
from dsv4_compile.kernels import warps as of_warp
from dsv4_compile.kernels.attention_cost import estimate, of_one
from dsv4_compile.kernels.attention_inputs import Rows, Shape, arguments, named

LOG2E = math.log2(math.e)
HEADS = 64  # of a product
MULTIPLYING = 256  # threads: two warpgroups
BRINGING = 128
THREADS = MULTIPLYING + BRINGING
REGISTERS = 40, 232  # of a thread that brings and of one that multiplies
SHARED = 227 * 1024  # bytes of a block
# Named barriers, of 16: of all threads that multiply; two by which their warpgroups take turns; of all, one for each place of
# the ring
AMONG, TURN, FREE = 1, 2, 4


@dataclass(frozen=True)
class Config:
    """heads: of a block, 16, 32 or 64; products have 64 all the same. rows: of a tile, a multiple of 16. stages: tiles on
    their way. splits: blocks of a cluster, up to 8."""

    heads: int
    rows: int
    stages: int
    splits: int

    @property
    def division(self) -> tuple[int, ...]:
        """What the order of sums depends on: configurations of which it is the same give the same bits."""
        return self.rows, self.splits


def value_row(d: int) -> int:
    """Words: padded, no two lanes in one bank."""
    return d + 8


def words_at_the_end(shape: Shape, config: Config) -> int:
    """What lies over queries and tiles then: sums for the others of a cluster, or rounded results."""
    if config.splits > 1:
        return config.heads * value_row(shape.d)
    return 2 * HEADS * (shape.d // 4 + 4)


def used(shape: Shape, config: Config) -> int:
    """Bytes of shared memory."""
    tiles = 2 * shape.d * (HEADS + config.stages * config.rows)
    small = 4 * (config.stages * config.rows + 4 * HEADS + max(1, shape.rope)) + 8 * config.stages
    return max(tiles, 4 * words_at_the_end(shape, config)) + small


def fits(shape: Shape, config: Config) -> bool:
    return config.splits <= config.heads and used(shape, config) <= SHARED


class Attention(Rows):
    def __init__(self, shape: Shape, config: Config):
        self.d, self.h, self.rope, self.on_window = shape.d, shape.heads, shape.rope, shape.on_window
        self.H, self.R, self.stages, self.splits = config.heads, config.rows, config.stages, config.splits
        self.row_bytes = 2 * shape.d
        self.groups = -(-shape.heads // config.heads)
        self.at_the_end = words_at_the_end(shape, config)
        self.share = -(-config.heads // config.splits)  # heads that a block of a cluster ends
        self.all_whole = config.heads == HEADS and shape.heads % HEADS == 0
        self.lanes = 1 << (config.splits - 1).bit_length()  # threads of a head there
        self.value_row = value_row(shape.d)

    @cute.jit
    def __call__(self, q, keys, window, entries, index, sink, cos, sin, out, scale: Float32, T: Int32, stream):
        K, MN, bf16, R, d = OperandMajorMode.K, OperandMajorMode.MN, BFloat16, self.R, self.d
        of_scores = sm90.make_trivial_tiled_mma(bf16, bf16, K, K, Float32, (1, 1, 1), tiler_mn=(HEADS, R))
        from_registers = warpgroup.OperandSource.RMEM
        of_values = sm90.make_trivial_tiled_mma(
            bf16, bf16, K, MN, Float32, (1, 2, 1), tiler_mn=(HEADS, d // 2), a_source=from_registers
        )
        of_q = sm90.make_smem_layout_a(LayoutEnum.ROW_MAJOR, (HEADS, R, d), bf16, 1)
        of_rows = sm90.make_smem_layout_b(LayoutEnum.ROW_MAJOR, (HEADS, R, d), bf16, self.stages)
        room = max(cute.cosize(of_rows), 2 * self.at_the_end - cute.cosize(of_q))  # for values too, at the end

        @cute.struct
        class Room:
            q: cute.struct.Align[cute.struct.MemRange[BFloat16, cute.cosize(of_q)], 1024]
            rows: cute.struct.Align[cute.struct.MemRange[BFloat16, room], 1024]
            bias: cute.struct.MemRange[Float32, self.stages * R]
            marks: cute.struct.MemRange[Float32, 2 * HEADS]
            factors: cute.struct.MemRange[Float32, 2 * HEADS]
            table: cute.struct.MemRange[Float32, max(1, self.rope)]
            full: cute.struct.MemRange[Int64, self.stages]

        self.Room = Room
        self.kernel(
            q, keys, window, entries, index, sink, cos, sin, out, scale, T, of_scores, of_values, of_q, of_rows
        ).launch(
            grid=[self.splits * self.groups * q.shape[0], 1, 1],
            block=[THREADS, 1, 1],
            cluster=[self.splits, 1, 1],
            min_blocks_per_mp=1,
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(
        self,
        q,
        keys,
        window,
        entries,
        index,
        sink,
        cos,
        sin,
        out,
        scale,
        T,
        of_scores: cute.TiledMma,
        of_values: cute.TiledMma,
        of_q: cute.ComposedLayout,
        of_rows: cute.ComposedLayout,
    ):
        thread, _, _ = cute.arch.thread_idx()
        place, _, _ = cute.arch.block_idx()
        split, place = place % self.splits, place // self.splits
        group, token = place % self.groups, place // self.groups
        warp, lane = cute.arch.make_warp_uniform(thread // 32), thread % 32
        team = cute.arch.make_warp_uniform(thread // 128)
        room = cutlass.memory.SmemAllocator().allocate(self.Room)
        full = room.full.data_ptr()
        bias = room.bias.get_tensor(cute.make_layout((self.stages * self.R,)))
        if thread == 0:
            for s in cutlass.range_constexpr(self.stages):
                cute.arch.mbarrier_init(full + s, 2 * BRINGING)  # each arrives itself, and its copies do
            cute.arch.mbarrier_init_fence()
        of_warp.follow()
        cute.arch.barrier()
        rows = window.shape[1]
        if const_expr(entries is not None):
            rows = window.shape[1] + index.shape[1]
        tiles = cute.ceil_div(rows, self.R)
        per = cute.ceil_div(tiles, self.splits)
        first = split * per
        last = cutlass.min(first + per, tiles)

        if team == 2:
            cute.arch.setmaxregister_decrease(REGISTERS[0])
            start = room.rows.data_ptr().toint()
            self.bring(first, last, rows, token, T, keys, window, entries, index, start, bias, full, warp - 8, lane)
            if const_expr(self.splits > 1):
                of_warp.everybody(self.splits)
                cute.arch.cluster_arrive_relaxed()
                cute.arch.cluster_wait()
        else:
            cute.arch.setmaxregister_increase(REGISTERS[1])
            start = room.q.data_ptr().toint()
            self.fetch_queries(q, token, group, start, thread)
            cute.arch.cp_async_commit_group()
            table = room.table.get_tensor(cute.make_layout((max(1, self.rope),)))
            if const_expr(self.rope > 0):
                if thread < self.rope:
                    of = token % cos.shape[0]
                    if thread < self.rope // 2:
                        table[thread] = cos[of, thread]
                    else:
                        table[thread] = sin[of, thread - self.rope // 2]
            # of head lane / 4 of the warp's 16, and of the eighth after it
            sinks = cute.make_rmem_tensor((2,), Float32)
            for i in cutlass.range_constexpr(2):
                sinks[i] = Float32(0.0)
                if group * self.H + 16 * (warp % 4) + lane // 4 + 8 * i < self.h:
                    sinks[i] = sink[group * self.H + 16 * (warp % 4) + lane // 4 + 8 * i] * Float32(LOG2E)
            own = Float32(0.0)  # the sink of the head that this thread ends
            if const_expr(self.splits > 1):
                head = group * self.H + split * self.share + thread // self.lanes
                own = sink[cutlass.min(head, self.h - 1)] * Float32(LOG2E)
            s_q = room.q.get_tensor(of_q.outer, swizzle=of_q.inner)
            s_rows = room.rows.get_tensor(of_rows.outer, swizzle=of_rows.inner)  # [R, d, stages]
            turned = cute.make_tensor(s_rows.iterator, cute.select(s_rows.layout, mode=[1, 0, 2]))
            for_scores, for_values = of_scores.get_slice(0), of_values.get_slice(cute.make_layout(2, stride=128)(team))
            from_q = of_scores.make_fragment_A(for_scores.partition_A(s_q))
            from_rows = of_scores.make_fragment_B(for_scores.partition_B(s_rows))
            from_turned = of_values.make_fragment_B(for_values.partition_B(turned))
            scores = cute.make_rmem_tensor(of_scores.partition_shape_C((HEADS, self.R)), Float32)
            values = cute.make_rmem_tensor(of_values.partition_shape_C((HEADS, self.d)), Float32)
            weights = cute.make_rmem_tensor(of_values.partition_shape_A((HEADS, self.R)), BFloat16)
            values.fill(0.0)
            tops, totals = cute.make_rmem_tensor((2,), Float32), cute.make_rmem_tensor((2,), Float32)
            tops.fill(-Float32.inf)
            totals.fill(0.0)
            cute.arch.cp_async_wait_group(0)
            cute.arch.fence_proxy("async.shared", space="cta")
            cute.arch.barrier(barrier_id=AMONG, number_of_threads=MULTIPLYING)
            if team == 1 and first < last:  # the other begins
                cute.arch.barrier_arrive(barrier_id=TURN, number_of_threads=MULTIPLYING)
            for tile in cutlass.range(first, last, unroll=1):
                turn = tile - first
                stage = turn % self.stages
                cute.arch.mbarrier_wait(full + stage, (turn // self.stages) % 2)
                cute.arch.fence_proxy("async.shared", space="cta")
                cute.arch.barrier(barrier_id=TURN + team, number_of_threads=MULTIPLYING)
                multiply(of_scores, scores, from_q[None, None, None, 0], from_rows[None, None, None, stage], True)
                if team == 0 or tile + 1 < last:
                    cute.arch.barrier_arrive(barrier_id=TURN + 1 - team, number_of_threads=MULTIPLYING)
                warpgroup.wait_group(0)
                shrink = self.weigh(
                    tile, stage, window.shape[1], scale, sinks, scores, weights, tops, totals, bias, lane
                )
                less = cute.arch.vote_any_sync(shrink[0] < Float32(1.0) or shrink[1] < Float32(1.0))
                if less:  # rare after some tiles
                    for v in cutlass.range_constexpr(cute.size(values)):
                        values[v] = values[v] * shrink[(v // 2) % 2]
                multiply(of_values, values, weights, from_turned[None, None, None, stage], False)
                warpgroup.wait_group(0)
                if tile + self.stages < last:
                    cute.arch.barrier_arrive(barrier_id=FREE + stage, number_of_threads=THREADS)

            cute.arch.barrier(barrier_id=AMONG, number_of_threads=MULTIPLYING)  # queries and tiles are free
            for i in cutlass.range_constexpr(2):
                totals[i] = cute.arch.warp_reduction_sum(totals[i], threads_in_group=4)
            if const_expr(self.splits == 1):
                self.finish(values, tops, totals, sinks, table, group, token, out, start, warp, team, lane)
            else:
                marks = room.marks.get_tensor(cute.make_layout((2 * HEADS,)))
                factors = room.factors.get_tensor(cute.make_layout((2 * HEADS,)))
                self.hand_out(values, tops, totals, marks, start, warp, team, lane)
                of_warp.everybody(self.splits)
                places = start, room.marks.data_ptr().toint()
                self.combine(split, group, token, own, table, factors, out, places, thread)
                cute.arch.cluster_arrive_relaxed()  # others may still be reading what lies here
                cute.arch.cluster_wait()

    @cute.jit
    def bring(self, first, last, rows, token, T, keys, window, entries, index, start, bias, full, warp, lane):
        """All tiles of this block, each when its place in the ring is free; a place without a row is filled with zeros, and
        its bias keeps it out. Each warp has every fourth row; its lanes look one tile ahead which."""
        part, W, request = self.R // 4, window.shape[1], token // T
        upcoming = self.pick(first, last, rows, token, window, index, warp, lane)
        for tile in cutlass.range(first, last, unroll=1):
            turn = tile - first
            stage = turn % self.stages
            picked = upcoming
            upcoming = self.pick(tile + 1, last, rows, token, window, index, warp, lane)
            if turn >= self.stages:
                cute.arch.barrier(barrier_id=FREE + stage, number_of_threads=THREADS)
            if lane < part:
                bias[stage * self.R + 4 * lane + warp] = Float32(0.0) if picked >= 0 else -Float32.inf
            base = start + stage * self.R * self.row_bytes
            for r in cutlass.range_constexpr(part):
                row, place = cute.arch.shuffle_sync(picked, r), 4 * r + warp
                source = self.address(keys, request, row)
                if const_expr(entries is not None):
                    if tile * self.R + place >= W:
                        source = self.address(entries, request, row)
                piece = lane % 8 ^ (4 * (r % 2) + warp)  # place mod 8: the swizzle that products expect
                target = base + (lane // 8) * (self.R * 128) + place * 128 + piece * 16
                for half in cutlass.range_constexpr(self.d // 256):  # of 512 bytes; a panel of all rows has 128
                    from_ = source + half * 512 + lane * 16
                    of_warp.copy_16(target + half * 4 * self.R * 128, from_, Int32(16) if row >= 0 else Int32(0))
            cute.arch.cp_async_mbarrier_arrive_noinc(full + stage)
            cute.arch.mbarrier_arrive(full + stage)

    @cute.jit
    def pick(self, tile, last, rows, token, window, index, warp, lane):
        """The row that this lane's place of a tile names; -1: none."""
        place = tile * self.R + 4 * lane + warp
        row = Int32(-1)
        if tile < last:
            if lane < self.R // 4:
                row = named(place, rows, token, window, index)
        return row

    @cute.jit
    def fetch_queries(self, q, token, group, start, thread):
        """Zeros for heads beyond the last. What lies in the place of heads that others have does not matter."""
        pieces = self.d // 8
        for i in cutlass.range_constexpr(self.H * pieces // MULTIPLYING):
            v = i * MULTIPLYING + thread
            row, piece = v // pieces, v % pieces
            head = group * self.H + row
            inside = head < self.h
            at = Int64(token * self.h + (head if inside else 0)) * self.row_bytes
            target = start + (piece // 8) * (HEADS * 128) + row * 128 + ((piece % 8) ^ (row % 8)) * 16
            of_warp.copy_16(target, q.iterator.toint() + at + piece * 16, Int32(16) if inside else Int32(0))

    @cute.jit
    def weigh(self, tile, stage, W, scale, sinks, scores, weights, tops, totals, bias, lane):
        """weights = 2^(scores - the largest so far), rounded; how much what was summed before shrinks by. Register
        i + 2 h + 4 n of scores and weights: row 8 n + 2 (lane mod 4) + i, head lane / 4 + 8 h of the warp's 16."""
        shrink = cute.make_rmem_tensor((2,), Float32)
        for n in cutlass.range_constexpr(self.R // 8):
            for i in cutlass.range_constexpr(2):
                column = 8 * n + 2 * (lane % 4) + i
                below = bias[stage * self.R + column]
                for h in cutlass.range_constexpr(2):
                    x = scores[i + 2 * h + 4 * n] * (scale * Float32(LOG2E)) + below
                    if const_expr(self.on_window):
                        x = x + sinks[h] if tile * self.R + column < W else x
                    scores[i + 2 * h + 4 * n] = x
        for h in cutlass.range_constexpr(2):
            largest = tops[h]
            for n in cutlass.range_constexpr(self.R // 8):
                for i in cutlass.range_constexpr(2):
                    largest = cute.arch.fmax(largest, scores[i + 2 * h + 4 * n])
            largest = cute.arch.warp_reduction_max(largest, threads_in_group=4)
            finite = Float32(0.0) if largest == -Float32.inf else largest
            shrink[h] = cute.math.exp2(tops[h] - finite, fastmath=True)
            tops[h] = largest
            for n in cutlass.range_constexpr(self.R // 8):
                for i in cutlass.range_constexpr(2):
                    v = const_expr(i + 2 * h + 4 * n)
                    scores[v] = cute.math.exp2(scores[v] - finite, fastmath=True)
        narrow = cute.make_tensor(weights.iterator, scores.layout)
        narrow.store(scores.load().to(BFloat16))
        scores.store(narrow.load().to(Float32))  # as rounded
        for h in cutlass.range_constexpr(2):
            added = Float32(0.0)
            for n in cutlass.range_constexpr(self.R // 8):
                for i in cutlass.range_constexpr(2):
                    added = added + scores[i + 2 * h + 4 * n]
            totals[h] = totals[h] * shrink[h] + added
        return shrink

    @cute.jit
    def finish(self, values, tops, totals, sinks, table, group, token, out, start, warp, team, lane):
        """The result where one block has seen all rows: (sum of values) / (sum of weights [+ sink]), turned back, rounded.
        Each warp turns its 16 heads and half of the channels round in shared memory, so that it writes whole lines."""
        wide = self.d // 2
        line = 2 * wide + 16  # bytes: padded, no two lanes in one bank
        mine = start + 16 * line * (4 * team + warp % 4)
        factors = cute.make_rmem_tensor((2,), Float32)
        for h in cutlass.range_constexpr(2):
            factors[h] = self.factor(tops[h], tops[h], totals[h], sinks[h])
        pair = cute.make_rmem_tensor((2,), BFloat16)
        for n in cutlass.range_constexpr(wide // 8):
            angle = const_expr(4 * (n - (wide - self.rope) // 8))
            for h in cutlass.range_constexpr(2):
                a, b = values[2 * h + 4 * n] * factors[h], values[2 * h + 4 * n + 1] * factors[h]
                if const_expr(angle >= 0):
                    if team == 1:
                        a, b = self.turned(a, b, table, angle + lane % 4)
                pair[0], pair[1] = a.to(BFloat16), b.to(BFloat16)
                at = mine + (lane // 4 + 8 * h) * line + 16 * n + 4 * (lane % 4)
                of_warp.store(at, cute.recast_tensor(pair, Int32)[0])
        cute.arch.sync_warp()
        pieces = wide // 8  # of 16 bytes
        for i in cutlass.range_constexpr(16 * pieces // 32):
            v = i * 32 + lane
            row, piece = v // pieces, v % pieces
            head = group * self.H + 16 * (warp % 4) + row
            words = cute.make_rmem_tensor((4,), Int32)
            for j, word in enumerate(of_warp.load_four(mine + row * line + piece * 16)):
                words[j] = word
            inside = True if self.all_whole else 16 * (warp % 4) + row < cutlass.min(self.H, self.h - group * self.H)
            if inside:
                to = cute.zipped_divide(out[token, head, None], (8,))
                cute.autovec_copy(cute.recast_tensor(words, BFloat16), to[None, team * pieces + piece])

    @cute.jit
    def factor(self, top, largest, total, sink):
        """What sums against `top` become parts of the result by; `largest` and `total` are those of all rows."""
        if const_expr(not self.on_window):
            largest = cute.arch.fmax(largest, sink)
        finite = Float32(0.0) if largest == -Float32.inf else largest
        below = total
        if const_expr(not self.on_window):
            below = below * cute.math.exp2(top - finite, fastmath=True) + cute.math.exp2(sink - finite, fastmath=True)
        found = Float32(0.0)
        if below > Float32(0.0):
            found = cute.math.exp2(top - finite, fastmath=True) / below
        return found

    def turned(self, a, b, table, angle):
        c, s = table[angle], table[self.rope // 2 + angle]
        return a * c + b * s, b * c - a * s

    @cute.jit
    def hand_out(self, values, tops, totals, marks, start, warp, team, lane):
        """This block's sums, to where all of the cluster can read them."""
        for h in cutlass.range_constexpr(2):
            row = 16 * (warp % 4) + lane // 4 + 8 * h
            if 16 * (warp % 4) < self.H:
                for n in cutlass.range_constexpr(self.d // 16):
                    column = team * (self.d // 2) + 8 * n + 2 * (lane % 4)
                    to = start + 4 * (row * self.value_row + column)
                    of_warp.store_pair(to, values[2 * h + 4 * n], values[2 * h + 1 + 4 * n])
                if team == 0:
                    if lane % 4 == 0:
                        marks[row] = tops[h]
                        marks[HEADS + row] = totals[h]

    @cute.jit
    def combine(self, split, group, token, own, table, factors, out, places, thread):
        """This block's part of the heads, from all blocks of the cluster. own: the sink of this thread's head."""
        (start, marks), d, splits = places, self.d, self.splits
        share, lanes = self.share, self.lanes
        column, at_once = 4 * (thread % (d // 4)), 4 * MULTIPLYING // d  # rows
        parts = []
        for i in cutlass.range_constexpr(-(-share // at_once)):  # all on their way at once
            row = cutlass.min(split * share + i * at_once + thread // (d // 4), self.H - 1)
            at = start + 4 * (row * self.value_row + column)
            parts.append([of_warp.load_words(of_warp.of_block(at, b), False) for b in range(splits)])
        if thread < -(-share * lanes // 32) * 32:  # whole warps: a lane has a block's part of a head
            row, block = split * share + thread // lanes, thread % lanes
            top, total = -Float32.inf, Float32(0.0)
            if block < splits:
                if row < self.H:
                    top = of_warp.load_word(of_warp.of_block(marks + 4 * row, block), False)
                    total = of_warp.load_word(of_warp.of_block(marks + 4 * (HEADS + row), block), False)
            largest = cute.arch.warp_reduction_max(top, threads_in_group=lanes)
            if const_expr(not self.on_window):
                largest = cute.arch.fmax(largest, own)
            finite = Float32(0.0) if largest == -Float32.inf else largest
            shrink = cute.math.exp2(top - finite, fastmath=True)
            below = cute.arch.warp_reduction_sum(total * shrink, threads_in_group=lanes)
            if const_expr(not self.on_window):
                below = below + cute.math.exp2(own - finite, fastmath=True)
            if thread < share * lanes:
                factors[thread] = shrink / below if below > Float32(0.0) else Float32(0.0)
        cute.arch.barrier(barrier_id=AMONG, number_of_threads=MULTIPLYING)
        for i in cutlass.range_constexpr(-(-share // at_once)):
            r = i * at_once + thread // (d // 4)
            row = split * share + r
            head = group * self.H + row
            x = [Float32(0.0) for _ in range(4)]
            for b in cutlass.range_constexpr(splits):
                factor = factors[cutlass.min(r, share - 1) * lanes + b]
                x = [old + factor * new for old, new in zip(x, parts[i][b], strict=True)]
            if const_expr(self.rope > 0):
                if column >= d - self.rope:
                    angle = (column - (d - self.rope)) // 2
                    x[0], x[1] = self.turned(x[0], x[1], table, angle)
                    x[2], x[3] = self.turned(x[2], x[3], table, angle + 1)
            if r < share:
                if row < cutlass.min(self.H, self.h - group * self.H):
                    narrow = cute.make_rmem_tensor((4,), BFloat16)
                    for j in cutlass.range_constexpr(4):
                        narrow[j] = x[j].to(BFloat16)
                    cute.autovec_copy(narrow, cute.zipped_divide(out[token, head, None], (4,))[None, column // 4])


@cute.jit
def multiply(of: cute.TiledMma, sums: cute.Tensor, a: cute.Tensor, b: cute.Tensor, anew: cutlass.Constexpr):
    """Start sums = A B, or sums += A B."""
    warpgroup.fence()
    atom = cute.make_mma_atom(of.op)
    atom.set(warpgroup.Field.ACCUMULATE, not anew)
    for k in cutlass.range_constexpr(cute.size(a.shape[2])):
        cute.gemm(atom, sums, a[None, None, k], b[None, None, k], sums)
        atom.set(warpgroup.Field.ACCUMULATE, True)
    warpgroup.commit_group()


def program(shape: Shape, config: Config):
    return Attention(shape, config), arguments(shape)


def configs(shape: Shape) -> Iterator[Config]:
    """All that fit; the first is what many tokens are fastest with."""
    for splits in (1, 2, 3, 4, 5, 6, 7, 8):
        for heads in (64, 32, 16):
            for rows, stages in ((80, 2), (64, 2), (48, 3), (32, 4), (80, 1), (96, 1), (112, 1)):
                config = Config(heads, rows, stages, splits)
                if heads < 16 + shape.heads and fits(shape, config):
                    yield config


def rank(shape: Shape, work: tuple[int, ...]) -> list[Config]:
    """All configurations, best first for so many tokens, each with so many rows; where results must not depend on the number of
    tokens, those of one division."""
    found = list(configs(shape))
    if alike():
        found = of_one(found, lambda config, tokens: estimate(shape, config, tokens, work[1]))
    return sorted(found, key=lambda config: estimate(shape, config, *work))


KERNEL = Kernel("attention_wide", __file__, program, configs, rank)


def takes(shape: Shape) -> bool:
    return shape.d in (256, 512) and shape.rope % 8 == 0 and shape.rope <= shape.d // 2


def least(shape: Shape, work: tuple[int, ...]) -> float:
    """Microseconds, as estimated, of the best configuration for so much work."""
    return estimate(shape, rank(shape, work)[0], *work)
