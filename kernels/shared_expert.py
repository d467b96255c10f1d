"""The end of a shared expert: SwiGLU, its last matrix, the sum with what the routed experts gave, and mHC's post, in one
launch. See `stream` and `gemv`: the vectors are made of gate and up as they are staged."""

from collections.abc import Iterator
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from dsv4_compile.kernel import Kernel, fake
from dsv4_compile.kernel import stream as current
from dsv4_compile.kernels import stored
from dsv4_compile.kernels.division import configs_of
from dsv4_compile.kernels.gemv import scale_argument
from dsv4_compile.kernels.stream import DTYPES, ROWS, Config, Stream, Work, kind, loaded


@dataclass(frozen=True)
class Shape:
    """y[m] = routed[m] + W swiglu(gate[m], up[m]): W of R rows and K columns; M, format, e8m0 and dtype as in `gemv.Shape`.
    streams: of mHC, into which y goes, or 0."""

    M: int
    R: int
    K: int
    format: str
    e8m0: bool
    dtype: str
    streams: int = 0

    @property
    def work(self) -> Work:
        return Work(self.format, self.e8m0, self.dtype, self.M, self.K, 1, self.R, 1)


class SharedExpert(Stream):
    def __init__(self, shape: Shape, config: Config):
        super().__init__(shape.work, config)
        self.R, self.n = shape.R, shape.streams
        self.scale_row, self.scale_matrix = self.format.scale_bytes(shape.R, shape.K)

    @cute.jit
    def __call__(
        self,
        gate: cute.Tensor,
        up: cute.Tensor,
        limit: Float32,
        weight: cute.Tensor,
        scale,
        scale_2,
        routed: cute.Tensor,
        X,
        post,
        comb,
        y: cute.Tensor,
        early: Int32,
        stream,
    ):
        self.kernel(gate, up, limit, weight, scale, scale_2, routed, X, post, comb, y, early).launch(
            grid=[self.grid * self.split, 1, 1],
            block=[self.threads, 1, 1],
            cluster=[self.split, 1, 1],
            stream=stream,
            use_pdl=self.overlaps,
        )

    @cute.jit
    def eight(self, x, m, index):
        """See `Stream.eight`."""
        gate, up = x
        g, u = loaded(gate[m, None], index, self.dtype), loaded(up[m, None], index, self.dtype)
        h = cute.make_rmem_tensor((8,), self.dtype)
        for i in cutlass.range_constexpr(8):
            a, b = Float32(g[i]), Float32(u[i])
            a = self.limit if a > self.limit else a  # NaN stays
            b = self.limit if b > self.limit else b
            b = -self.limit if b < -self.limit else b
            h[i] = (a / (Float32(1.0) + cute.math.exp(-a)) * b).to(self.dtype)
        return cute.recast_tensor(h, Int32)

    def place(self, tile, segment, r: int, g):
        """See `gemv.Linear.place`."""
        row = tile * self.rows_of_tile + self.member * ROWS + r * 8 + g
        return self.weight_at, cutlass.min(row, self.R - 1), self.scale_at, self.scale_at + self.scale_matrix

    @cute.jit
    def put(self, tile, m, row, value):
        y, routed, at = self.y, self.routed, tile * self.rows_of_tile + row
        if at < self.R:
            mine = (value * self.by).to(self.dtype)  # as a matrix product gives it
            total = (routed[m, at] + Float32(mine)).to(self.dtype)
            if const_expr(self.n == 0):
                y[m, at] = total
            else:
                self.mix(m, at, Float32(total))

    @cute.jit
    def mix(self, m, at, new):
        """See `mhc.Post`."""
        X, post, comb, y = self.X, self.post, self.comb, self.y
        old = [Float32(X[m, j, at]) for j in range(self.n)]
        for k in cutlass.range_constexpr(self.n):
            total = new * post[m, k]
            for j in cutlass.range_constexpr(self.n):
                total = total + old[j] * comb[m, j, k]
            y[m, k, at] = total.to(self.dtype)

    @cute.jit
    def fetch_ahead(self, thread):
        """The first rows."""
        row = self.first * self.rows_of_tile + thread
        if thread < self.rows_of_tile and row < self.R:
            self.fetch_row(self.weight_at, row)

    @cute.kernel
    def kernel(self, gate, up, limit, weight, scale, scale_2, routed, X, post, comb, y, early):
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        self.allocate()
        self.limit, self.y, self.routed, self.weight_at = limit, y, routed, weight.iterator.toint()
        self.X, self.post, self.comb = X, post, comb
        self.scale_at = self.weight_at
        if const_expr(scale is not None):
            self.scale_at = scale.iterator.toint()
        self.begin(thread, block)
        self.enter(thread, early)
        self.stage_vectors((gate, up), None, thread)
        self.by = Float32(self.back)
        if const_expr(scale_2 is not None):
            self.by = self.by * scale_2[0]
        cute.arch.barrier()
        self.run(thread)


def program(shape: Shape, config: Config):
    """gate and up [M, K], limit, weight [R, row] of 32-bit words, scale (bytes, or fp32) or None, scale_2 [1] fp32 or None,
    routed [M, R] fp32 -> y [M, R]; with n streams: X [M, n, R], post [M, n] fp32, comb [M, n, n] fp32 -> y [M, n, R]. early:
    as in `gemv`."""
    words, dtype = stored.Format(shape.format).row_bytes(shape.K) // 4, DTYPES[shape.dtype]
    M, n = shape.M, shape.streams
    streams = fake(dtype, M, n, shape.R, align=dtype.width // 8)
    mixed = (streams, fake(Float32, M, n, align=4), fake(Float32, M, n, n, align=4), streams)
    arguments = (
        fake(dtype, shape.M, shape.K),
        fake(dtype, shape.M, shape.K),
        Float32(0.0),
        fake(Int32, shape.R, words),
        scale_argument(shape.format, shape.e8m0),
        fake(Float32, 1, align=4) if shape.format == "nvfp4" else None,
        fake(Float32, shape.M, shape.R, align=4),
        *(mixed if n else (None, None, None, fake(dtype, M, shape.R, align=dtype.width // 8))),
        Int32(0),
        current(),
    )
    return kind(SharedExpert, config)(shape, config), arguments


def configs(shape: Shape) -> Iterator[Config]:
    return iter(configs_of(shape.work))


KERNEL = Kernel("shared_expert", __file__, program, configs)


def launch(shape: Shape, *arguments) -> None:
    """See `program`."""
    KERNEL.launcher(shape)(*arguments)
