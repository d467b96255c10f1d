"""Few vectors times several stored matrices, in one launch: see `gemv`, and `stream`.

The matrices are read as if their rows lay one after the other, each filled up to whole sixteens of them; those of another
format by other blocks. With RMSNorm in front, every block finds the sizes of the vectors by itself: they are short.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from dsv4_compile.kernel import Kernel, fake
from dsv4_compile.kernel import stream as current
from dsv4_compile.kernels import side_by_side, stored
from dsv4_compile.kernels.division import configs_of
from dsv4_compile.kernels.gemv import scale_argument
from dsv4_compile.kernels.stored import LANES
from dsv4_compile.kernels.stream import DTYPES, ROWS, Config, Stream, Work, kind, loaded

AT_ONCE = 8  # loads of a lane that fly together


@dataclass(frozen=True)
class Shape:
    """y_i[m] = W_i x[m]: matrices of `rows` and K columns, all of one format; `dtype` of x and `outs` of y_i: bf16 or fp32.
    M, format and e8m0 as in `gemv.Shape`; no format with a second scale. norm: dtype of the weight of an RMSNorm in front, or
    "none"."""

    M: int
    rows: tuple[int, ...]
    K: int
    format: str
    e8m0: bool
    dtype: str
    outs: tuple[str, ...]
    norm: str = "none"

    @property
    def ends(self) -> tuple[int, ...]:
        """Where each matrix ends, filled up."""
        return tuple(accumulate(-(-rows // ROWS) * ROWS for rows in self.rows))

    @property
    def work(self) -> Work:
        return Work(self.format, self.e8m0, self.dtype, self.M, self.K, 1, self.ends[-1], 1)


@dataclass(frozen=True)
class Mixed:
    """Matrices of two formats, without a norm."""

    first: Shape
    second: Shape


@dataclass(frozen=True)
class Both:
    """Of blocks of as many warps."""

    first: Config
    second: Config


class Linears(Stream):
    def __init__(self, shape: Shape, config: Config):
        super().__init__(shape.work, config)
        self.sizes, self.ends, self.starts = shape.rows, shape.ends, (0, *shape.ends)
        self.vectors_first = self.long_to_stage
        self.outs, self.norm = [DTYPES[out] for out in shape.outs], DTYPES.get(shape.norm)
        self.scale_row, _ = self.format.scale_bytes(ROWS, shape.K)
        self.scale_sizes = [self.format.scale_bytes(rows, shape.K)[1] for rows in shape.rows]

    @cute.jit
    def __call__(self, x: cute.Tensor, norm, eps: Float32, weights, scales, ys, early: Int32, stream):
        self.kernel(x, norm, eps, weights, scales, ys, early).launch(
            grid=[self.grid * self.split, 1, 1],
            block=[self.threads, 1, 1],
            cluster=[self.split, 1, 1],
            stream=stream,
            use_pdl=self.overlaps,
        )

    def allocate(self, arena=None):
        smem = super().allocate(arena)
        if const_expr(self.norm is not None):
            self.inverse = smem.allocate_tensor(Float32, cute.make_layout((self.M,)), 16)
        return smem

    @cute.jit
    def place(self, tile, segment, r: int, g):
        """See `gemv.Linear.place`."""
        at = tile * self.rows_of_tile + self.member * ROWS + r * 8 + g
        row = cutlass.min(at, Int32(self.sizes[0] - 1))
        weight, scale = self.weights[0], self.scales_at[0]
        end = scale + self.scale_sizes[0]
        for i in cutlass.range_constexpr(1, len(self.sizes)):
            inside = at >= self.starts[i]
            row = cutlass.min(at - self.starts[i], Int32(self.sizes[i] - 1)) if inside else row
            weight = self.weights[i] if inside else weight
            scale = self.scales_at[i] if inside else scale
            end = self.scales_at[i] + self.scale_sizes[i] if inside else end
        return weight, row, scale, end

    @cute.jit
    def put(self, tile, m, row, value):
        at, result = tile * self.rows_of_tile + row, value * self.back
        for i in cutlass.range_constexpr(len(self.sizes)):
            y, local = self.ys[i], at - self.starts[i]
            if local >= 0 and local < self.sizes[i]:
                y[m, local] = result.to(self.outs[i])

    @cute.jit
    def fetch_ahead(self, thread):
        """The first rows."""
        at = self.first * self.rows_of_tile + thread
        for i in cutlass.range_constexpr(len(self.sizes)):
            local = at - self.starts[i]
            if thread < self.rows_of_tile and local >= 0 and local < self.sizes[i]:
                self.fetch_row(self.weights[i], local)

    @cute.jit
    def measure(self, x, eps):
        """1 / sqrt(mean(x^2) + eps) of each vector, by a warp."""
        inverse, each = self.inverse, -(-self.K // (8 * LANES))
        for first in cutlass.range_constexpr(0, self.M, self.warps):
            m, total = first + self.warp, Float32(0.0)
            if m < self.M:
                for begin in cutlass.range_constexpr(0, each, AT_ONCE):
                    some = range(begin, min(begin + AT_ONCE, each))
                    held = cute.make_rmem_tensor((8, len(some)), self.dtype)
                    held.fill(0.0)
                    for n, i in enumerate(some):  # they fly together
                        if i * LANES + self.lane < self.K // 8:
                            cute.autovec_copy(
                                cute.zipped_divide(x[m, None], (8,))[None, i * LANES + self.lane], held[None, n]
                            )
                    for n in cutlass.range_constexpr(len(some)):
                        for j in cutlass.range_constexpr(8):
                            total = total + Float32(held[j, n]) * Float32(held[j, n])
                total = cute.arch.warp_reduction_sum(total)
                inverse[m] = cute.math.rsqrt(total / Float32(self.K) + eps)
        cute.arch.barrier()

    @cute.jit
    def eight(self, x, m: int, index):
        """See `Stream.eight`."""
        part = loaded(x[m, None], index, self.dtype)
        if const_expr(self.norm is not None):
            weight = loaded(self.norm_weight, index, self.norm)
            for j in cutlass.range_constexpr(8):
                part[j] = (Float32(part[j]) * self.inverse[m] * Float32(weight[j])).to(self.dtype)
        return cute.recast_tensor(part, Int32)

    @cute.kernel
    def kernel(self, x, norm, eps, weights, scales, ys, early):
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        self.allocate()
        self.go(x, norm, eps, weights, scales, ys, early, block, thread)

    @cute.jit
    def go(self, x, norm, eps, weights, scales, ys, early, block, thread):
        """The tiles of a block."""
        self.ys, self.weights = ys, [w.iterator.toint() for w in weights]
        self.scales_at = self.weights
        if const_expr(scales is not None):
            self.scales_at = [s.iterator.toint() for s in scales]
        self.begin(thread, block)
        self.enter(thread, early)
        self.norm_weight = norm
        if const_expr(self.norm is not None):
            self.measure(x, eps)
        self.stage_vectors(x, None, thread)
        cute.arch.barrier()
        self.run(thread)


class TwoFormats:
    def __init__(self, shape: Mixed, config: Both):
        parts, both = (shape.first, shape.second), (config.first, config.second)
        works = [part.work for part in parts]
        self.parts = [kind(Linears, c)(part, c) for part, c in zip(parts, both, strict=True)]
        self.counts, self.some = [len(part.rows) for part in parts], [part.format in stored.GROUP for part in parts]
        for part, grid in zip(self.parts, side_by_side.blocks(*works, both), strict=True):
            part.grid, part.turns = grid, -(-part.tiles // grid)
        self.bytes = side_by_side.memory(*works, both)

    @cute.jit
    def __call__(self, x: cute.Tensor, weights, scales, ys, early: Int32, stream):
        first, second = self.parts
        self.kernel(x, weights, scales, ys, early).launch(
            grid=[first.grid + second.grid, 1, 1], block=[first.threads, 1, 1], stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(self, x, weights, scales, ys, early):
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        base = cutlass.memory.SmemAllocator().allocate(self.bytes, 128)
        if block < self.parts[0].grid:
            self.part(0, base, x, weights, scales, ys, early, block, thread)
        else:
            self.part(1, base, x, weights, scales, ys, early, block - self.parts[0].grid, thread)

    @cute.jit
    def part(self, i: cutlass.Constexpr, base, x, weights, scales, ys, early, block, thread):
        n = self.counts[0]
        mine = slice(n) if const_expr(i == 0) else slice(n, None)
        first = self.counts[0] if const_expr(i == 1 and self.some[0]) else 0
        of_mine = scales[first : first + self.counts[i]] if const_expr(self.some[i]) else None
        self.parts[i].allocate(side_by_side.Arena(base, self.bytes))
        self.parts[i].go(x, None, Float32(0.0), weights[mine], of_mine, ys[mine], early, block, thread)


def program(shape: Shape | Mixed, config: Config | Both):
    """x [M, K], norm [K] or None, eps, weights [R_i, row] of 32-bit words, scales (bytes, or fp32) or None -> ys [M, R_i].
    early: as in `gemv`. Of two formats without norm and eps, first weights, scales and ys of the first, then those of the
    second; scales of what has some."""
    if isinstance(shape, Mixed):
        (x, _, _, *one), (_, _, _, *other) = (arguments_of(part) for part in (shape.first, shape.second))
        joined = [tuple(a or ()) + tuple(b or ()) or None for a, b in zip(one[:3], other[:3], strict=True)]
        return TwoFormats(shape, config), (x, *joined, Int32(0), current())
    return kind(Linears, config)(shape, config), (*arguments_of(shape), Int32(0), current())


def arguments_of(shape: Shape):
    words, some = stored.Format(shape.format).row_bytes(shape.K) // 4, shape.format in stored.GROUP
    return (
        fake(DTYPES[shape.dtype], shape.M, shape.K),
        None if shape.norm == "none" else fake(DTYPES[shape.norm], shape.K),
        Float32(0.0),
        tuple(fake(Int32, rows, words) for rows in shape.rows),
        tuple(scale_argument(shape.format, shape.e8m0) for _ in shape.rows) if some else None,
        tuple(
            fake(DTYPES[out], shape.M, rows, align=DTYPES[out].width // 8)
            for out, rows in zip(shape.outs, shape.rows, strict=True)
        ),
    )


def configs(shape: Shape | Mixed) -> Iterator[Config] | Iterator[Both]:
    if isinstance(shape, Mixed):
        return (Both(*both) for both in side_by_side.pairs(shape.first.work, shape.second.work))
    return iter(configs_of(shape.work))


KERNEL = Kernel("linears", __file__, program, configs)


def launch(shape: Shape, x, norm, eps: float, weights, scales, ys, early: int = 0) -> None:
    """See `program`."""
    KERNEL.launcher(shape)(x, norm, eps, weights, scales, ys, early)


def launch_mixed(shape: Mixed, x, weights, scales, ys, early: int = 0) -> None:
    """See `program`."""
    KERNEL.launcher(shape)(x, weights, scales, ys, early)
