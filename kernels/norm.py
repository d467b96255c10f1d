"""RMSNorm, with and without a weight. A row is read once and kept in registers; a warp or several hold it."""

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, const_expr

from dsv4_compile.kernel import Kernel, fake, stream

DTYPES = {"bf16": BFloat16, "fp32": Float32}


@dataclass(frozen=True)
class Shape:
    """Rows of D numbers of `dtype`, D a multiple of 4 and at most 16384; weight: its dtype, or "none"."""

    D: int
    dtype: str
    weight: str

    @property
    def vector(self) -> int:
        """Numbers of one load of at most 128 bits."""
        return 8 if self.dtype == "bf16" and self.D % 8 == 0 else 4


@dataclass(frozen=True)
class Config:
    """warps: of one row. rows: of one block."""

    warps: int
    rows: int


class RMSNorm:
    def __init__(self, shape: Shape, config: Config):
        self.D, self.vector, self.weight = shape.D, shape.vector, DTYPES.get(shape.weight)
        self.dtype, self.warps, self.rows = DTYPES[shape.dtype], config.warps, config.rows
        self.threads = 32 * config.warps  # of a row
        self.vectors = shape.D // shape.vector
        self.loads = -(-self.vectors // self.threads)

    @cute.jit
    def __call__(self, x, weight, out, eps: Float32, stream):
        grid = [cute.ceil_div(x.shape[0], self.rows), 1, 1]
        self.kernel(x, weight, out, eps).launch(grid=grid, block=[self.threads * self.rows, 1, 1], stream=stream)

    @cute.kernel
    def kernel(self, x, weight, out, eps):
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        here, t = thread // self.threads, thread % self.threads
        row = block * self.rows + here
        inside = row < x.shape[0]
        place = row if inside else x.shape[0] - 1  # beyond the last row, threads do its work and keep it to themselves
        source = cute.zipped_divide(x[place, None], (self.vector,))
        kept = cute.make_rmem_tensor((self.vector, self.loads), self.dtype)
        kept.fill(0.0)
        for i in cutlass.range_constexpr(self.loads):
            if i * self.threads + t < self.vectors:
                cute.autovec_copy(source[None, i * self.threads + t], kept[None, i])
        if const_expr(self.weight is not None):  # on their way while the squares are summed
            weights = cute.make_rmem_tensor((self.vector, self.loads), self.weight)
            weights.fill(0.0)
            for i in cutlass.range_constexpr(self.loads):
                v = i * self.threads + t
                if v < self.vectors:
                    cute.autovec_copy(cute.zipped_divide(weight, (self.vector,))[None, v], weights[None, i])
        y = kept.load().to(Float32)
        squares = (y * y).reduce(cute.ReductionOp.ADD, init_val=0.0, reduction_profile=0)
        squares = cute.arch.warp_reduction(squares, operator.add)
        if const_expr(self.warps > 1):
            of_warps = cutlass.memory.SmemAllocator().allocate_tensor(
                Float32, cute.make_layout((self.rows, self.warps), stride=(self.warps, 1)), 16
            )
            warp, lane = t // 32, t % 32
            if lane == 0:
                of_warps[here, warp] = squares
            cute.arch.barrier()
            part = Float32(0.0)
            if lane < self.warps:
                part = of_warps[here, lane]
            squares = cute.arch.warp_reduction(part, operator.add)
        y = y * cute.math.rsqrt(squares / Float32(self.D) + eps)
        if const_expr(self.weight is not None):
            y = y * weights.load().to(Float32)
        kept.store(y.to(self.dtype))
        target = cute.zipped_divide(out[place, None], (self.vector,))
        for i in cutlass.range_constexpr(self.loads):
            v = i * self.threads + t
            if v < self.vectors and inside:
                cute.autovec_copy(kept[None, i], target[None, v])


def program(shape: Shape, config: Config):
    """x [N, D], weight [D] or None -> out [N, D]; eps."""
    N, dtype = cute.sym_int(), DTYPES[shape.dtype]
    align = shape.vector * dtype.width // 8
    arguments = (
        fake(dtype, N, shape.D, align=align),
        None if shape.weight == "none" else fake(DTYPES[shape.weight], shape.D, align=8 if shape.D % 8 else 16),
        fake(dtype, N, shape.D, align=align),
        Float32(0.0),
        stream(),
    )
    return RMSNorm(shape, config), arguments


def fits(shape: Shape, config: Config) -> bool:
    """Whether a thread keeps its part of the row, and of the weight, in registers."""
    threads = 32 * config.warps * config.rows
    loads = -(-shape.D // (shape.vector * 32 * config.warps))
    halves = 2 + {"none": 0, "bf16": 1, "fp32": 2}[shape.weight]
    return threads <= 1024 and loads * shape.vector * halves // 2 + 24 <= min(255, 65536 // threads)


def configs(shape: Shape) -> Iterator[Config]:
    """As many warps as leave each thread at most two loads, then twice as many, and fewer."""
    warps = 1
    while 32 * warps * shape.vector * 2 < shape.D and warps < 32:
        warps *= 2
    for w in (warps, warps * 2, warps // 2, warps // 4):
        if w and fits(shape, config := Config(w, max(1, 4 // w))):
            yield config


KERNEL = Kernel("rms_norm", __file__, program, configs)


def launch(shape: Shape, x, weight, out, eps: float) -> None:
    """See `program`."""
    KERNEL.launcher(shape)(x, weight, out, eps)
