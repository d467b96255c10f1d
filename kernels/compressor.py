"""The compressor: a block has a window, a thread four channels of it; softmax over the window's rows, RMSNorm, RoPE.

Many rows are shared out to teams of threads, each of which has all channels of some; they add up what they have in their order.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, const_expr

from dsv4_compile.kernel import Kernel, fake, stream
from dsv4_compile.kernels import warps as of_warp

VECTOR = 4  # channels of a thread
DTYPES = {"bf16": BFloat16, "fp32": Float32}


@dataclass(frozen=True)
class Shape:
    """Windows of `rows` rows; d channels, a multiple of 4, at most 4096, of which the last `rope` are turned in pairs.
    overlap: rows have 2 d, the older half of a window gives the first d, the newer the last. weight: its dtype."""

    d: int
    rows: int
    rope: int
    overlap: bool
    weight: str

    @property
    def threads(self) -> int:
        return -(-self.d // (VECTOR * 32)) * 32


@dataclass(frozen=True)
class Config:
    """at_once: rows whose numbers are asked for together. teams: that share a window's rows."""

    at_once: int
    teams: int = 1


class Compressor:
    def __init__(self, shape: Shape, config: Config):
        self.d, self.rows, self.rope, self.overlap = shape.d, shape.rows, shape.rope, shape.overlap
        self.threads, self.at_once, self.weight = shape.threads, config.at_once, DTYPES[shape.weight]
        self.teams, self.share = config.teams, -(-shape.rows // config.teams)  # rows of a team

    @cute.jit
    def __call__(self, c, z, index, weight, cos, sin, out, eps: Float32, stream):
        self.kernel(c, z, index, weight, cos, sin, out, eps).launch(
            grid=[out.shape[0] * out.shape[1], 1, 1],
            block=[self.threads * self.teams, 1, 1],
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(self, c, z, index, weight, cos, sin, out, eps):
        of_warp.follow()
        thread, _, _ = cute.arch.thread_idx()
        window, _, _ = cute.arch.block_idx()
        team, v = thread // self.threads, thread % self.threads
        batch, w = window // out.shape[1], window % out.shape[1]
        closed = index[batch, w, self.rows - 1] >= 0
        entry = self.entry(c, z, index, weight, cos, sin, eps, batch, w, v, closed, team)
        if team == 0 and v < self.d // VECTOR:
            cute.autovec_copy(entry, cute.zipped_divide(out[batch, w, None], (VECTOR,))[None, v])

    @cute.jit
    def entry(self, c, z, index, weight, cos, sin, eps, batch, w, v, closed, team=0):
        """This thread's channels of a window's entry; zeros of a window that is not closed. Of a closed one rows are absent
        from the old end only, of an open one all."""
        entry = cute.make_rmem_tensor((VECTOR,), Float32)
        entry.fill(0.0)
        if closed:
            top, total = cute.make_rmem_tensor((VECTOR,), Float32), cute.make_rmem_tensor((VECTOR,), Float32)
            top.fill(-1e30)
            total.fill(0.0)
            if v < self.d // VECTOR:
                self.collect(c, z, index, batch, w, v, team, entry, top, total)
            if const_expr(self.teams > 1):
                self.gather(entry, top, total, team, v)
            if v < self.d // VECTOR:
                for j in cutlass.range_constexpr(VECTOR):
                    entry[j] = entry[j] * of_warp.inverse(total[j])
            squares = (entry.load() * entry.load()).reduce(cute.ReductionOp.ADD, init_val=0.0, reduction_profile=0)
            squares = of_warp.sum_of_row(squares, team, self.teams, v, self.threads // 32)
            if v < self.d // VECTOR:
                scaled = cute.make_rmem_tensor((VECTOR,), self.weight)
                cute.autovec_copy(cute.zipped_divide(weight, (VECTOR,))[None, v], scaled)
                r = cute.math.rsqrt(squares / Float32(self.d) + eps)
                entry.store(entry.load() * r * scaled.load().to(Float32))
                for p in cutlass.range_constexpr(0, VECTOR, 2):
                    place = v * VECTOR + p - (self.d - self.rope)
                    if place >= 0:
                        cosine, sine = cos[batch, w, place // 2], sin[batch, w, place // 2]
                        a, b = entry[p], entry[p + 1]
                        entry[p] = a * cosine - b * sine
                        entry[p + 1] = a * sine + b * cosine
        return entry

    @cute.jit
    def collect(self, c, z, index, batch, w, v, team, entry, top, total):
        """entry = sum of exp(z - top) c over a team's rows, total that of exp(z - top); top, the largest gate so far, keeps the
        exponentials small."""
        n, half = self.at_once, self.rows // 2
        begin = team * self.share
        end = cutlass.min(begin + self.share, self.rows)
        for first in cutlass.range(begin, end, n, unroll=1):
            values = cute.make_rmem_tensor((VECTOR, n), Float32)
            gates = cute.make_rmem_tensor((VECTOR, n), Float32)
            row = cute.make_rmem_tensor((n,), Int32)
            for i in cutlass.range_constexpr(n):  # all of them before anything waits for one
                row[i] = Int32(index[batch, w, cutlass.min(first + i, self.rows - 1)])
            for i in cutlass.range_constexpr(n):  # absent rows read some other, without a branch
                at, there = v, cutlass.max(row[i], 0)
                if const_expr(self.overlap):
                    at = v if first + i < half else v + self.d // VECTOR
                cute.autovec_copy(cute.zipped_divide(c[batch, there, None], (VECTOR,))[None, at], values[None, i])
                cute.autovec_copy(cute.zipped_divide(z[batch, there, None], (VECTOR,))[None, at], gates[None, i])
            for i in cutlass.range_constexpr(n):
                if row[i] < 0 or first + i >= end:
                    for j in cutlass.range_constexpr(VECTOR):
                        values[j, i] = Float32(0.0)
                        gates[j, i] = -cutlass.Float32.inf
            for j in cutlass.range_constexpr(VECTOR):
                highest = top[j]
                for i in cutlass.range_constexpr(n):
                    highest = cute.arch.fmax(highest, gates[j, i])
                less = cute.math.exp(top[j] - highest)
                top[j] = highest
                entry[j] = entry[j] * less
                total[j] = total[j] * less
                for i in cutlass.range_constexpr(n):
                    share = cute.math.exp(gates[j, i] - highest)
                    total[j] = total[j] + share
                    entry[j] = entry[j] + share * values[j, i]

    @cute.jit
    def gather(self, entry, top, total, team, v):
        """What all teams have of a thread's channels, in each of them."""
        parts = cutlass.memory.SmemAllocator().allocate_tensor(
            Float32, cute.make_layout((VECTOR, self.threads, 3, self.teams)), 16
        )
        for i, own in enumerate((top, total, entry)):
            cute.autovec_copy(own, parts[None, v, i, team])
        cute.arch.barrier()
        for j in cutlass.range_constexpr(VECTOR):
            highest = Float32(-1e30)
            for t in cutlass.range_constexpr(self.teams):
                highest = cute.arch.fmax(highest, parts[j, v, 0, t])
            total[j], entry[j] = Float32(0.0), Float32(0.0)
            for t in cutlass.range_constexpr(self.teams):
                share = cute.math.exp(parts[j, v, 0, t] - highest)
                total[j] = total[j] + share * parts[j, v, 1, t]
                entry[j] = entry[j] + share * parts[j, v, 2, t]


def program(shape: Shape, config: Config):
    """c, z [B, S, C] fp32, index [B, n, rows] int64, weight [d], cos and sin [B, n, rope / 2] fp32 -> out [B, n, d] fp32."""
    B, S, n, d = cute.sym_int(), cute.sym_int(), cute.sym_int(), shape.d
    wide = lambda: fake(Float32, B, S, (1 + shape.overlap) * d)  # noqa: E731
    table = lambda: fake(Float32, B, n, shape.rope // 2, align=4)  # noqa: E731
    index = fake(cutlass.Int64, B, n, shape.rows, align=8)
    weight = fake(DTYPES[shape.weight], d, align=VECTOR * DTYPES[shape.weight].width // 8)
    arguments = (wide(), wide(), index, weight, table(), table(), fake(Float32, B, n, d), Float32(0.0), stream())
    return Compressor(shape, config), arguments


NEEDED = {16: 192, 8: 128, 4: 72, 2: 64}  # registers of a thread, by rows at once


def configs(shape: Shape) -> Iterator[Config]:
    for at_once, registers in NEEDED.items():
        if at_once <= max(8, shape.rows // 4) and shape.threads * registers <= 1 << 16:
            yield Config(at_once)


def configs_apart(shape: Shape) -> Iterator[Config]:
    """Of a launch of its own, where rows are many: four teams go through them in a fourth of the time."""
    if shape.rows >= 64 and 4 * shape.threads * NEEDED[8] <= 1 << 16:
        yield Config(8, 4)
    yield from configs(shape)


KERNEL = Kernel("compressor", __file__, program, configs_apart)


def launch(shape: Shape, *arguments) -> None:
    """See `program`."""
    KERNEL.launcher(shape)(*arguments)
