"""Scores of the lightning indexer's entries, sum_h w[h] relu(q[h] . key), by tensor cores.

A warp takes 16 entries at a time, so that keys go from memory to registers once and nothing but one number of each entry leaves
them. Queries of all heads are in its registers; or, on Hopper, in the shared memory of its block, and four warps multiply
64 entries together. What comes later is on its way: in registers, or in a ring of each warp's own in shared memory.

Keys in e4m3 are multiplied as they are where four warps work together: a head's query is two numbers of e4m3 for each one, and
the power of two that it was divided by goes into the head's weight. A warp alone makes them bf16 by moving bits, which
multiplies them by 2^-120; queries make up for some of it. The scale of an entry multiplies its score.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, const_expr

from dsv4_compile.kernels import stored, warpgroup
from dsv4_compile.kernels import warps as of_warp
from dsv4_compile.kernels.parts import PARTS, SECOND, larger, pointed, split

TILE = 16  # entries of a warp's product
TOGETHER = 4  # warps of a warpgroup
E4M3 = stored.Format("fp8")
LIFT = E4M3.lift  # of queries
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
        return TILE * self.row + (0 if self.keys == "bf16" else 4 * TILE)

    @property
    def tiles(self) -> int:
        """Of 8 heads."""
        return -(-self.heads // 8)


def rooms(shape: Shape, scorers: int, stages: int, grouped: bool) -> tuple[int, int]:
    """Bytes of the queries and of the rings that so many warps have in shared memory."""
    return 16 * shape.tiles * shape.d if grouped else 0, scorers * stages * shape.stage


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


class Scores:
    """scorers: warps of a block. stages: tiles of a warp's ring, or 0. grouped: whether four warps multiply together. floats:
    whether scores are written as they are, not as integers that sort like them."""

    def __init__(self, shape: Shape, scorers: int, stages: int, grouped: bool, floats: bool):
        self.h, self.d, self.rope = shape.heads, shape.d, shape.rope
        self.tiles, self.lines = shape.tiles, shape.d // 32  # of 8 heads, of 32 channels
        self.scaled, self.row, self.stage, self.pieces = shape.keys == "fp8", shape.row, shape.stage, shape.row // 64
        self.scorers, self.stages, self.grouped, self.floats = scorers, stages, grouped, floats
        self.codes = self.scaled and grouped  # whether keys are multiplied as they are
        self.wide = self.tiles * (PARTS if self.codes else 1)  # columns of the queries as a right operand, by 8
        self.turns_of_warps = -(-self.tiles // scorers)  # until all heads are in shared memory
        # whether queries are asked for by copies, before anything is known
        self.early = grouped and floats and stages > 0
        self.rooms = *rooms(shape, scorers, stages, grouped), self.tiles * self.asked_bytes if self.early else 0
        self.back = 1.0 if self.codes else 1 / (E4M3.unit * LIFT)

    def seen(self, visible, keys, token):
        """Entries that a token may see."""
        return cutlass.min(Int32(visible[token % visible.shape[0]]), keys.shape[1])

    def allocate(self, smem):
        """Addresses of the queries, of the rings, and of what is asked for early."""
        return tuple(
            smem.allocate_tensor(Int32, cute.make_layout((size // 4,)), 128).iterator.toint() if size > 0 else Int32(0)
            for size in self.rooms
        )

    @property
    def asked_bytes(self) -> int:
        """Of eight heads: for each lane 16 bytes of each run, and four cosines and sines of those that are turned."""
        return 32 * (16 * self.lines + 32 * sum(map(self.turns_here, range(self.lines))))

    @cute.jit
    def score(self, q, keys, scales, w, cos, sin, weights, room, token, T, first, last, step, target, skip):
        """A warp's tiles `first`, `first + step`, ... below `last`, into target[entry - skip]. weights: room for 64 numbers.
        Warps of a warpgroup have neighbours, and go on while one of them has a tile."""
        thread, _, _ = cute.arch.thread_idx()
        lane, request, warp = cute.arch.lane_idx(), token // T, cute.arch.make_warp_uniform(thread // 32)
        queries, rings, ahead = room
        raw, turns, own = self.ask(q, w, cos, sin, token, thread)
        ring = rings + warp * (self.stages * self.stage)
        behind = warp % TOGETHER if const_expr(self.grouped) else Int32(0)  # the warpgroup's first tile
        if const_expr(self.stages > 0):
            for i in cutlass.range_constexpr(self.stages - 1):
                self.request_tile(keys, scales, request, first + i * step, last, ring + i * self.stage, lane)
        else:
            here, by = self.load(keys, request, first, lane), self.factor(scales, request, first, lane)
        if const_expr(self.early):
            cute.arch.cp_async_wait_group(self.stages - 1)
            tiles = [self.own_tile(i, warp) for i in range(self.turns_of_warps)]
            taken = [self.taken(ahead + t * self.asked_bytes, lane) for t in tiles]
            heads = [self.prepared(words, of_lane, lane) for words, of_lane in taken]
        else:
            heads = [self.prepared(x, turns, lane) for x in raw]
        if const_expr(self.grouped):
            self.put_queries(heads, own, warp, lane, queries, weights)
            heads = warpgroup.descriptor(queries, self.wide)
        if const_expr(not self.codes):
            if thread < 64:
                weights[thread] = own[0] if thread < self.h else Float32(0.0)
        cute.arch.barrier()
        if const_expr(self.stages > 0):
            slot = Int32(0)
            for group in cutlass.range(first - behind, last, step, unroll=1):
                tile = group + behind
                cute.arch.cp_async_wait_group(self.stages - 2)
                cute.arch.sync_warp()  # what other lanes copied is here, and nobody reads the slot before any more
                entries, times = self.received(ring + slot * self.stage, lane)
                before = slot - 1 if slot > 0 else Int32(self.stages - 1)
                coming = tile + (self.stages - 1) * step
                self.request_tile(keys, scales, request, coming, last, ring + before * self.stage, lane)
                self.write(self.products(entries, heads, weights, lane), times, tile, last, target, skip, lane)
                slot = slot + 1 if slot < self.stages - 1 else Int32(0)
        else:
            for group in cutlass.range(first - behind, last, step, unroll=1):
                tile = group + behind
                coming, then = (
                    self.load(keys, request, tile + step, lane),
                    self.factor(scales, request, tile + step, lane),
                )
                self.write(self.products(here, heads, weights, lane), by, tile, last, target, skip, lane)
                here.store(coming.load())
                by = then

    # Keys

    def entry(self, keys, tile, place):
        """That of a place in a tile. Beyond the last entry it is that one."""
        return cutlass.min(tile * TILE + place, keys.shape[1] - 1)

    def place(self, row, chunk):
        """Of the 16 bytes in a tile of a ring: eight lanes that read, of two rows, find them in different banks."""
        if self.row % 128 == 0:
            chunk = chunk ^ row % 2 * 4
        return 16 * (row * (self.row // 16) + chunk)

    @cute.jit
    def request_tile(self, keys, scales, request, tile, last, slot, lane):
        """Start to copy a tile into a slot of the ring, row by row; zeros beyond the last entry. In any case a group."""
        if tile < last:
            number, chunks = keys.element_type.width // 8, self.row // 16
            source = keys.iterator.toint() + number * (Int64(request) * keys.stride[0])
            source = source + (Int64(tile) * (TILE * self.row) + 16 * lane)
            here = keys.shape[1] - tile * TILE
            for i in cutlass.range_constexpr(TILE * chunks // 32):
                row, chunk = (32 * i + lane) // chunks, (32 * i + lane) % chunks
                of_warp.copy_16(slot + self.place(row, chunk), source + 512 * i, Int32(16 if row < here else 0))
            if const_expr(self.scaled):
                if lane < TILE:
                    place = Int64(request) * scales.stride[0] + self.entry(keys, tile, lane)
                    stored.fetch_word(slot + TILE * self.row + lane * 4, scales.iterator.toint() + 4 * place)
        cute.arch.cp_async_commit_group()

    def received(self, slot, lane):
        """A tile out of its slot, as `load` has it, and its factor."""
        part = cute.make_rmem_tensor((4, self.pieces, 2), Int32)
        for i in range(2):
            for s in range(self.pieces):
                words = of_warp.load_four(slot + self.place(lane // 4 + 8 * i, 4 * s + lane % 4))
                for j, word in enumerate(words):
                    part[j, s, i] = word
        by = Float32(1.0)
        if self.scaled:
            place = lane // 4 + 8 * (lane % 2)
            by = of_warp.load_word(slot + TILE * self.row + 4 * place, True) * Float32(self.back)
        return part, by

    @cute.jit
    def load(self, keys, request, tile, lane):
        """The entries of a tile: a lane has 16 bytes of each 64, of entries lane / 4 and 8 further."""
        many = 128 // keys.element_type.width
        part = cute.make_rmem_tensor((many, self.pieces, 2), keys.element_type)
        for i in cutlass.range_constexpr(2):
            row = cute.zipped_divide(keys[request, self.entry(keys, tile, lane // 4 + 8 * i), None], (many,))
            for s in cutlass.range_constexpr(self.pieces):
                cute.autovec_copy(row[None, 4 * s + lane % 4], part[None, s, i])
        return cute.recast_tensor(part, Int32)

    def factor(self, scales, request, tile, lane):
        """What makes a score of an entry's products: of lane 0 of four that of the first one, of lane 1 of the second."""
        if not self.scaled:
            return Float32(1.0)
        return scales[request, self.entry(scales, tile, lane // 4 + 8 * (lane % 2))] * Float32(self.back)

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

    # Queries

    def run(self, r: int, lane):
        """Which 8 channels of a key are a lane's r-th."""
        return 8 * (r // 2) + 2 * (lane % 4) + r % 2 if self.scaled else 4 * r + lane % 4

    @cute.jit
    def ask_ahead(self, q, cos, sin, token, thread, ahead):
        """Start to copy what a lane will need of its warp's heads, and angles, each lane its own. Loads in this place would be
        put off until it is known how many entries there are, which is on its way at the same time."""
        lane, warp = thread % 32, cute.arch.make_warp_uniform(thread // 32)
        for i in cutlass.range_constexpr(self.turns_of_warps):
            t = i * self.scorers + warp
            if t < self.tiles:
                here = ahead + t * self.asked_bytes
                head = cutlass.min(8 * t + lane // 4, self.h - 1)
                row = q.iterator.toint() + 2 * self.d * (Int64(token) * self.h + head)
                for s in cutlass.range_constexpr(self.lines):
                    of_warp.copy_16(here + (s * 32 + lane) * 16, row + 16 * self.run(s, lane), Int32(16))
                place = here + self.lines * 512
                for s in cutlass.range_constexpr(self.lines):
                    if const_expr(self.turns_here(s)):
                        first = cutlass.max(self.angle(s, lane), 0)
                        for table in (cos, sin):
                            of_row = table.iterator.toint() + 4 * (
                                Int64(token % cos.shape[0]) * (self.rope // 2) + first
                            )
                            for p in cutlass.range_constexpr(4):
                                stored.fetch_word(place + 4 * lane, of_row + 4 * p)
                                place = place + 128
        cute.arch.cp_async_commit_group()

    def taken(self, here, lane):
        """What `ask_ahead` copied for a lane, as `ask` has it."""
        words, turns = cute.make_rmem_tensor((4, self.lines), Int32), {}
        for s in range(self.lines):
            for i, word in enumerate(of_warp.load_four(here + (s * 32 + lane) * 16)):
                words[i, s] = word
        place = here + self.lines * 512
        for s in range(self.lines):
            if self.turns_here(s):
                at = [[place + 128 * (4 * i + p) + 4 * lane for p in range(4)] for i in range(2)]
                turns[s] = [[of_warp.load_word(x, True) for x in of_table] for of_table in at]
                place = place + 1024
        return words, turns

    def ask(self, q, w, cos, sin, token, thread):
        """Start to load what `score` needs of a token: what a lane has of the heads, of its warp's or of all, and cosines and
        sines, but for what `ask_ahead` has asked for; weights of these heads, or the thread's."""
        lane, warp = thread % 32, cute.arch.make_warp_uniform(thread // 32)
        tiles = [self.own_tile(i, warp) for i in range(self.turns_of_warps)] if self.grouped else range(self.tiles)
        raw = [] if self.early else [self.eight_heads(q, token, lane, t) for t in tiles]
        heads = [8 * t + lane // 4 for t in tiles] if self.codes else [thread]
        weights = [w[token, cutlass.min(head, self.h - 1)].to(Float32) for head in heads]
        return raw, {} if self.early else self.turns(cos, sin, token, lane), weights

    def own_tile(self, i: int, warp):
        """Which eight heads are a warp's i-th; beyond the last ones those."""
        return cutlass.min(i * self.scorers + warp, self.tiles - 1)

    def angle(self, s: int, lane):
        """The first of four angles of a lane's s-th run; below 0: it is not turned."""
        return (8 * self.run(s, lane) - (self.d - self.rope)) // 2

    def turns(self, cos, sin, token, lane):
        """By run, four cosines and four sines of a lane's channels, as `eight_heads` has them; anything where nothing turns."""
        found, row = {}, token % cos.shape[0] if self.rope > 0 else 0
        for s in range(self.lines):
            if self.turns_here(s):
                first = cutlass.max(self.angle(s, lane), 0)
                found[s] = [[table[row, first + p] for p in range(4)] for table in (cos, sin)]
        return found

    def turns_here(self, s: int) -> bool:
        """Whether some lane's s-th run is turned."""
        return self.rope > 0 and (64 * (s // 2) + 64 if self.scaled else 32 * s + 32) > self.d - self.rope

    def eight_heads(self, q, token, lane, t):
        """Of the t-th eight heads, pairs of channels as `load` has them; beyond the last head that one again."""
        heads = cute.make_rmem_tensor((8, self.lines), BFloat16)
        row = cute.zipped_divide(q[token, cutlass.min(8 * t + lane // 4, self.h - 1), None], (8,))
        for s in range(self.lines):
            cute.autovec_copy(row[None, self.run(s, lane)], heads[None, s])
        return cute.recast_tensor(heads, Int32)

    @cute.jit
    def prepared(self, words, turns, lane):
        """Turned, in pairs; of keys that become bf16, in their order."""
        for s in cutlass.range_constexpr(self.lines):
            if const_expr(s in turns):
                cosines, sines = turns[s]
                for p in cutlass.range_constexpr(4):
                    if self.angle(s, lane) >= 0:
                        c, d = cosines[p], sines[p]
                        a, b = stored.unpaired(words[p, s])
                        words[p, s] = stored.pair(a * c - b * d, a * d + b * c)
        if const_expr(self.scaled and not self.codes):
            pairs = [E4M3.order[i : i + 2] for i in range(0, 8, 2)]  # as decoded keys have them
            for s in cutlass.range_constexpr(self.lines):
                old = [words[p, s] for p in range(4)]
                for p in cutlass.range_constexpr(4):
                    words[p, s] = stored.times(stored.picked(old, *pairs[p]), Int32(LIFTS))
        return words

    @cute.jit
    def put_queries(self, heads, own, warp, lane, queries, weights):
        """By all warps, as `warpgroup` has a right operand: 32 bytes of each column, then the next 32."""
        for i in cutlass.range_constexpr(self.turns_of_warps):
            t = i * self.scorers + warp
            if t < self.tiles:
                if const_expr(self.codes):
                    self.put_parts(heads[i], own[i], lane, t, queries, weights)
                else:
                    for s in cutlass.range_constexpr(self.lines):
                        for p in cutlass.range_constexpr(4):
                            core = (2 * (2 * s + p // 2) + p % 2) * self.wide + t
                            of_warp.store(queries + core * warpgroup.CORE + 4 * lane, heads[i][p, s])
        cute.arch.fence_proxy("async.shared", space="cta")

    @cute.jit
    def put_parts(self, words, weight, lane, t, queries, weights):
        """Of the t-th eight heads: a lane's 16 bytes of a key are 8 of one product and 8 of the next. Heads 4 j + l, whose
        products lane l of four gets, have their weights in a row."""
        top = Int32(0)
        for s in cutlass.range_constexpr(self.lines):
            for p in cutlass.range_constexpr(4):
                top = larger(top, words[p, s] & 0x7FFF7FFF)
        for offset in (1, 2):
            top = larger(top, cute.arch.shuffle_sync_bfly(top, offset))
        by, point = pointed(top)
        head = 8 * t + lane // 4
        column = queries + (2 * t + lane // 16) * warpgroup.CORE + lane // 4 % 4 * (16 * PARTS) + 4 * (lane % 4)
        for s in cutlass.range_constexpr(self.lines):
            for half in cutlass.range_constexpr(2):
                pairs = [stored.times(words[2 * half + i, s], by) for i in range(2)]
                for p, word in enumerate(split([v for pair in pairs for v in stored.unpaired(pair)])):
                    of_warp.store(column + (2 * s + half) * self.wide * warpgroup.CORE + 16 * p, word)
        if lane % 4 == 0:
            weights[head % 4 * self.wide + head // 4] = weight * point if head < self.h else Float32(0.0)

    # Products

    @cute.jit
    def products(self, entries, heads, weights, lane):
        """Scores of two entries: sum_h weight relu(product). Where a product's channels lie does not matter as long as both
        factors have them in the same places."""
        if const_expr(self.codes):
            low, high = self.of_codes(entries, heads, weights, lane)
        else:
            low, high = self.of_pairs(entries, heads, weights, lane)
        for offset in (1, 2):
            low = low + cute.arch.shuffle_sync_bfly(low, offset)
            high = high + cute.arch.shuffle_sync_bfly(high, offset)
        return low, high

    def of_codes(self, entries, descriptor, weights, lane):
        """A lane's share, of every fourth head, by e4m3."""
        chain = []
        for s in range(self.pieces):
            for u in range(2):
                left = [entries[2 * u + i, s, r] for i in range(2) for r in range(2)]
                chain.append((left, 2 * s + u))
        (sums,) = warpgroup.products("e4m3", [chain], self.wide, descriptor, 2 * warpgroup.CORE * self.wide // 16)
        low = high = Float32(0.0)
        for j in range(0, self.wide, 2):
            pair = load_pair(weights.iterator.toint() + 4 * (lane % 4 * self.wide + j))
            for i, weight in enumerate(pair):
                part = sums[4 * (j + i) : 4 * (j + i) + 4]
                a, b = part[0] + part[1] * Float32(SECOND), part[2] + part[3] * Float32(SECOND)
                low = low + cute.arch.fmax(a, Float32(0.0)) * weight
                high = high + cute.arch.fmax(b, Float32(0.0)) * weight
        return low, high

    def of_pairs(self, entries, heads, weights, lane):
        """The same, of a fourth of the heads, by bf16."""
        a = self.decoded(entries)
        low = high = Float32(0.0)
        together = self.tiles if self.grouped else 4  # sums that do not wait for each other
        for first in range(0, self.tiles, together):
            tiles = range(first, min(first + together, self.tiles))
            sums = self.of_warpgroup(a, heads) if self.grouped else self.of_warp(a, heads, tiles)
            for i, t in enumerate(tiles):
                pair = load_pair(weights.iterator.toint() + 4 * (8 * t + 2 * (lane % 4)))
                for j, weight in enumerate(pair):
                    low = low + cute.arch.fmax(sums[i][j], Float32(0.0)) * weight
                    high = high + cute.arch.fmax(sums[i][2 + j], Float32(0.0)) * weight
        return low, high

    def operands(self, a):
        """(which run, which half of it, the left operand): 16 channels of 16 entries."""
        for s in range(self.lines):
            for p in (0, 2):
                yield s, p, [a[p, s, 0], a[p, s, 1], a[p + 1, s, 0], a[p + 1, s, 1]]

    def of_warp(self, a, heads, tiles):
        """By eight heads, the sums of a lane: of two heads, of its first entry and of its second one."""
        sums = [[Float32(0.0)] * 4 for _ in tiles]
        for s, p, rows in self.operands(a):
            for i, t in enumerate(tiles):
                sums[i] = stored.mma(sums[i], *rows, heads[t][p, s], heads[t][p + 1, s])
        return sums

    def of_warpgroup(self, a, descriptor):
        """The same, of all heads."""
        chain = [(rows, 2 * s + p // 2) for s, p, rows in self.operands(a)]
        (sums,) = warpgroup.products("bf16", [chain], self.wide, descriptor, 2 * warpgroup.CORE * self.wide // 16)
        return [sums[4 * t : 4 * t + 4] for t in range(self.tiles)]

    @cute.jit
    def write(self, both, by, tile, last, target, skip, lane):
        low, high = both
        if lane % 4 < 2 and tile < last:
            score = low if lane % 4 == 0 else high
            if const_expr(self.scaled):
                score = score * by
            place = tile * TILE + lane // 4 + 8 * (lane % 4) - skip
            target[place] = score if const_expr(self.floats) else sortable(score)
