"""All experts of few tokens, in three launches: the first chooses, and goes through gate and up of the choices and of the
shared expert side by side; the second through the down matrices of the choices; the third through that of the shared one, adds
both, and mixes the streams. See `moe`, `router` and `shared_expert`.

Who chooses is each block for itself: that takes less than a launch. The second launch does so again, while the first runs: what
the logits come from had ended when that one began its last tile.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr

from dsv4_compile.kernel import Kernel, fake
from dsv4_compile.kernel import stream as current
from dsv4_compile.kernels import gemv, moe, router, shared_expert, side_by_side, stored, stream
from dsv4_compile.kernels.division import Needs, configs_of
from dsv4_compile.kernels.moe import HALF
from dsv4_compile.kernels.stream import DTYPES, LANES, ROWS


@dataclass(frozen=True)
class Shape:
    """routed: as `moe` has it. H hidden numbers of the shared expert, in a format of its own. chosen: whether the choices are
    given, and only their gates to be found; table: for each token of a vocabulary. streams: of mHC, into which the sum goes, or
    0."""

    routed: moe.Shape
    H: int
    format: str
    e8m0: bool
    chosen: bool
    table: bool
    streams: int

    @property
    def own(self) -> stream.Work:
        """Gate and up of the shared expert."""
        r = self.routed
        return stream.Work(self.format, self.e8m0, r.dtype, r.N, r.D, 1, -(-self.H // HALF) * ROWS, 1, splits=1)

    @property
    def end(self) -> shared_expert.Shape:
        r = self.routed
        return shared_expert.Shape(r.N, r.D, self.H, self.format, self.e8m0, r.dtype, self.streams)

    @property
    def keys(self) -> int:
        """Scores that a block keeps."""
        return 0 if self.chosen else router.whole(self.routed.X)


def shape(N, k, X, D, I, format, e8m0, dtype, H, own, own_e8m0, chosen, table, streams) -> Shape:
    """own: format of the shared expert."""
    return Shape(moe.Shape(N, k, X, D, I, format, e8m0, dtype), H, own, own_e8m0, chosen, table, streams)


@dataclass(frozen=True)
class Config:
    """up and own: of the first launch, in blocks of as many warps."""

    up: stream.Config
    own: stream.Config
    down: stream.Config
    end: stream.Config


class Routed(moe.GateUp):
    def __init__(self, shape: Shape, config: stream.Config, grid: int):
        super().__init__(shape.routed, config)
        self.grid, self.turns = grid, -(-self.tiles // grid)


class Own(moe.GateUp):
    """Gate and up of the shared expert, of all tokens."""

    def __init__(self, shape: Shape, config: stream.Config, grid: int):
        stream.Stream.__init__(self, shape.own, config)
        self.I, self.grid, self.turns = shape.H, grid, -(-self.tiles // grid)
        self.scale_row, self.scale_matrix = self.format.scale_bytes(shape.H, shape.routed.D)

    def place(self, tile, segment, r: int, g):
        row = tile * (self.rows_of_tile // 2) + self.member * HALF + g
        scales = self.scales_at[r]
        return self.weights[r], cutlass.min(row, self.I - 1), scales, scales + self.scale_matrix

    @cute.jit
    def run_all(self, x, w1, w3, s, t, limit, h, early, block, thread):
        self.weights = [w.iterator.toint() for w in (w1, w3)]
        self.scales_at = self.weights
        if const_expr(s is not None):
            self.scales_at = [each.iterator.toint() for each in s]
        self.begin(thread, block)
        if early == 0:
            cute.arch.griddepcontrol_wait()
        self.fill()
        cute.arch.griddepcontrol_wait()
        self.stage_vectors(x, None, thread)
        self.by_gate, self.by_up = Float32(self.back), Float32(self.back)
        if const_expr(t is not None):
            self.by_gate, self.by_up = self.by_gate * t[0][0], self.by_up * t[1][0]
        self.limit, self.h = limit, h
        cute.arch.barrier()
        self.run(thread)

    @cute.jit
    def emit(self, tile, turn, parity, thread):
        """As in `moe.GateUp`, for each token; the sums are rounded as matrix products are."""
        half, hidden = self.rows_of_tile // 2, self.h
        for i in cutlass.range_constexpr(-(-half * self.M // self.threads)):
            m, place = (i * self.threads + thread) // half, (i * self.threads + thread) % half
            column = tile * half + place
            if m < self.M and column < self.I:
                row = place // HALF * ROWS + place % HALF
                g = Float32((self.total(parity, m, row) * self.by_gate).to(self.dtype))
                u = Float32((self.total(parity, m, row + HALF) * self.by_up).to(self.dtype))
                hidden[m, column] = moe.swiglu(g, u, self.limit).to(self.dtype)


class Up:
    def __init__(self, shape: Shape, config: Config):
        both = config.up, config.own
        each, many = side_by_side.blocks(shape.routed.up, shape.own, both)
        self.routed = stream.kind(Routed, config.up)(shape, config.up, each)
        self.own = stream.kind(Own, config.own)(shape, config.own, many)
        self.threads, self.k, self.X, self.keys = self.own.threads, shape.routed.k, shape.routed.X, shape.keys
        self.grid = many + each * shape.routed.N
        self.bytes = side_by_side.memory(shape.routed.up, shape.own, both, 8 * shape.keys, 0)

    @cute.kernel
    def kernel(self, x, logits, bias, expert, tokens, scale, eps, w, s, t, limit, v, r, u, own_limit, h, g, early):
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        base = cutlass.memory.SmemAllocator().allocate(self.bytes, 128)
        if block < self.own.grid:
            self.own.allocate(side_by_side.Arena(base, self.bytes))
            self.own.run_all(x, v[0], v[1], r, u, own_limit, g, early, block, thread)
        else:
            part = block - self.own.grid
            self.choices(x, logits, bias, expert, tokens, scale, eps, w, s, t, limit, h, base, part, thread)

    @cute.jit
    def choices(self, x, logits, bias, expert, tokens, scale, eps, w, s, t, limit, h, base, block, thread):
        """Those of a token: a block's part of them."""
        arena, routed = side_by_side.Arena(base, self.bytes), self.routed
        routed.allocate(arena)
        routed.remember(arena)
        keys, scores = kept(arena, self.keys)
        token, part = block // routed.grid, block % routed.grid
        cute.arch.griddepcontrol_wait()  # nothing is known before
        e, score = chosen(self, logits, bias, expert, tokens, keys, scores, token, thread)
        gate = router.share(score, thread % LANES, scale, eps)
        s1, s3 = (None, None) if s is None else (s[0], s[1])
        t1, t3 = (None, None) if t is None else (t[0], t[1])
        routed.go(x, token, e, gate, w[0], w[1], s1, s3, t1, t3, limit, h, part, thread)


def kept(arena, keys: int):
    """Where the router keeps its scores."""
    if keys == 0:
        return None, None
    layout = cute.make_layout((keys,))
    return arena.allocate_tensor(Int32, layout, 16), arena.allocate_tensor(Float32, layout, 16)


def chosen(of, logits, bias, expert, tokens, keys, scores, token, thread):
    """See `router.choose`. tokens: where expert is a table."""
    row = cute.make_tensor(logits[token, None].iterator, cute.make_layout((of.X,)))
    place = token if tokens is None else row_of(tokens[token], expert.shape[0])
    given = None if expert is None else expert[place, None]
    return router.choose(row, bias, given, keys, scores, thread, of.threads, of.k)


@cute.jit
def row_of(token, rows):
    """Of a table, as it is indexed: from the end if negative. Tokens beyond it, for which there is no embedding either, stay
    inside."""
    place = token + rows if token < 0 else token
    return cutlass.min(cutlass.max(place, Int64(0)), Int64(rows - 1))


class Down(moe.Down):
    def __init__(self, shape: Shape, config: stream.Config):
        super().__init__(shape.routed, config)
        self.X, self.keys = shape.routed.X, shape.keys

    @cute.kernel
    def kernel(self, h, logits, bias, expert, tokens, w2, s2, t2, y):
        thread, _, _ = cute.arch.thread_idx()
        block, token, _ = cute.arch.block_idx()
        smem = self.allocate()
        keys, scores = kept(smem, self.keys)
        self.ids = smem.allocate_tensor(Int32, cute.make_layout((self.k,)), 16)
        factors = smem.allocate_tensor(Float32, cute.make_layout((self.k,)), 16)
        ids = self.ids
        e, _ = chosen(self, logits, bias, expert, tokens, keys, scores, token, thread)
        if thread < self.k:
            ids[thread] = e
            if const_expr(t2 is not None):
                factors[thread] = t2[e]
        cute.arch.barrier()
        self.go(h, w2, s2, factors if t2 is not None else None, y, block, token, thread)


class End(shared_expert.SharedExpert):
    """Its hidden numbers are there."""

    @cute.jit
    def eight(self, x, m, index):
        return stream.Stream.eight(self, x[0], m, index)


class Experts:
    def __init__(self, shape: Shape, config: Config):
        self.up, self.N = Up(shape, config), shape.routed.N
        self.down = stream.kind(Down, config.down)(shape, config.down)
        self.end = stream.kind(End, config.end)(shape.end, config.end)

    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,
        logits: cute.Tensor,
        bias,
        expert,
        tokens,
        scale: Float32,
        eps: Float32,
        w,
        s,
        t,
        limit: Float32,
        v,
        r,
        u,
        own_limit: Float32,
        mixed,
        h: cute.Tensor,
        g: cute.Tensor,
        routed: cute.Tensor,
        y: cute.Tensor,
        early: Int32,
        stream,
    ):
        self.up.kernel(
            x, logits, bias, expert, tokens, scale, eps, w, s, t, limit, v, r, u, own_limit, h, g, early
        ).launch(grid=[self.up.grid, 1, 1], block=[self.up.threads, 1, 1], stream=stream, use_pdl=True)
        s2, t2 = None if s is None else s[2], None if t is None else t[2]
        self.down.kernel(h, logits, bias, expert, tokens, w[2], s2, t2, routed).launch(
            grid=[self.down.grid * self.down.split, self.N, 1],
            block=[self.down.threads, 1, 1],
            cluster=[self.down.split, 1, 1],
            stream=stream,
            use_pdl=True,
        )
        r2, u2 = None if r is None else r[2], None if u is None else u[2]
        X, post, comb = (None, None, None) if mixed is None else mixed
        self.end(g, None, own_limit, v[2], r2, u2, routed, X, post, comb, y, early, stream)


def program(shape: Shape, config: Config):
    """x [N, D], logits [N, X] fp32; bias [X] fp32, or expert [N, k] int64, or [V, k] with tokens [N] int64; scale, eps of the
    gates; w: w1 and w3 [X, I, row], w2 [X, D, row] of 32-bit words, with s their scales, and t [X] fp32, or None; limit. v, r,
    u, own_limit: the same of the shared expert, v [H, row] and [D, row]. mixed: X [N, n, D], post [N, n] and comb [N, n, n]
    fp32, or None; h [N k, I], g [N, H] and routed [N, D] fp32 as workspace -> y [N, D], or [N, n, D]. early: as in `gemv`, of
    the shared expert's matrices."""
    q, dtype, n = shape.routed, DTYPES[shape.routed.dtype], shape.streams
    f, own = stored.Format(q.format), stored.Format(shape.format)
    w = tuple(fake(Int32, q.X, rows, f.row_bytes(K) // 4) for rows, K in ((q.I, q.D), (q.I, q.D), (q.D, q.I)))
    v = tuple(fake(Int32, rows, own.row_bytes(K) // 4) for rows, K in ((shape.H, q.D), (shape.H, q.D), (q.D, shape.H)))
    s = tuple(gemv.scale_argument(q.format, q.e8m0) for _ in range(3)) if q.format in stored.GROUP else None
    r = tuple(gemv.scale_argument(shape.format, shape.e8m0) for _ in range(3)) if shape.format in stored.GROUP else None
    t = tuple(fake(Float32, q.X, align=4) for _ in range(3)) if q.format == "nvfp4" else None
    u = tuple(fake(Float32, 1, align=4) for _ in range(3)) if shape.format == "nvfp4" else None
    streams = fake(dtype, q.N, n, q.D, align=dtype.width // 8)
    mixed = (streams, fake(Float32, q.N, n, align=4), fake(Float32, q.N, n, n, align=4))
    arguments = (
        fake(dtype, q.N, q.D),
        fake(Float32, q.N, q.X, align=4),
        None if shape.chosen else fake(Float32, q.X, align=4),
        fake(cutlass.Int64, cute.sym_int() if shape.table else q.N, q.k, align=8) if shape.chosen else None,
        fake(cutlass.Int64, q.N, align=8) if shape.table else None,
        Float32(1.0),
        Float32(0.0),
        *(w, s, t),
        Float32(0.0),
        *(v, r, u),
        Float32(0.0),
        mixed if n else None,
        fake(dtype, q.N * q.k, q.I),
        fake(dtype, q.N, shape.H),
        fake(Float32, q.N, q.D, align=4),
        streams if n else fake(dtype, q.N, q.D, align=dtype.width // 8),
        Int32(0),
        current(),
    )
    return Experts(shape, config), arguments


def configs(shape: Shape) -> Iterator[Config]:
    """The best of each launch, then others of one with the best of the others."""
    q = shape.routed
    firsts = list(side_by_side.pairs(q.up, shape.own, 8 * shape.keys, 0))
    downs = configs_of(q.down, Needs(8 * shape.keys))[:6]
    ends = configs_of(shape.end.work)[:6]
    if firsts and downs and ends:
        yield Config(*firsts[0], downs[0], ends[0])
        yield from (Config(*first, downs[0], ends[0]) for first in firsts[1:])
        yield from (Config(*firsts[0], down, ends[0]) for down in downs[1:])
        yield from (Config(*firsts[0], downs[0], end) for end in ends[1:])


KERNEL = Kernel("experts", __file__, program, configs)


def launch(shape: Shape, *arguments) -> None:
    """See `program`."""
    KERNEL.launcher(shape)(*arguments)
