"""Few vectors times a stored matrix: see `stream`.

Where a thread block fills a processor, a launch starts while the one before it ends, and fills its rings before it waits for
it, if the weight cannot be what that one writes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from dsv4_compile.kernel import Kernel, fake
from dsv4_compile.kernel import stream as current
from dsv4_compile.kernels import stored
from dsv4_compile.kernels.division import configs_of
from dsv4_compile.kernels.stream import DTYPES, ROWS, Config, Stream, Work, kind


@dataclass(frozen=True)
class Shape:
    """y[g, m] = W[g] x[g, m]: G groups of R rows of K columns. `dtype` of x and `out` of y: bf16 or fp32; `format` of the
    weight as in `stored.BITS`, e8m0: whether fp8's scales are bytes. Rows of the weight are 16-byte aligned. by_token:
    x and y have all groups of a token side by side."""

    M: int
    G: int
    R: int
    K: int
    format: str
    e8m0: bool
    dtype: str
    out: str
    by_token: bool = False

    @property
    def work(self) -> Work:
        return Work(self.format, self.e8m0, self.dtype, self.M, self.K, 1, self.R, self.G)


class Linear(Stream):
    def __init__(self, shape: Shape, config: Config):
        super().__init__(shape.work, config)
        self.G, self.R, self.out, self.by_token = shape.G, shape.R, DTYPES[shape.out], shape.by_token
        self.scale_row, self.scale_matrix = self.format.scale_bytes(shape.G * shape.R, shape.K)
        self.alike = self.alike and (shape.G == 1 or shape.R % 8 == 0)
        self.vectors_first = self.long_to_stage

    @cute.jit
    def __call__(self, x: cute.Tensor, weight: cute.Tensor, scale, scale_2, y: cute.Tensor, early: Int32, stream):
        self.kernel(x, weight, scale, scale_2, y, early).launch(
            grid=[self.grid * self.split, self.G, 1],
            block=[self.threads, 1, 1],
            cluster=[self.split, 1, 1],
            stream=stream,
            use_pdl=self.overlaps,
        )

    def place(self, tile, segment, r: int, g):
        """Of the g-th of a warp's first (r = 0) or second eight rows: address of the matrix, row of it; address of its scales,
        and where they end."""
        row = tile * self.rows_of_tile + self.member * ROWS + r * 8 + g
        row = self.group * self.R + cutlass.min(row, self.R - 1)
        return self.weight_at, row, self.scale_at, self.scale_at + self.scale_matrix

    @cute.jit
    def put(self, tile, m, row, value):
        y = self.of_group(self.y, self.group)
        if tile * self.rows_of_tile + row < self.R:
            y[m, tile * self.rows_of_tile + row] = (value * self.by).to(self.out)

    def of_group(self, x, group):
        """Vectors, or results: [M, numbers]."""
        return x[None, group, None] if self.by_token else x[group, None, None]

    @cute.jit
    def fetch_ahead(self, thread):
        """The first rows."""
        row = self.first * self.rows_of_tile + thread
        if thread < self.rows_of_tile and row < self.R:
            self.fetch_row(self.weight_at, self.group * self.R + row)

    @cute.kernel
    def kernel(self, x, weight, scale, scale_2, y, early):
        thread, _, _ = cute.arch.thread_idx()
        block, group, _ = cute.arch.block_idx()
        self.allocate()
        self.group, self.y, self.weight_at = group, y, weight.iterator.toint()
        self.scale_at = self.weight_at
        if const_expr(scale is not None):
            self.scale_at = scale.iterator.toint()
        self.begin(thread, block)
        self.enter(thread, early)
        self.stage_vectors(self.of_group(x, group), None, thread)
        self.by = Float32(self.back)
        if const_expr(scale_2 is not None):
            self.by = self.by * scale_2[0]
        cute.arch.barrier()
        self.run(thread)


def program(shape: Shape, config: Config):
    """x [G, M, K], weight [G R, row] of 32-bit words, scale (bytes, or fp32) or None, scale_2 [1] fp32 or None
    -> y [G, M, R]; by_token: x [M, G, K] -> y [M, G, R]. early, 0 or 1: whether no launch that may still run writes what is
    read, but for x."""
    words = stored.Format(shape.format).row_bytes(shape.K) // 4
    lead = (shape.M, shape.G) if shape.by_token else (shape.G, shape.M)
    arguments = (
        fake(DTYPES[shape.dtype], *lead, shape.K),
        fake(Int32, shape.G * shape.R, words),
        scale_argument(shape.format, shape.e8m0),
        fake(Float32, 1, align=4) if shape.format == "nvfp4" else None,
        fake(DTYPES[shape.out], *lead, shape.R, align=DTYPES[shape.out].width // 8),
        Int32(0),
        current(),
    )
    return kind(Linear, config)(shape, config), arguments


def scale_argument(format: str, e8m0: bool):
    """Scales, flat; bytes as such, but beginning at a word."""
    if format not in stored.GROUP:
        return None
    return fake(cutlass.Float32 if format == "fp8" and not e8m0 else cutlass.Uint8, cute.sym_int(), align=4)


def configs(shape: Shape) -> Iterator[Config]:
    return iter(configs_of(shape.work))


KERNEL = Kernel("gemv", __file__, program, configs)


def launch(shape: Shape, x, weight, scale, scale_2, y, early: int = 0) -> None:
    """See `program`."""
    KERNEL.launcher(shape)(x, weight, scale, scale_2, y, early)
