"""The compressor: a block has a window, a thread four channels of it; softmax over the window's rows, RMSNorm, RoPE."""

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
    """at_once: rows whose numbers are asked for together."""

    at_once: int


class Compressor:
    def __init__(self, shape: Shape, config: Config):
        self.d, self.rows, self.rope, self.overlap = shape.d, shape.rows, shape.rope, shape.overlap
        self.threads, self.at_once, self.weight = shape.threads, config.at_once, DTYPES[shape.weight]

    @cute.jit
    def __call__(self, c, z, index, weight, cos, sin, out, eps: Float32, stream):
        self.kernel(c, z, index, weight, cos, sin, out, eps).launch(
            grid=[out.shape[0] * out.shape[1], 1, 1], block=[self.threads, 1, 1], stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(self, c, z, index, weight, cos, sin, out, eps):
        of_warp.follow()
        v, _, _ = cute.arch.thread_idx()
        window, _, _ = cute.arch.block_idx()
        batch, w = window // out.shape[1], window % out.shape[1]
        closed = index[batch, w, self.rows - 1] >= 0
        entry = self.entry(c, z, index, weight, cos, sin, eps, batch, w, v, closed)
        if v < self.d // VECTOR:
            cute.autovec_copy(entry, cute.zipped_divide(out[batch, w, None], (VECTOR,))[None, v])

    @cute.jit
    def entry(self, c, z, index, weight, cos, sin, eps, batch, w, v, closed):
        """This thread's channels of a window's entry; zeros of a window that is not closed. Of a closed one rows are absent
        from the old end only, of an open one all."""
        entry = cute.make_rmem_tensor((VECTOR,), Float32)
        entry.fill(0.0)
        if closed:
            if v < self.d // VECTOR:
                self.collect(c, z, index, batch, w, v, entry)
            squares = (entry.load() * entry.load()).reduce(cute.ReductionOp.ADD, init_val=0.0, reduction_profile=0)
            squares = of_warp.sum_of_row(squares, 0, 1, v, self.threads // 32)
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
    def collect(self, c, z, index, batch, w, v, entry):
        """entry = sum over rows of softmax(z) c; the largest gate so far keeps the exponentials small."""
        n, half = self.at_once, self.rows // 2
        top = cute.make_rmem_tensor((VECTOR,), Float32)
        total = cute.make_rmem_tensor((VECTOR,), Float32)
        top.fill(-1e30)
        total.fill(0.0)
        for first in cutlass.range(0, self.rows, n, unroll=1):
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
                if row[i] < 0 or first + i >= self.rows:
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
        for j in cutlass.range_constexpr(VECTOR):
            entry[j] = entry[j] * of_warp.inverse(total[j])


def program(shape: Shape, config: Config):
    """c, z [B, S, C] fp32, index [B, n, rows] int64, weight [d], cos and sin [B, n, rope / 2] fp32 -> out [B, n, d] fp32."""
    B, S, n, d = cute.sym_int(), cute.sym_int(), cute.sym_int(), shape.d
    wide = lambda: fake(Float32, B, S, (1 + shape.overlap) * d)  # noqa: E731
    table = lambda: fake(Float32, B, n, shape.rope // 2, align=4)  # noqa: E731
    index = fake(cutlass.Int64, B, n, shape.rows, align=8)
    weight = fake(DTYPES[shape.weight], d, align=VECTOR * DTYPES[shape.weight].width // 8)
    arguments = (wide(), wide(), index, weight, table(), table(), fake(Float32, B, n, d), Float32(0.0), stream())
    return Compressor(shape, config), arguments


def configs(shape: Shape) -> Iterator[Config]:
    for at_once in (16, 8, 4):
        if at_once <= max(8, shape.rows // 4):
            yield Config(at_once)


KERNEL = Kernel("compressor", __file__, program, configs)


def launch(shape: Shape, *arguments) -> None:
    """See `program`."""
    KERNEL.launcher(shape)(*arguments)
