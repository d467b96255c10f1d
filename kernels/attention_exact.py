"""Attention over index lists in fp32 arithmetic: any channels, bf16 or fp32; a block for each head of each token.

Rows are taken 128 at a time: their scores, a warp a row; then their softmax; then their sum, a thread some channels. Heads
share nothing, so this reads every row once per head: right for small models and for comparing, not for speed.
"""

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, const_expr

from dsv4_compile.kernel import Kernel
from dsv4_compile.kernels import attention_inputs
from dsv4_compile.kernels.attention_inputs import arguments, named

DTYPES = {"bf16": BFloat16, "fp32": Float32}
LOG2E = math.log2(math.e)
THREADS = 128
WARPS = THREADS // 32
ROWS = THREADS  # at a time


@dataclass(frozen=True)
class Shape(attention_inputs.Shape):
    """d at most 1024, rope even, `dtype` of queries, keys, entries and result."""

    dtype: str


@dataclass(frozen=True)
class Config:
    """There is one."""


class Attention:
    def __init__(self, shape: Shape, config: Config):
        self.d, self.h, self.rope, self.on_window = shape.d, shape.heads, shape.rope, shape.on_window
        self.dtype = DTYPES[shape.dtype]
        self.columns = -(-shape.d // THREADS)  # of a thread

    @cute.jit
    def __call__(self, q, keys, window, entries, index, sink, cos, sin, out, scale: Float32, T: Int32, stream):
        self.kernel(q, keys, window, entries, index, sink, cos, sin, out, scale, T).launch(
            grid=[q.shape[0], self.h, 1], block=[THREADS, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(self, q, keys, window, entries, index, sink, cos, sin, out, scale, T):
        thread, _, _ = cute.arch.thread_idx()
        token, head, _ = cute.arch.block_idx()
        warp, lane = cute.arch.make_warp_uniform(thread // 32), thread % 32
        smem = cutlass.memory.SmemAllocator()
        row_of = smem.allocate_tensor(Int32, cute.make_layout((ROWS,)), 16)
        score = smem.allocate_tensor(Float32, cute.make_layout((ROWS,)), 16)
        result = smem.allocate_tensor(Float32, cute.make_layout((self.d,)), 16)
        request, W = token // T, window.shape[1]
        rows = W
        if const_expr(entries is not None):
            rows = W + index.shape[1]
        query = cute.make_rmem_tensor((self.share,), Float32)
        query.fill(0.0)
        for i in cutlass.range_constexpr(self.share):
            if i * 32 + lane < self.d:
                query[i] = q[token, head, i * 32 + lane].to(Float32) * scale
        values = cute.make_rmem_tensor((self.columns,), Float32)
        values.fill(0.0)
        top, total = -Float32.inf, Float32(0.0)
        for tile in cutlass.range(cute.ceil_div(rows, ROWS), unroll=1):
            cute.arch.barrier()
            row_of[thread] = named(tile * ROWS + thread, rows, token, window, index)
            cute.arch.barrier()
            for r in cutlass.range(ROWS // WARPS, unroll=1):
                place = r * WARPS + warp
                row = row_of[place]
                s = -Float32.inf
                if row >= 0:
                    s = Float32(0.0)
                    for i in cutlass.range_constexpr(self.share):
                        s += query[i] * self.at(tile * ROWS + place < W, request, row, i * 32 + lane, keys, entries)
                    s = cute.arch.warp_reduction(s, operator.add)
                    if const_expr(self.on_window):
                        if tile * ROWS + place < W:
                            s += sink[head]
                if lane == 0:
                    score[place] = s
            cute.arch.barrier()
            largest = top
            for r in cutlass.range(ROWS, unroll=8):
                largest = cute.arch.fmax(largest, score[r])
            finite = Float32(0.0) if largest == -Float32.inf else largest
            shrink = cute.math.exp(top - finite)
            total = total * shrink
            for i in cutlass.range_constexpr(self.columns):
                values[i] = values[i] * shrink
            for r in cutlass.range(ROWS, unroll=4):
                row = row_of[r]
                if row >= 0:
                    weight = cute.math.exp(score[r] - finite)
                    total += weight
                    for i in cutlass.range_constexpr(self.columns):
                        column = i * THREADS + thread
                        values[i] += weight * self.at(tile * ROWS + r < W, request, row, column, keys, entries)
            top = largest
        largest = top
        if const_expr(not self.on_window):
            largest = cute.arch.fmax(largest, sink[head])
        largest = Float32(0.0) if largest == -Float32.inf else largest
        part = cute.math.exp(top - largest)
        below = total * part
        if const_expr(not self.on_window):
            below += cute.math.exp(sink[head] - largest)
        inverse = Float32(0.0)
        if below > Float32(0.0):
            inverse = part / below
        for i in cutlass.range_constexpr(self.columns):
            if i * THREADS + thread < self.d:
                result[i * THREADS + thread] = values[i] * inverse
        cute.arch.barrier()
        for i in cutlass.range_constexpr(self.columns):
            column = i * THREADS + thread
            if column < self.d:
                x = result[column]
                if const_expr(self.rope > 0):
                    first = self.d - self.rope
                    if column >= first:
                        of, angle, odd = token % cos.shape[0], (column - first) // 2, (column - first) % 2
                        other = result[column - odd + (1 - odd)]
                        c, s = cos[of, angle], sin[of, angle]
                        x = x * c + (-s if odd == 1 else s) * other
                out[token, head, column] = x.to(self.dtype)

    @cute.jit
    def at(self, in_window, request, row, column, keys, entries):
        """A channel of a row; 0 beyond the last one."""
        x = Float32(0.0)
        if column < self.d:
            if const_expr(entries is not None):
                if in_window:
                    x = keys[request, row, column].to(Float32)
                else:
                    x = entries[request, row, column].to(Float32)
            else:
                x = keys[request, row, column].to(Float32)
        return x

    @property
    def share(self) -> int:
        """Channels of a lane."""
        return -(-self.d // 32)


def program(shape: Shape, config: Config):
    dtype = DTYPES[shape.dtype]
    return Attention(shape, config), arguments(shape, dtype=dtype, align=dtype.width // 8)


def configs(shape: Shape) -> Iterator[Config]:
    yield Config()


KERNEL = Kernel("attention_exact", __file__, program, configs)
