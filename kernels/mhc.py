"""Hyper-connections: `pre` and `head` (mixture, coefficients, Sinkhorn, collapse: two kernels behind one launch) and `post`.

The mixture is a product of few rows (n or (2 + n) n) with all streams of a token, n D numbers: each block takes a piece of
them and writes partial sums, so that one token keeps many processors reading. The second kernel adds the pieces up, in their
order, and collapses the streams; its first block of a token also makes post and comb.
"""

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, const_expr

from dsv4_compile.kernel import Kernel, fake, stream
from dsv4_compile.kernels import warps as of_warp

VECTOR = 4  # numbers of one load: 128 bits of fp32
THREADS = 256
WARPS = THREADS // 32
DTYPES = {"bf16": BFloat16, "fp32": Float32}


@dataclass(frozen=True)
class Shape:
    """n streams of D numbers of `dtype`; n n at most 32, D a multiple of 4. iters 0: `head`, which makes no post and comb."""

    n: int
    D: int
    dtype: str
    iters: int

    @property
    def rows(self) -> int:
        """Of the mixture."""
        return (2 + self.n) * self.n if self.iters else self.n


@dataclass(frozen=True)
class Config:
    """loads: vectors of a thread in the mixture; fewer loads, more blocks."""

    loads: int

    def splits(self, shape: Shape) -> int:
        return -(-shape.n * shape.D // (VECTOR * THREADS * self.loads))


class Pre:
    def __init__(self, shape: Shape, config: Config):
        self.shape, self.loads, self.splits = shape, config.loads, config.splits(shape)
        self.n, self.D, self.rows, self.iters = shape.n, shape.D, shape.rows, shape.iters
        self.dtype = DTYPES[shape.dtype]
        self.vectors = shape.n * shape.D // VECTOR

    @cute.jit
    def __call__(self, X, fn, base, scale, eps: Float32, rms_eps: Float32, partial, x, post, comb, stream):
        N = X.shape[0]
        self.mixture(X, fn, partial).launch(
            grid=[N, self.splits, 1], block=[THREADS, 1, 1], stream=stream, use_pdl=True
        )
        blocks = cute.ceil_div(self.D, VECTOR * THREADS)
        self.finish(X, base, scale, eps, rms_eps, partial, x, post, comb).launch(
            grid=[N, blocks, 1], block=[THREADS, 1, 1], stream=stream, use_pdl=True
        )

    @cute.kernel
    def mixture(self, X, fn, partial):
        """partial[token, split, m] = sum over a piece of fn[m] X; the last m is the sum of squares."""
        of_warp.follow()
        thread, _, _ = cute.arch.thread_idx()
        token, split, _ = cute.arch.block_idx()
        streams = cute.zipped_divide(X[token, None], (VECTOR,))
        sums = cute.make_rmem_tensor((self.rows + 1,), Float32)
        sums.fill(0.0)
        for i in cutlass.range_constexpr(self.loads):
            v = (split * self.loads + i) * THREADS + thread
            if v < self.vectors:
                part = cute.make_rmem_tensor((VECTOR,), self.dtype)
                cute.autovec_copy(streams[None, v], part)
                f = part.load().to(Float32)
                sums[self.rows] += (f * f).reduce(cute.ReductionOp.ADD, init_val=0.0, reduction_profile=0)
                for m in cutlass.range_constexpr(self.rows):
                    w = cute.make_rmem_tensor((VECTOR,), Float32)
                    cute.autovec_copy(cute.zipped_divide(fn[m, None], (VECTOR,))[None, v], w)
                    sums[m] += (f * w.load()).reduce(cute.ReductionOp.ADD, init_val=0.0, reduction_profile=0)
        of_warps = cutlass.memory.SmemAllocator().allocate_tensor(
            Float32, cute.make_layout((WARPS, self.rows + 1), stride=(self.rows + 1, 1)), 16
        )
        warp, lane = thread // 32, thread % 32
        for m in cutlass.range_constexpr(self.rows + 1):
            total = cute.arch.warp_reduction(sums[m], operator.add)
            if lane == 0:
                of_warps[warp, m] = total
        cute.arch.barrier()
        if thread <= self.rows:
            total = Float32(0.0)
            for w in cutlass.range_constexpr(WARPS):
                total += of_warps[w, thread]
            partial[token, split, thread] = total

    @cute.kernel
    def finish(self, X, base, scale, eps, rms_eps, partial, x, post, comb):
        of_warp.follow()
        thread, _, _ = cute.arch.thread_idx()
        token, block, _ = cute.arch.block_idx()
        mix = cutlass.memory.SmemAllocator().allocate_tensor(Float32, cute.make_layout((self.rows + 1,)), 16)
        if thread <= self.rows:
            total = Float32(0.0)
            for s in cutlass.range(self.splits, unroll=4):
                total += partial[token, s, thread]
            mix[thread] = total
        cute.arch.barrier()
        r = cute.math.rsqrt(mix[self.rows] / Float32(self.n * self.D) + rms_eps)
        v = block * THREADS + thread
        if v < self.D // VECTOR:
            streams = cute.zipped_divide(X[token, None], (VECTOR,))
            out = cute.make_rmem_tensor((VECTOR,), Float32)
            out.fill(0.0)
            for j in cutlass.range_constexpr(self.n):
                pre = of_warp.sigmoid(mix[j] * r * scale[0] + base[j]) + eps
                part = cute.make_rmem_tensor((VECTOR,), self.dtype)
                cute.autovec_copy(streams[None, j * (self.D // VECTOR) + v], part)
                out.store(out.load() + part.load().to(Float32) * pre)
            rounded = cute.make_rmem_tensor((VECTOR,), self.dtype)
            rounded.store(out.load().to(self.dtype))
            cute.autovec_copy(rounded, cute.zipped_divide(x[token, None], (VECTOR,))[None, v])
        if const_expr(self.iters > 0):
            if block == 0:
                if thread < 32:
                    n = self.n
                    if thread < n:
                        post[token, thread] = Float32(2.0) * of_warp.sigmoid(
                            mix[n + thread] * r * scale[1] + base[n + thread]
                        )
                    # lane i n + j holds comb[i, j]; lanes beyond repeat the last
                    place = cutlass.min(thread, n * n - 1)
                    i, j = place // n, place % n
                    c = mix[2 * n + place] * r * scale[2] + base[2 * n + place]
                    top = cute.arch.shuffle_sync(c, i * n)
                    for k in cutlass.range_constexpr(1, n):
                        top = cute.arch.fmax(top, cute.arch.shuffle_sync(c, i * n + k))
                    c = cute.math.exp(c - top)
                    c = c * of_warp.inverse(self.along(c, i * n, 1)) + eps
                    c = c * of_warp.inverse(self.along(c, j, n) + eps)
                    for _ in cutlass.range(self.iters - 1, unroll=1):
                        c = c * of_warp.inverse(self.along(c, i * n, 1) + eps)
                        c = c * of_warp.inverse(self.along(c, j, n) + eps)
                    if thread < n * n:
                        comb[token, i, j] = c

    def along(self, c: Float32, first, step: int) -> Float32:
        """Sum over a row or a column of the lanes' matrix."""
        total = cute.arch.shuffle_sync(c, first)
        for k in range(1, self.n):
            total = total + cute.arch.shuffle_sync(c, first + k * step)
        return total


class Post:
    """X'[k] = post[k] y + sum_j comb[j, k] X[j]: a thread has 4 columns of all streams."""

    def __init__(self, shape: Shape, config: Config):
        self.n, self.D, self.dtype = shape.n, shape.D, DTYPES[shape.dtype]

    @cute.jit
    def __call__(self, X, y, post, comb, out, stream):
        blocks = cute.ceil_div(self.D, VECTOR * THREADS)
        self.kernel(X, y, post, comb, out).launch(
            grid=[X.shape[0], blocks, 1], block=[THREADS, 1, 1], stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(self, X, y, post, comb, out):
        of_warp.follow()
        thread, _, _ = cute.arch.thread_idx()
        token, block, _ = cute.arch.block_idx()
        v = block * THREADS + thread
        if v < self.D // VECTOR:
            rows = self.D // VECTOR
            streams, outs = (
                cute.zipped_divide(X[token, None], (VECTOR,)),
                cute.zipped_divide(out[token, None], (VECTOR,)),
            )
            part = cute.make_rmem_tensor((VECTOR, self.n), self.dtype)
            for j in cutlass.range_constexpr(self.n):
                cute.autovec_copy(streams[None, j * rows + v], part[None, j])
            block_out = cute.make_rmem_tensor((VECTOR,), self.dtype)
            cute.autovec_copy(cute.zipped_divide(y[token, None], (VECTOR,))[None, v], block_out)
            new = block_out.load().to(Float32)
            for k in cutlass.range_constexpr(self.n):
                total = new * post[token, k]
                for j in cutlass.range_constexpr(self.n):
                    total = total + part[None, j].load().to(Float32) * comb[token, j, k]
                rounded = cute.make_rmem_tensor((VECTOR,), self.dtype)
                rounded.store(total.to(self.dtype))
                cute.autovec_copy(rounded, outs[None, k * rows + v])


def pre_program(shape: Shape, config: Config):
    """X [N, n D], fn [rows, n D] fp32, base [rows] fp32, scale [3 or 1] fp32, eps, rms_eps, partial [N, splits, rows + 1]
    fp32 -> x [N, D], post [N, n] fp32, comb [N, n, n] fp32 (`head`: None, None)."""
    N, n, D, dtype = cute.sym_int(), shape.n, shape.D, DTYPES[shape.dtype]
    align = VECTOR * dtype.width // 8
    arguments = (
        fake(dtype, N, n * D, align=align),
        fake(Float32, shape.rows, n * D),
        fake(Float32, shape.rows, align=4),
        fake(Float32, 3 if shape.iters else 1, align=4),
        Float32(0.0),
        Float32(0.0),
        fake(Float32, N, config.splits(shape), shape.rows + 1, align=4),
        fake(dtype, N, D, align=align),
        fake(Float32, N, n, align=4) if shape.iters else None,
        fake(Float32, N, n, n, align=4) if shape.iters else None,
        stream(),
    )
    return Pre(shape, config), arguments


def post_program(shape: Shape, config: Config):
    """X [N, n D], y [N, D], post [N, n] fp32, comb [N, n, n] fp32 -> out [N, n D]."""
    N, n, D, dtype = cute.sym_int(), shape.n, shape.D, DTYPES[shape.dtype]
    align = VECTOR * dtype.width // 8
    wide, narrow = fake(dtype, N, n * D, align=align), fake(dtype, N, D, align=align)
    coefficients = fake(Float32, N, n, align=4), fake(Float32, N, n, n, align=4)
    return Post(shape, config), (wide, narrow, *coefficients, fake(dtype, N, n * D, align=align), stream())


def configs(shape: Shape) -> Iterator[Config]:
    for loads in (1, 2, 4):
        yield Config(loads)


def post_configs(shape: Shape) -> Iterator[Config]:
    yield Config(1)


PRE = Kernel("mhc_pre", __file__, pre_program, configs)
POST = Kernel("mhc_post", __file__, post_program, post_configs)


def workspace(shape: Shape) -> tuple[int, int]:
    """Splits and rows of `partial` under the configuration that `launch_pre` uses."""
    return PRE.choice(shape).splits(shape), shape.rows + 1


def launch_pre(shape: Shape, *arguments) -> None:
    """See `pre_program`."""
    PRE.launcher(shape)(*arguments)


def launch_post(shape: Shape, *arguments) -> None:
    """See `post_program`."""
    POST.launcher(shape)(*arguments)
