"""The routed experts of few tokens: two streams of matrices that are picked on the device.

The first goes, for each token, through gate and up of its k experts, one after the other: a tile has 8 rows of each for every
16, so that one thread has both sums for clamp, SwiGLU and the choice's weight. The second goes through the k down matrices of a
token one after the other, as if they were one matrix of k I columns, which adds the experts up in their order. It starts while
the first still runs, and fills its rings before it waits for what the first writes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr

from dsv4_compile.kernel import Kernel, fake
from dsv4_compile.kernel import stream as current
from dsv4_compile.kernels import gemv, stored, stream
from dsv4_compile.kernels.division import configs_of
from dsv4_compile.kernels.stream import DTYPES, ROWS

HALF = ROWS // 2


@dataclass(frozen=True)
class Shape:
    """N tokens of D numbers of `dtype`, k experts a token, of X with I hidden numbers each; format and e8m0 as in
    `gemv.Shape`. Rows of D and I columns are 16-byte aligned."""

    N: int
    k: int
    X: int
    D: int
    I: int
    format: str
    e8m0: bool
    dtype: str

    @property
    def up(self) -> gemv.Work:
        rows = -(-self.I // HALF) * ROWS
        return stream.Work(
            self.format, self.e8m0, self.dtype, 1, self.D, 1, rows, self.N, splits=1, each=1, parts=self.k
        )

    @property
    def down(self) -> gemv.Work:
        return stream.Work(self.format, self.e8m0, self.dtype, 1, self.I, self.k, self.D, self.N, splits=4, each=1)


@dataclass(frozen=True)
class Config:
    up: stream.Config
    down: stream.Config


@cute.jit
def swiglu(g, u, limit):
    """Clamped; NaN stays."""
    g = limit if g > limit else g
    u = limit if u > limit else u
    u = -limit if u < -limit else u
    return g / (Float32(1.0) + cute.math.exp(-g)) * u


class GateUp(stream.Stream):
    def __init__(self, shape: Shape, config: stream.Config):
        super().__init__(shape.up, config)
        self.k, self.I = shape.k, shape.I
        self.matrix = shape.I * self.row_bytes
        self.scale_row, self.scale_matrix = self.format.scale_bytes(shape.I, shape.D)
        self.of_choice = self.tiles // shape.k  # tiles

    def place(self, tile, segment, r: int, g):
        """A row of the tile's gate rows (r = 0) or up rows, of the tile's choice; see `gemv.Linear.place`."""
        e = Int64(self.ids[tile // self.of_choice])
        row = tile % self.of_choice * (self.rows_of_tile // 2) + self.member * HALF + g
        scales = self.scales_at[r] + e * self.scale_matrix
        return self.weights[r] + e * self.matrix, cutlass.min(row, self.I - 1), scales, scales + self.scale_matrix

    def remember(self, smem):
        """Room for a token's experts, and for what belongs to them: its gates, and the scales of gate and up."""
        self.ids = smem.allocate_tensor(Int32, cute.make_layout((self.k,)), 16)
        self.factors = smem.allocate_tensor(Float32, cute.make_layout((self.k, 3)), 16)

    @cute.kernel
    def kernel(self, x, expert, gate, w1, w3, s1, s3, t1, t3, limit, h):
        thread, _, _ = cute.arch.thread_idx()
        block, token, _ = cute.arch.block_idx()
        self.remember(self.allocate())
        if const_expr(self.overlaps):
            cute.arch.griddepcontrol_wait()  # nothing is known before
        mine = cutlass.min(thread, self.k - 1)
        self.go(
            x, token, Int32(expert[token, mine]), gate[token, mine], w1, w3, s1, s3, t1, t3, limit, h, block, thread
        )

    @cute.jit
    def go(self, x, token, e, share, w1, w3, s1, s3, t1, t3, limit, h, block, thread):
        """The tiles of a block, of one token. Threads 0 to k - 1 know its experts e, and what their hidden numbers are
        multiplied by."""
        ids, factors = self.ids, self.factors
        if thread < self.k:
            ids[thread] = e
            factors[thread, 0] = share
            factors[thread, 1], factors[thread, 2] = Float32(self.back), Float32(self.back)
            if const_expr(t1 is not None):
                factors[thread, 1], factors[thread, 2] = Float32(self.back) * t1[e], Float32(self.back) * t3[e]
        cute.arch.barrier()
        self.weights = [w.iterator.toint() for w in (w1, w3)]
        self.scales_at = self.weights
        if const_expr(s1 is not None):
            self.scales_at = [s.iterator.toint() for s in (s1, s3)]
        self.begin(thread, block)
        self.fill()
        whole = cute.make_layout((1, self.K), stride=(self.K, 1))
        self.stage_vectors(cute.make_tensor(x[token, None].iterator, whole), None, thread)
        self.limit, self.h, self.token = limit, h, token
        cute.arch.barrier()
        self.run(thread)

    @cute.jit
    def before(self, tile):
        if tile + self.grid >= self.tiles:  # the second kernel may come: what it streams is not what this one waits for
            cute.arch.griddepcontrol_launch_dependents()

    @cute.jit
    def emit(self, tile, turn, parity, thread):
        """The hidden numbers of a tile: of each 16 rows, the first half are gate's, the other up's."""
        half, hidden, factors = self.rows_of_tile // 2, self.h, self.factors
        j, column = tile // self.of_choice, tile % self.of_choice * half + thread
        if thread < half and column < self.I:
            row = thread // HALF * ROWS + thread % HALF
            g = self.total(parity, 0, row) * factors[j, 1]
            u = self.total(parity, 0, row + HALF) * factors[j, 2]
            h = swiglu(g, u, self.limit) * factors[j, 0]
            hidden[self.token * self.k + j, column] = h.to(self.dtype)


class Down(stream.Stream):
    def __init__(self, shape: Shape, config: stream.Config):
        super().__init__(shape.down, config)
        self.k, self.D = shape.k, shape.D
        self.matrix = shape.D * self.row_bytes
        self.scale_row, self.scale_matrix = self.format.scale_bytes(shape.D, shape.I)

    def place(self, tile, segment, r: int, g):
        """See `gemv.Linear.place`."""
        e = Int64(self.ids[segment])
        row = tile * self.rows_of_tile + self.member * ROWS + r * HALF + g
        row = cutlass.min(row, self.D - 1)
        scales = self.scales_at + e * self.scale_matrix
        return self.weight_at + e * self.matrix, row, scales, scales + self.scale_matrix

    @cute.jit
    def put(self, tile, m, row, value):
        y = self.y
        if tile * self.rows_of_tile + row < self.D:
            y[self.token, tile * self.rows_of_tile + row] = value * Float32(self.back)

    @cute.kernel
    def kernel(self, h, expert, w2, s2, t2, y):
        thread, _, _ = cute.arch.thread_idx()
        block, token, _ = cute.arch.block_idx()
        smem = self.allocate()
        self.ids = smem.allocate_tensor(Int32, cute.make_layout((self.k,)), 16)
        factors = smem.allocate_tensor(Float32, cute.make_layout((self.k,)), 16)
        ids = self.ids
        if thread < self.k:
            ids[thread] = Int32(expert[token, thread])
            if const_expr(t2 is not None):
                factors[thread] = t2[expert[token, thread]]
        cute.arch.barrier()
        self.go(h, w2, s2, factors if t2 is not None else None, y, block, token, thread)

    @cute.jit
    def go(self, h, w2, s2, factors, y, block, token, thread):
        """The tiles of a block, when the token's experts are known."""
        self.weight_at, self.token, self.y = w2.iterator.toint(), token, y
        self.scales_at = self.weight_at
        if const_expr(s2 is not None):
            self.scales_at = s2.iterator.toint()
        self.begin(thread, block)
        self.fill()
        cute.arch.griddepcontrol_wait()  # h is not there before
        if const_expr(self.overlaps):
            cute.arch.griddepcontrol_launch_dependents()
        columns = self.k * self.K
        whole = cute.make_layout((1, columns), stride=(columns, 1))
        rows = cute.make_tensor(h[token * self.k, None].iterator, whole)
        self.stage_vectors(rows, factors, thread)
        cute.arch.barrier()
        self.run(thread)


class Experts:
    def __init__(self, shape: Shape, config: Config):
        up, down = stream.kind(GateUp, config.up), stream.kind(Down, config.down)
        self.shape, self.up, self.down = shape, up(shape, config.up), down(shape, config.down)

    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,
        expert: cute.Tensor,
        gate: cute.Tensor,
        w1: cute.Tensor,
        w3: cute.Tensor,
        w2: cute.Tensor,
        s1,
        s3,
        s2,
        t1,
        t3,
        t2,
        limit: Float32,
        h: cute.Tensor,
        y: cute.Tensor,
        stream,
    ):
        self.up.kernel(x, expert, gate, w1, w3, s1, s3, t1, t3, limit, h).launch(
            grid=[self.up.grid, self.shape.N, 1],
            block=[self.up.threads, 1, 1],
            stream=stream,
            use_pdl=self.up.overlaps,
        )
        self.down.kernel(h, expert, w2, s2, t2, y).launch(
            grid=[self.down.grid * self.down.split, self.shape.N, 1],
            block=[self.down.threads, 1, 1],
            cluster=[self.down.split, 1, 1],
            stream=stream,
            use_pdl=True,
        )


def program(shape: Shape, config: Config):
    """x [N, D], expert [N, k] int64, gate [N, k] fp32, w1 and w3 [X, I, row] and w2 [X, D, row] of 32-bit words, s1, s3, s2
    and t1, t3, t2 [X] fp32 or None, limit, h [N k, I] as workspace -> y [N, D] fp32."""
    f, dtype = stored.Format(shape.format), DTYPES[shape.dtype]
    s = shape
    up, down = (fake(Int32, s.X, r, f.row_bytes(c) // 4) for r, c in ((s.I, s.D), (s.D, s.I)))
    twice = fake(Float32, s.X, align=4) if s.format == "nvfp4" else None
    arguments = (
        fake(dtype, s.N, s.D),
        fake(Int64, s.N, s.k, align=8),
        fake(Float32, s.N, s.k, align=4),
        *(up, up, down),
        *(gemv.scale_argument(s.format, s.e8m0) for _ in range(3)),
        *(twice, twice, twice),
        Float32(0.0),
        fake(dtype, s.N * s.k, s.I),
        fake(Float32, s.N, s.D, align=4),
        current(),
    )
    return Experts(shape, config), arguments


def configs(shape: Shape) -> Iterator[Config]:
    """The best of each first, then others of one with the best of the other."""
    ups, downs = (configs_of(work)[:8] for work in (shape.up, shape.down))
    if not ups or not downs:
        return
    yield Config(ups[0], downs[0])
    yield from (Config(up, downs[0]) for up in ups[1:])
    yield from (Config(ups[0], down) for down in downs[1:])


KERNEL = Kernel("moe", __file__, program, configs)


def launch(shape: Shape, *arguments) -> None:
    """See `program`."""
    KERNEL.launcher(shape)(*arguments)
