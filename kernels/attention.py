"""Attention of few queries over index lists, bf16, with tensor cores.

A cluster of blocks shares the row list of 16 to 64 heads of one token. Each block streams its rows, whole, through shared
memory in tiles: the scores of a tile are divided among the warps by rows, the softmax among all threads, and the sum of
values by columns, each warp keeping all heads of its columns in registers. At the end every block reads its part of the
heads from all blocks of the cluster, in their order, and writes the result: one launch, no workspace, no atomics.

Several clusters may share long lists. Then each writes its sums, and a second launch adds them up, in their order.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, const_expr

from dsv4_compile.kernel import Kernel, alike, by_twos, fake, rounded
from dsv4_compile.kernels import attention_exact, attention_inputs, attention_wide
from dsv4_compile.kernels import warps as of_warp
from dsv4_compile.kernels.attention_cost import PROCESSORS, excess, of_one, usable
from dsv4_compile.kernels.attention_inputs import Rows, arguments, named

LOG2E = math.log2(math.e)
WARPS = 8
THREADS = 32 * WARPS
SHARED = 227 * 1024 - 1024  # bytes of a block on sm_90 and later, and what the system keeps


@dataclass(frozen=True)
class Shape(attention_inputs.Shape):
    """Queries of `heads` heads of d channels, d a multiple of 64 and at most 512. entries: whether there is a second list.
    on_window: where the sink goes. rope: trailing channels that the result is turned back in, a multiple of 4, or 0."""

    @property
    def row_bytes(self) -> int:
        """Of keys and entries."""
        return 2 * self.d

    def has_registers(self, config: "Config") -> bool:
        """For two blocks of a processor."""
        return config.heads == 16


@dataclass(frozen=True)
class Config:
    """heads: of a block, 16, 32 or 64. rows: of a tile, 32 or 64. stages: tiles on their way. splits: blocks of a cluster.
    chunks: clusters that share a list. parts: of a block's rows, each with sums of its own, as if they were those of blocks."""

    heads: int
    rows: int
    stages: int
    splits: int
    chunks: int = 1
    parts: int = 1

    @property
    def division(self) -> tuple[int, ...]:
        """What the order of sums depends on: configurations of which it is the same give the same bits."""
        return self.heads, self.rows, self.splits * self.parts, self.chunks


class Plan:
    """Who does what, and where it lies in shared memory, in words of 4 bytes."""

    def __init__(self, shape: Shape, config: Config):
        d, H, R = shape.d, config.heads, config.rows
        self.of_m = H // 16  # warps side by side in heads
        self.of_n = min(R // 8, WARPS // self.of_m)  # in rows
        slices = WARPS // (self.of_m * self.of_n)
        self.of_k = (
            slices if d % (64 * slices) == 0 else 1
        )  # in channels; their sums are added by whoever reads the scores
        self.n_tiles = R // 8 // self.of_n
        self.score_row, self.value_row, self.weight_row = R + 8, d + 8, R // 2 + 4  # padded: no two lanes in one bank
        self.q = 0
        self.kv = H * d // 2
        self.scores = self.kv + config.stages * R * shape.row_bytes // 4
        self.weights = self.scores + self.of_k * H * self.score_row
        free = self.weights + H * self.weight_row
        self.values = self.kv  # at the end, over tiles, scores and weights
        self.rescale = max(free, self.values + config.parts * H * self.value_row)
        self.bias = self.rescale + H
        self.top = self.bias + config.stages * R
        self.total = self.top + config.parts * H
        self.words = self.total + config.parts * H


def fits(shape: Shape, config: Config) -> bool:
    """Whether a block has the room, in registers too."""
    if config.heads == 64 and config.splits > 4:
        return False
    if config.heads * config.parts > 64:  # registers
        return False
    return config.splits <= config.heads and 4 * Plan(shape, config).words <= SHARED


def at_once(shape: Shape, config: Config) -> int:
    """Blocks of a processor: two where memory and, with few heads, registers allow it."""
    return 2 if shape.has_registers(config) and 8 * Plan(shape, config).words <= SHARED else 1


class Attention(Rows):
    def __init__(self, shape: Shape, config: Config):
        self.d, self.h, self.rope, self.on_window = shape.d, shape.heads, shape.rope, shape.on_window
        self.H, self.R, self.stages, self.splits = config.heads, config.rows, config.stages, config.splits
        self.chunks, self.parts = config.chunks, config.parts
        self.plan = Plan(shape, config)
        self.row_bytes = 2 * shape.d
        self.at_once = at_once(shape, config)

    @cute.jit
    def __call__(
        self, q, keys, window, entries, index, sink, cos, sin, sums, marks, out, scale: Float32, T: Int32, stream
    ):
        groups, tokens = -(-self.h // self.H), q.shape[0]
        self.kernel(q, keys, window, entries, index, sink, cos, sin, sums, marks, out, scale, T).launch(
            grid=[self.splits * self.chunks * tokens, groups, 1],
            block=[THREADS, 1, 1],
            cluster=[self.splits, 1, 1],
            min_blocks_per_mp=self.at_once,
            preferred_smem_carveout=100,
            stream=stream,
            use_pdl=True,
        )
        if const_expr(self.chunks > 1):
            self.add_up(sums, marks, sink, cos, sin, out).launch(
                grid=[tokens, self.h, 1], block=[128, 1, 1], stream=stream, use_pdl=True
            )

    @cute.kernel
    def kernel(self, q, keys, window, entries, index, sink, cos, sin, sums, marks, out, scale, T):
        of_warp.follow()
        thread, _, _ = cute.arch.thread_idx()
        place, group, _ = cute.arch.block_idx()
        split, chunk, token = place % self.splits, Int32(0), place // self.splits
        if const_expr(self.chunks > 1):
            chunk, token = token % self.chunks, token // self.chunks
        warp, lane = cute.arch.make_warp_uniform(thread // 32), thread % 32
        plan, H, R, d = self.plan, self.H, self.R, self.d
        room = cutlass.memory.SmemAllocator().allocate_tensor(Float32, cute.make_layout((plan.words,)), 128)
        start = room.iterator.toint()
        request = token // T
        W = window.shape[1]
        rows = W
        if const_expr(entries is not None):
            rows = W + index.shape[1]
        tiles = cute.ceil_div(rows, R)
        per = cute.ceil_div(tiles, self.splits * self.parts * self.chunks)
        first = (chunk * self.splits + split) * self.parts * per
        last = cutlass.min(first + self.parts * per, tiles)

        # the tiles that fit, and the queries
        picked = [self.pick(first + s, last, rows, token, window, index, warp, lane) for s in range(self.stages - 1)]
        self.fetch_queries(q, token, group, start, thread)
        for s in cutlass.range_constexpr(self.stages - 1):
            if first + s < last:
                self.fetch(first + s, s, picked[s], request, W, keys, entries, start, room, warp, lane)
            cute.arch.cp_async_commit_group()
        upcoming = self.pick(first + self.stages - 1, last, rows, token, window, index, warp, lane)

        self.settle_queries(start, thread)
        values = cute.make_rmem_tensor((4, d // 64, H // 16, self.parts), Float32)
        values.fill(0.0)
        per_row = THREADS // H  # threads that share the softmax of a head
        mine = thread // per_row
        sink_here = Float32(0.0)
        if group * H + mine < self.h:
            sink_here = sink[group * H + mine] * Float32(LOG2E)
        for part in cutlass.range_constexpr(self.parts):
            top, total = -Float32.inf, Float32(0.0)
            for tile in cutlass.range(first + part * per, cutlass.min(first + (part + 1) * per, last), unroll=1):
                place = tile - first
                stage = place % self.stages
                cute.arch.cp_async_wait_group(self.stages - 2)
                cute.arch.barrier()  # this tile has landed, and nobody reads the one before
                ahead = tile + self.stages - 1
                if ahead < last:
                    to = (place + self.stages - 1) % self.stages
                    self.fetch(ahead, to, upcoming, request, W, keys, entries, start, room, warp, lane)
                cute.arch.cp_async_commit_group()
                upcoming = self.pick(ahead + 1, last, rows, token, window, index, warp, lane)
                self.score(stage, start, warp, lane)
                cute.arch.barrier()
                top, total = self.weigh(tile, stage, W, scale, sink_here, top, total, start, room, thread)
                cute.arch.barrier()
                self.add(stage, values[None, None, None, part], start, room, warp, lane)
            total = cute.arch.warp_reduction_sum(total, threads_in_group=per_row)
            if thread % per_row == 0:
                room[plan.top + part * H + mine] = top
                room[plan.total + part * H + mine] = total

        cute.arch.cp_async_wait_group(0)
        cute.arch.barrier()  # tiles, scores and weights are free
        for part in cutlass.range_constexpr(self.parts):
            self.keep(values[None, None, None, part], part, start, warp, lane)
        of_warp.everybody(self.splits)
        self.combine(split, chunk, group, token, sink, cos, sin, sums, marks, out, start, thread)
        if const_expr(self.splits > 1):
            cute.arch.cluster_arrive_relaxed()  # others may still be reading what lies here
            cute.arch.cluster_wait()

    @cute.jit
    def pick(self, tile, last, rows, token, window, index, warp, lane):
        """The row that this lane's place of a tile names; -1: none. Each warp brings R / 8 rows."""
        part = self.R // WARPS
        place = tile * self.R + warp * part + lane % part
        row = Int32(-1)
        if tile < last:
            row = named(place, rows, token, window, index)
        return row

    @cute.jit
    def fetch(self, tile, stage, picked, request, W, keys, entries, start, room, warp, lane):
        """Start copying a tile; a place without a row is filled with zeros, and its bias keeps it out."""
        part, pieces = self.R // WARPS, self.d // 8  # of 16 bytes
        if lane < part:
            room[self.plan.bias + stage * self.R + warp * part + lane] = Float32(0.0) if picked >= 0 else -Float32.inf
        if const_expr(self.parts == 1):
            for i in cutlass.range_constexpr(part * pieces // 32):
                self.fetch_pieces(i, tile, stage, picked, request, W, keys, entries, start, warp, lane)
        else:  # what is the same for all tiles finds no registers
            for i in cutlass.range(part * pieces // 32, unroll=1):
                self.fetch_pieces(i, tile, stage, picked, request, W, keys, entries, start, warp, lane)

    @cute.jit
    def fetch_pieces(self, i, tile, stage, picked, request, W, keys, entries, start, warp, lane):
        """A piece of 16 bytes by each lane."""
        part, pieces = self.R // WARPS, self.d // 8
        v = i * 32 + lane
        here, piece = v // pieces, v % pieces
        row = cute.arch.shuffle_sync(picked, here)
        source = self.address(keys, request, row)
        if const_expr(entries is not None):
            if tile * self.R + warp * part + here >= W:
                source = self.address(entries, request, row)
        place = warp * part + here
        base = start + 4 * self.plan.kv + stage * self.R * self.row_bytes
        target = base + place * self.row_bytes + (piece ^ (place % 8)) * 16
        of_warp.copy_16(target, source + piece * 16, Int32(16) if row >= 0 else Int32(0))

    @cute.jit
    def fetch_queries(self, q, token, group, start, thread):
        """Zeros for heads beyond the last."""
        pieces = self.d // 8
        for i in cutlass.range_constexpr(-(-self.H * pieces // THREADS)):
            v = i * THREADS + thread
            row, piece = v // pieces, v % pieces
            head = group * self.H + row
            inside = head < self.h
            at = Int64(token * self.h + (head if inside else 0)) * self.row_bytes
            target = start + 4 * self.plan.q + row * self.row_bytes + (piece ^ (row % 8)) * 16
            if row < self.H:
                of_warp.copy_16(target, q.iterator.toint() + at + piece * 16, Int32(16) if inside else Int32(0))

    @cute.jit
    def settle_queries(self, start, thread):
        """What is to be done to queries once they have landed: nothing."""

    @cute.jit
    def keep(self, values, part, start, warp, lane):
        """This warp's sums of a part into shared memory."""
        plan, tiles = self.plan, self.d // 64
        for m in cutlass.range_constexpr(self.H // 16):
            for n in cutlass.range_constexpr(tiles):
                for i in cutlass.range_constexpr(2):
                    row, column = m * 16 + lane // 4 + 8 * i, (warp * tiles + n) * 8 + 2 * (lane % 4)
                    word = plan.values + (part * self.H + row) * plan.value_row + column
                    of_warp.store_pair(start + 4 * word, values[2 * i, n, m], values[2 * i + 1, n, m])

    @cute.jit
    def score(self, stage, start, warp, lane):
        """scores = queries rows^T: a warp has 16 heads, some rows, and all channels or a slice of them."""
        plan, steps = self.plan, self.d // self.plan.of_k // 32
        m, n, k = warp % plan.of_m, (warp // plan.of_m) % plan.of_n, warp // (plan.of_m * plan.of_n)
        swizzle = lane % 8
        from_q = start + 4 * plan.q + (m * 16 + lane % 16) * self.row_bytes + k * steps * 64
        row = stage * self.R + n * plan.n_tiles * 8 + lane % 8
        from_k = start + 4 * plan.kv + row * self.row_bytes + k * steps * 64
        if k < plan.of_k:
            chains = 1 if plan.n_tiles > 2 else 2  # sums that do not wait for each other
            sums = cute.make_rmem_tensor((4, chains, plan.n_tiles), Float32)
            sums.fill(0.0)
            for s in cutlass.range_constexpr(steps):  # 32 channels each; 64 are one period of the swizzle
                line = 128 * (s // 2)
                a = []
                for half in cutlass.range_constexpr(2):
                    piece = 4 * (s % 2) + 2 * half + lane // 16
                    a.append(of_warp.load_matrices(from_q + line + (piece ^ swizzle) * 16))
                for t in cutlass.range_constexpr(plan.n_tiles):
                    piece = 4 * (s % 2) + lane // 8
                    at = from_k + t * 8 * self.row_bytes + line + (piece ^ swizzle) * 16
                    b = of_warp.load_matrices(at)
                    of_warp.multiply(sums[None, 0, t], a[0], b[0], b[1])
                    of_warp.multiply(sums[None, chains - 1, t], a[1], b[2], b[3])
            for t in cutlass.range_constexpr(plan.n_tiles):
                for i in cutlass.range_constexpr(2):
                    head = k * self.H + m * 16 + lane // 4 + 8 * i
                    word = plan.scores + head * plan.score_row + (n * plan.n_tiles + t) * 8 + 2 * (lane % 4)
                    low, high = sums[2 * i, 0, t], sums[2 * i + 1, 0, t]
                    if const_expr(chains == 2):
                        low, high = low + sums[2 * i, 1, t], high + sums[2 * i + 1, 1, t]
                    of_warp.store_pair(start + 4 * word, low, high)

    @cute.jit
    def weigh(self, tile, stage, W, scale, sink, top, total, start, room, thread):
        """weights = 2^(scores - the largest so far), rounded; how much what was summed before shrinks by; the new largest
        and the new sum (of this thread's columns, as rounded)."""
        plan, R, H = self.plan, self.R, self.H
        per_row = THREADS // H
        head, part = thread // per_row, thread % per_row
        pairs = R // (2 * per_row)
        s = cute.make_rmem_tensor((2, pairs), Float32)
        largest = top
        for p in cutlass.range_constexpr(pairs):
            column = 2 * (p * per_row + part)
            for j in cutlass.range_constexpr(2):
                x = room[plan.scores + head * plan.score_row + column + j]
                for k in cutlass.range_constexpr(1, plan.of_k):
                    x = x + room[plan.scores + (k * H + head) * plan.score_row + column + j]
                x = x * (scale * Float32(LOG2E)) + room[plan.bias + stage * R + column + j]
                if const_expr(self.on_window):
                    x = x + sink if tile * R + column + j < W else x
                s[j, p] = x
                largest = cute.arch.fmax(largest, x)
        largest = cute.arch.warp_reduction_max(largest, threads_in_group=per_row)
        finite = Float32(0.0) if largest == -Float32.inf else largest
        shrink = cute.math.exp2(top - finite, fastmath=True)
        added = Float32(0.0)
        for p in cutlass.range_constexpr(pairs):
            weight = cute.make_rmem_tensor((2,), BFloat16)
            for j in cutlass.range_constexpr(2):
                weight[j] = cute.math.exp2(s[j, p] - finite, fastmath=True).to(BFloat16)
                added = added + weight[j].to(Float32)
            word = plan.weights + head * plan.weight_row + p * per_row + part
            room[word] = cute.recast_tensor(weight, Float32)[0]
        if part == 0:
            room[plan.rescale + head] = shrink
        return largest, total * shrink + added

    @cute.jit
    def add(self, stage, values, start, room, warp, lane):
        """values = values * shrink + weights rows: a warp has all heads and d / 8 channels."""
        plan, tiles = self.plan, self.d // 64
        for m in cutlass.range_constexpr(self.H // 16):
            for i in cutlass.range_constexpr(2):
                shrink = room[plan.rescale + m * 16 + lane // 4 + 8 * i]
                for n in cutlass.range_constexpr(tiles):
                    values[2 * i, n, m] = values[2 * i, n, m] * shrink
                    values[2 * i + 1, n, m] = values[2 * i + 1, n, m] * shrink
        for s in cutlass.range_constexpr(self.R // 32):
            a = []
            for m in cutlass.range_constexpr(self.H // 16):
                for half in cutlass.range_constexpr(2):
                    word = plan.weights + (m * 16 + lane % 16) * plan.weight_row + (4 * s + 2 * half + lane // 16) * 4
                    a.append(of_warp.load_matrices(start + 4 * word))
            row = start + 4 * plan.kv + (stage * self.R + s * 32 + lane) * self.row_bytes
            for n in cutlass.range_constexpr(tiles):
                b = of_warp.load_transposed(row + ((warp * tiles + n) ^ (lane % 8)) * 16)
                for m in cutlass.range_constexpr(self.H // 16):
                    of_warp.multiply(values[None, n, m], a[2 * m], b[0], b[1])
                    of_warp.multiply(values[None, n, m], a[2 * m + 1], b[2], b[3])

    @cute.jit
    def combine(self, split, chunk, group, token, sink, cos, sin, sums, marks, out, start, thread):
        """This block's part of the heads, from all blocks of the cluster: the result, or this cluster's part of it."""
        plan, d, share = self.plan, self.d, -(-self.H // self.splits)
        for i in cutlass.range_constexpr(-(-share * d // (4 * THREADS))):
            v = i * THREADS + thread
            row, column = split * share + v // (d // 4), 4 * (v % (d // 4))
            head = group * self.H + row
            if v < share * d // 4 and head < self.h and row < self.H:
                blocks = [of_warp.of_block(start, b) if self.splits > 1 else start for b in range(self.splits)]
                local = const_expr(self.splits == 1)
                rows = [(b, p * self.H + row) for b in blocks for p in range(self.parts)]
                tops = [of_warp.load_word(b + 4 * (plan.top + r), local) for b, r in rows]
                totals = [of_warp.load_word(b + 4 * (plan.total + r), local) for b, r in rows]
                at = 4 * (plan.values + column)
                parts = [of_warp.load_words(b + at + 4 * r * plan.value_row, local) for b, r in rows]
                if const_expr(self.chunks == 1):
                    self.finish(tops, totals, parts, token, head, column, sink, cos, sin, out)
                else:
                    largest = self.largest(tops)
                    below, x = self.together(tops, totals, parts, largest)
                    part = cute.make_rmem_tensor((4,), Float32)
                    for j in cutlass.range_constexpr(4):
                        part[j] = x[j]
                    cute.autovec_copy(part, cute.zipped_divide(sums[token, chunk, head, None], (4,))[None, column // 4])
                    if column == 0:
                        marks[token, chunk, head, 0] = largest
                        marks[token, chunk, head, 1] = below

    @cute.kernel
    def add_up(self, sums, marks, sink, cos, sin, out):
        """The result from what the clusters wrote: a block has a head of a token."""
        of_warp.follow()
        thread, _, _ = cute.arch.thread_idx()
        token, head, _ = cute.arch.block_idx()
        if thread < self.d // 4:
            tops = [marks[token, c, head, 0] for c in range(self.chunks)]
            totals = [marks[token, c, head, 1] for c in range(self.chunks)]
            parts = cute.make_rmem_tensor((4, self.chunks), Float32)
            for c in cutlass.range_constexpr(self.chunks):
                cute.autovec_copy(cute.zipped_divide(sums[token, c, head, None], (4,))[None, thread], parts[None, c])
            parts = [[parts[j, c] for j in range(4)] for c in range(self.chunks)]
            self.finish(tops, totals, parts, token, head, 4 * thread, sink, cos, sin, out)

    def largest(self, tops):
        found = tops[0]
        for top in tops[1:]:
            found = cute.arch.fmax(found, top)
        return found

    @cute.jit
    def together(self, tops, totals, parts, largest):
        """Sums of weights and of values, both against the largest score."""
        finite = Float32(0.0) if largest == -Float32.inf else largest
        below, x = Float32(0.0), [Float32(0.0) for _ in range(4)]
        for top, total, part in zip(tops, totals, parts, strict=True):
            shrink = cute.math.exp2(top - finite, fastmath=True)
            below = below + shrink * total
            x = [old + shrink * new for old, new in zip(x, part, strict=True)]
        return below, x

    @cute.jit
    def finish(self, tops, totals, parts, token, head, column, sink, cos, sin, out):
        """Four columns of a head: (sum of values) / (sum of weights [+ sink]), turned back, rounded."""
        largest = self.largest(tops)
        if const_expr(not self.on_window):
            largest = cute.arch.fmax(largest, sink[head] * Float32(LOG2E))
        below, x = self.together(tops, totals, parts, largest)
        if const_expr(not self.on_window):
            finite = Float32(0.0) if largest == -Float32.inf else largest
            below = below + cute.math.exp2(sink[head] * Float32(LOG2E) - finite, fastmath=True)
        inverse = Float32(0.0)
        if below > Float32(0.0):
            inverse = Float32(1.0) / below
        result = cute.make_rmem_tensor((4,), Float32)
        for j in cutlass.range_constexpr(4):
            result[j] = x[j] * inverse
        if const_expr(self.rope > 0):
            if column >= self.d - self.rope:
                of = token % cos.shape[0]
                for p in cutlass.range_constexpr(2):
                    angle = (column - (self.d - self.rope)) // 2 + p
                    c, s = cos[of, angle], sin[of, angle]
                    a, b = result[2 * p], result[2 * p + 1]
                    result[2 * p] = a * c + b * s
                    result[2 * p + 1] = b * c - a * s
        narrow = cute.make_rmem_tensor((4,), BFloat16)
        narrow.store(result.load().to(BFloat16))
        cute.autovec_copy(narrow, cute.zipped_divide(out[token, head, None], (4,))[None, column // 4])


def program(shape: Shape, config: Config):
    """As `arguments` says; to work in, sums [N, chunks, h, d] and marks [N, chunks, h, 2] fp32, or None with one chunk."""
    N, work = cute.sym_int(), (None, None)
    if config.chunks > 1:
        parts = N, config.chunks, shape.heads
        work = fake(Float32, *parts, shape.d), fake(Float32, *parts, 2, align=4)
    return Attention(shape, config), arguments(shape, *work, N=N)


def configs(shape: Shape) -> Iterator[Config]:
    """All that fit; the first is what one token is fastest with."""
    for splits, chunks in (*((s, 1) for s in (8, 7, 6, 5, 4, 2, 1)), (8, 2), (8, 4), (8, 8)):
        for heads in (16, 32, 64):
            for rows, stages in ((32, 3), (32, 4), (64, 2), (32, 2), (64, 3)):
                config = Config(heads, rows, stages, splits, chunks)
                if heads < 16 + shape.heads and fits(shape, config):
                    yield config


def estimate(shape: Shape, config: Config, tokens: int, rows: int) -> float:
    """Microseconds, fitted to timings on an H200: a start and an end, tiles, and as many rounds as the blocks need. Clusters
    leave some processors alone; two blocks of one processor slow each other down."""
    H, half, wide = config.heads, config.rows / 32, shape.d / 512
    tiles = config.parts * max(1, -(-rows // (config.rows * config.splits * config.chunks * config.parts)))
    rings = 0.1 * abs(config.stages - 3) if config.rows == 32 else 0.3 * (config.stages - 2)
    each = 2.2 + 0.125 * H + rings + 0.03 * config.splits + 0.3 * (config.parts - 1)
    each += tiles * wide * (0.0325 * H - 0.1 + (0.63 + 0.011 * H) * half)
    blocks, here = tokens * -(-shape.heads // H) * config.splits * config.chunks, at_once(shape, config)
    again = 0 if config.chunks == 1 else 1.8 + 2e-6 * tokens * config.chunks * shape.heads * shape.d
    crowded = 1 + 0.36 * (here - 1) * min(2, max(0, blocks / PROCESSORS - 0.25))
    return -(-blocks // (usable(config.splits) * here)) * each * crowded + again


def rank(shape: Shape, work: tuple[int, ...]) -> list[Config]:
    return ranked(shape, work, list(configs(shape)))


def ranked(shape: Shape, work: tuple[int, ...], found: list[Config], judge: Any = estimate) -> list[Config]:
    """These configurations, best first for so many tokens, each with so many rows; where results must not depend on the number
    of tokens, those of one division: the one whose worst excess over the best for 1, 2, 4 or 8 tokens is least."""
    if alike():
        found = [c for c in found if c.splits & (c.splits - 1) == 0]  # those that two parts can make up for
        found += [c for c in (replace(c, parts=2) for c in found) if fits(shape, c)]
        found = of_one(found, lambda config, tokens: judge(shape, config, tokens, work[1]))
    return sorted(found, key=lambda config: judge(shape, config, *work))


KERNEL = Kernel("attention", __file__, program, configs, rank)


@cache
def wider(shape: Shape, work: tuple[int, ...], alike: bool = False) -> bool:
    """Whether products of warpgroups are faster for so much work; alike: whatever the number of tokens is."""
    wide = attention_wide.Shape(**asdict(shape))
    if not attention_wide.takes(wide):
        return False

    def us(by_warpgroups: bool, tokens: int) -> float:
        asked = tokens, work[1]
        return attention_wide.least(wide, asked) if by_warpgroups else estimate(shape, rank(shape, asked)[0], *asked)

    if not alike:
        return us(True, work[0]) < us(False, work[0])
    worst = excess((False, True), us, bool)
    return worst[True] < worst[False]


def launch(shape: Shape, dtype: str, warpgroups: bool, *arguments) -> None:
    """See `program`, without sums and marks. What the tensor cores do not take runs exactly. warpgroups: whether the GPU has
    their products, as Hopper."""
    if dtype == "bytes":
        from dsv4_compile.kernels import attention_stored  # which is made from this

        attention_stored.launch(shape, *arguments)
        return
    if dtype != "bf16" or shape.d % 64 or shape.d > 512 or shape.rope % 4:
        exact = attention_exact.Shape(**asdict(shape), dtype=dtype)
        attention_exact.KERNEL.launcher(exact)(*arguments)
        return
    q, _, window, _, index, *_ = arguments
    rows = window.shape[1] + (0 if index is None else index.shape[1])
    work = by_twos(q.shape[0]), rounded(rows)
    if warpgroups and wider(shape, work, alike()):
        attention_wide.KERNEL.launcher(attention_wide.Shape(**asdict(shape)), None, work)(*arguments)
        return
    run(shape, KERNEL.choice(shape, work), *arguments)


def run(shape: Shape, config: Config, q, keys, window, entries, index, sink, cos, sin, *rest, kernel=KERNEL) -> None:
    """In this configuration, with room for it to work in."""
    sums, marks = None, None
    if config.chunks > 1:
        sums, marks = (sink.new_empty(len(q), config.chunks, shape.heads, n) for n in (shape.d, 2))
    kernel.launcher(shape, config)(q, keys, window, entries, index, sink, cos, sin, sums, marks, *rest)
