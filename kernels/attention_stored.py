"""The same over keys in rows of bytes: e4m3 with a scale for each 64 channels, then 64 rotary channels in bf16.

Rows lie in shared memory as they do in a cache, 592 bytes of 512 channels: an odd number of 16-byte pieces, so that no two of 8
neighbours are in one bank. Codes become bf16 on their way from there to the tensor cores, by moved bits: as multiples of
2^-120. Of a pair of bytes that a thread gets, even and odd ones become a pair each, so channels of queries are put in that
order once, even ones before odd ones of each 16; and the sum's columns come out in that order. Scales never meet the codes:
scores are summed 64 channels at a time and multiplied by their row's scale, and the weights of a row, by which its values
are multiplied, by the scale of the 64 channels that a warp has.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8, const_expr

from dsv4_compile.kernel import Kernel, by_twos, fake, rounded
from dsv4_compile.kernels import attention
from dsv4_compile.kernels import warps as of_warp
from dsv4_compile.kernels.attention import THREADS, WARPS, Attention, Config
from dsv4_compile.kernels.stored import as_float, e4m3, picked, times

BLOCK = 64  # channels that share a scale; as many are rotary
LIFT = 0x57805780  # a pair of 2^48, by which queries and weights are multiplied, so that products of small numbers stay exact
ONES = 0x3F803F80  # a pair of 1
UNIT = 2.0**72  # what is left of 2^120


@dataclass(frozen=True)
class Shape(attention.Shape):
    """Queries of 256 or 512 channels, 64 of which are rotary."""

    @property
    def row_bytes(self) -> int:
        return -(-(self.d + BLOCK + self.d // BLOCK - 1) // 16) * 16

    def has_registers(self, config: Config) -> bool:
        return config.heads == 16 and config.rows == 32 and config.parts == 1


class Stored(Attention):
    def __init__(self, shape: Shape, config: Config):
        super().__init__(shape, config)
        self.kv_bytes, self.plain = shape.row_bytes, shape.d - BLOCK
        self.scales = self.plain + 2 * BLOCK  # where they begin
        self.columns = shape.d // WARPS  # of a warp

    @cute.jit
    def fetch(self, tile, stage, picked, request, W, keys, entries, start, room, warp, lane):
        """Start copying a tile, as it is; a place without a row is filled with zeros, and its bias keeps it out."""
        part, pieces = self.R // WARPS, self.kv_bytes // 16
        if lane < part:
            room[self.plan.bias + stage * self.R + warp * part + lane] = Float32(0.0) if picked >= 0 else -Float32.inf
        base = start + 4 * self.plan.kv + (stage * self.R + warp * part) * self.kv_bytes
        near = W - (tile * self.R + warp * part)  # places before the second list
        whole, rest = pieces // 32 * 32, pieces % 32
        for here in cutlass.range_constexpr(part):
            row = cute.arch.shuffle_sync(picked, here)
            for first in cutlass.range_constexpr(0, whole, 32):
                self.copy(base, here, first + lane, row, request, near, keys, entries)
        for first in cutlass.range_constexpr(
            0, part if rest else 0, 32 // max(rest, 1)
        ):  # what is left, of several rows
            here = first + lane // rest
            row = cute.arch.shuffle_sync(picked, here)
            if lane < min(32 // rest, part - first) * rest:
                self.copy(base, here, whole + lane % rest, row, request, near, keys, entries)

    @cute.jit
    def copy(self, base, here, piece, row, request, near, keys, entries):
        """16 bytes of a row, or zeros."""
        source = self.address(keys, request, row)
        if const_expr(entries is not None):
            if here >= near:
                source = self.address(entries, request, row)
        target = base + here * self.kv_bytes + piece * 16
        of_warp.copy_16(target, source + piece * 16, Int32(16) if row >= 0 else Int32(0))

    def address(self, rows, request, row):
        return rows.iterator.toint() + Int64(request) * rows.stride[0] + Int64(cutlass.max(row, 0)) * self.kv_bytes

    @cute.jit
    def fetch_queries(self, q, token, group, start, thread):
        """16 channels of a thread at a time; zeros for heads beyond the last."""
        for i in cutlass.range_constexpr(-(-self.H * self.d // (16 * THREADS))):
            row, first, second = self.of_thread(i, start, thread)
            head = group * self.H + row
            inside = head < self.h
            at = Int64(token * self.h + (head if inside else 0)) * self.row_bytes
            source = q.iterator.toint() + at + ((i * THREADS + thread) % (self.d // 16)) * 32
            size = Int32(16) if inside else Int32(0)
            if row < self.H:
                of_warp.copy_16(first, source, size)
                of_warp.copy_16(second, source + 16, size)

    def of_thread(self, i, start, thread):
        """Row and both addresses of a thread's channels."""
        v = i * THREADS + thread
        row, piece = v // (self.d // 16), v % (self.d // 16) * 2
        line = start + 4 * self.plan.q + row * self.row_bytes
        return row, line + (piece ^ (row % 8)) * 16, line + ((piece + 1) ^ (row % 8)) * 16

    @cute.jit
    def settle_queries(self, start, thread):
        """Even channels of each 16, then odd ones, lifted; the rotary ones stay. Each thread has waited for its own."""
        cute.arch.cp_async_wait_group(self.stages - 2)
        for i in cutlass.range_constexpr(-(-self.H * self.d // (16 * THREADS))):
            row, first, second = self.of_thread(i, start, thread)
            if row < self.H and (i * THREADS + thread) % (self.d // 16) < self.plain // 16:
                words = [*of_warp.load_four(first), *of_warp.load_four(second)]
                for odd, target in ((0, first), (1, second)):
                    of_warp.store_four(
                        target, [times(picked(words, 4 * p + odd, 4 * p + 2 + odd), LIFT) for p in range(4)]
                    )

    @cute.jit
    def score(self, stage, start, warp, lane):
        """scores = queries rows^T: a warp has 16 heads, some rows, and all blocks of channels or half of them."""
        plan, blocks = self.plan, self.d // self.plan.of_k // BLOCK
        m, n, k = warp % plan.of_m, (warp // plan.of_m) % plan.of_n, warp // (plan.of_m * plan.of_n)
        from_q = start + 4 * plan.q + (m * 16 + lane % 16) * self.row_bytes + k * blocks * 2 * BLOCK
        rows = start + 4 * plan.kv + (stage * self.R + n * plan.n_tiles * 8) * self.kv_bytes
        from_k = rows + (lane % 8) * self.kv_bytes + k * blocks * BLOCK + lane // 8 * 16
        if k < plan.of_k:
            sums = cute.make_rmem_tensor((4, plan.n_tiles), Float32)
            sums.fill(0.0)
            scales = rows + 2 * (lane % 4) * self.kv_bytes + self.scales + k * blocks
            # a loop that is not unrolled keeps registers for the sums of many heads
            for s in cutlass.range(blocks - 1, unroll=1 if plan.n_tiles > 1 else blocks - 1):
                a = self.load_queries(from_q + 2 * BLOCK * s, lane)
                self.score_codes(sums, a, from_k + s * BLOCK, scales + s)
            last = blocks - 1
            a = self.load_queries(from_q + 2 * BLOCK * last, lane)
            if const_expr(plan.of_k > 1):
                if k < plan.of_k - 1:
                    self.score_codes(sums, a, from_k + last * BLOCK, scales + last)
                else:
                    self.score_rotary(sums, a, from_k + last * BLOCK)
            else:
                self.score_rotary(sums, a, from_k + last * BLOCK)
            for t in cutlass.range_constexpr(plan.n_tiles):
                for i in cutlass.range_constexpr(2):
                    head = k * self.H + m * 16 + lane // 4 + 8 * i
                    word = plan.scores + head * plan.score_row + (n * plan.n_tiles + t) * 8 + 2 * (lane % 4)
                    of_warp.store_pair(start + 4 * word, sums[2 * i, t], sums[2 * i + 1, t])

    def load_queries(self, at, lane):
        """Operands of a block of channels, 16 each."""
        return [of_warp.load_matrices(at + ((2 * c + lane // 16) ^ (lane % 8)) * 16) for c in range(4)]

    @cute.jit
    def score_codes(self, sums, a, at, scales):
        """A block of codes: their sum, then times the scales of both rows, of 8, whose scores this thread gets."""
        for t in cutlass.range_constexpr(self.plan.n_tiles):
            tile = t * 8 * self.kv_bytes
            words = of_warp.load_matrices(at + tile)
            part = cute.make_rmem_tensor((4,), Float32)
            part.fill(0.0)
            for c in cutlass.range_constexpr(4):
                even, odd = e4m3(words[c])
                of_warp.multiply(part, a[c], even, odd)
            for i in cutlass.range_constexpr(2):
                scale = as_float(of_warp.load_byte(scales + tile + i * self.kv_bytes) << 23) * Float32(UNIT)
                for j in cutlass.range_constexpr(2):
                    sums[i + 2 * j, t] = sums[i + 2 * j, t] + part[i + 2 * j] * scale

    @cute.jit
    def score_rotary(self, sums, a, at):
        for t in cutlass.range_constexpr(self.plan.n_tiles):
            for half in cutlass.range_constexpr(2):
                b = of_warp.load_matrices(at + t * 8 * self.kv_bytes + half * BLOCK)
                of_warp.multiply(sums[None, t], a[2 * half], b[0], b[1])
                of_warp.multiply(sums[None, t], a[2 * half + 1], b[2], b[3])

    @cute.jit
    def add(self, stage, values, start, room, warp, lane):
        """values = values * shrink + weights rows: a warp has all heads and d / 8 channels, all of codes or all rotary."""
        plan, H = self.plan, self.H
        for m in cutlass.range_constexpr(H // 16):
            for i in cutlass.range_constexpr(2):
                shrink = room[plan.rescale + m * 16 + lane // 4 + 8 * i]
                for n in cutlass.range_constexpr(self.d // 64):
                    values[2 * i, n, m] = values[2 * i, n, m] * shrink
                    values[2 * i + 1, n, m] = values[2 * i + 1, n, m] * shrink
        tiles = self.d // 64
        for s in cutlass.range_constexpr(self.R // 16):
            rows = start + 4 * plan.kv + (stage * self.R + s * 16) * self.kv_bytes
            b = cute.make_rmem_tensor((4, tiles // 2), Int32)
            factors = cute.make_rmem_tensor((2,), Int32)
            self.operands(b, factors, rows, warp * self.columns, lane)
            for m in cutlass.range_constexpr(H // 16):
                word = plan.weights + (m * 16 + lane % 16) * plan.weight_row + (2 * s + lane // 16) * 4
                a = of_warp.load_matrices(start + 4 * word)
                a = [times(a[i], factors[i // 2]) for i in range(4)]
                for n in cutlass.range_constexpr(tiles):
                    of_warp.multiply(values[None, n, m], a, b[n % 2 * 2, n // 2], b[n % 2 * 2 + 1, n // 2])

    @cute.jit
    def operands(self, b, factors, rows, first, lane):
        """Of 16 rows, this warp's channels, from `first` on: of each pair of tiles four registers; and what weights are
        multiplied by, of rows 2 j and 2 j + 1, and 2 j + 8 and 2 j + 9, j being the place in a quad."""
        at = rows + lane % 16 * self.kv_bytes + lane // 16 * 16  # of 16 rows two pieces of 16 bytes
        if first < self.plain:
            for c in cutlass.range_constexpr(0, self.columns // 16, 2):
                words = [e4m3(word) for word in of_warp.load_transposed(at + first + c * 16)]
                for i in cutlass.range_constexpr(2):  # the even channels of a piece, and the odd ones
                    for half in cutlass.range_constexpr(2):
                        b[2 * i + half, c] = words[half][i]
                        b[2 * i + half, c + 1] = words[2 + half][i]
            for e in cutlass.range_constexpr(2):
                place = rows + (8 * e + 2 * (lane % 4)) * self.kv_bytes + self.scales + first // BLOCK
                low, high = of_warp.load_byte(place), of_warp.load_byte(place + self.kv_bytes)
                factors[e] = times((low << 7) | (high << 23), LIFT)
        else:
            for n in cutlass.range_constexpr(self.d // 128):
                words = of_warp.load_transposed(at + 2 * first - self.plain + n * 32)
                for i in cutlass.range_constexpr(4):
                    b[i, n] = words[i]
            for e in cutlass.range_constexpr(2):
                factors[e] = Int32(ONES)

    @cute.jit
    def keep(self, values, part, start, warp, lane):
        """This warp's sums of a part into shared memory: of codes, four channels of a thread beside each other."""
        plan, tiles = self.plan, self.d // 64
        for m in cutlass.range_constexpr(self.H // 16):
            for i in cutlass.range_constexpr(2):
                row = part * self.H + m * 16 + lane // 4 + 8 * i
                line = start + 4 * (plan.values + row * plan.value_row + warp * self.columns)
                if warp * self.columns < self.plain:
                    for c in cutlass.range_constexpr(tiles // 2):
                        at = line + 4 * (16 * c + 4 * (lane % 4))
                        four = [values[2 * i + j, 2 * c + odd, m] * Float32(UNIT) for j in range(2) for odd in range(2)]
                        of_warp.store_pair(at, four[0], four[1])
                        of_warp.store_pair(at + 8, four[2], four[3])
                else:
                    for n in cutlass.range_constexpr(tiles):
                        at = line + 4 * (8 * n + 2 * (lane % 4))
                        of_warp.store_pair(at, values[2 * i, n, m], values[2 * i + 1, n, m])


def program(shape: Shape, config: Config):
    """As attention's, with keys [B, S, bytes] and entries [B, E, bytes]."""
    stand_in = attention.program(
        attention.Shape(shape.d, shape.heads, shape.entries, shape.on_window, shape.rope), config
    )
    q, _, window, entries, *rest = stand_in[1]
    rows = lambda: fake(Uint8, cute.sym_int(), cute.sym_int(), shape.row_bytes)  # noqa: E731
    return Stored(shape, config), (q, rows(), window, None if entries is None else rows(), *rest)


def configs(shape: Shape) -> Iterator[Config]:
    """Those of attention, but of few heads and rows one: the others spill."""
    return (c for c in attention.configs(shape) if (c.heads, c.rows) != (16, 32) or c.stages == 3)


def estimate(shape: Shape, config: Config, tokens: int, rows: int) -> float:
    """Microseconds: as attention's, of clusters that have something to do, and what codes take to become numbers, which warps
    that share rows do each for itself; fitted to 26 timings on an H200."""
    tiles = config.parts * max(1, -(-rows // (config.rows * config.splits * config.chunks * config.parts)))
    busy = replace(config, chunks=max(1, -(-rows // (config.rows * config.splits * tiles))))
    usable = 112 if config.splits >= 4 else 132
    blocks = tokens * -(-shape.heads // config.heads) * config.splits * busy.chunks
    rounds = -(-blocks // (usable * attention.at_once(shape, config)))
    narrow, wide = {16: (0.6, 0.0), 32: (0.25, 0.6), 64: (1.15, 1.15)}[config.heads]  # in tiles of 32 rows, and of 64
    each = narrow if config.rows == 32 else wide
    us = attention.estimate(shape, busy, tokens, rows)
    return us + rounds * tiles * config.rows / 32 * shape.d / 512 * each


def rank(shape: Shape, work: tuple[int, ...]) -> list[Config]:
    """All configurations, best first for so many tokens, each with so many rows."""
    return attention.ranked(shape, work, list(configs(shape)), estimate)


KERNEL = Kernel("attention_stored", __file__, program, configs, rank)


def launch(shape: attention.Shape, *arguments) -> None:
    """See `program`, without sums and marks."""
    q, _, window, _, index, *_ = arguments
    rows = window.shape[1] + (0 if index is None else index.shape[1])
    stored = Shape(shape.d, shape.heads, shape.entries, shape.on_window, shape.rope)
    config = KERNEL.choice(stored, (by_twos(q.shape[0]), rounded(rows)))
    attention.run(stored, config, *arguments, kernel=KERNEL)
