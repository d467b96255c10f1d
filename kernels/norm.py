"""RMSNorm, with and without a weight, with and without RoPE behind it, written in order or into a cache. A row is read once
and kept in registers; a warp or several hold it."""

from collections.abc import Iterator
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, Uint8, const_expr

from dsv4_compile.kernel import Kernel, fake, of_tokens, stream
from dsv4_compile.kernels import packed
from dsv4_compile.kernels import warps as of_warp

DTYPES = {"bf16": BFloat16, "fp32": Float32}
OF_CACHE = DTYPES | {"bytes": Uint8}


@dataclass(frozen=True)
class Shape:
    """Rows of D numbers of `dtype`, D a multiple of 4 and at most 16384; weight: its dtype, or "none". rope: trailing
    columns to rotate in pairs, or 0. cache: its dtype, if the rows go to slots of one, or "none"; "bytes": see `packed`."""

    D: int
    dtype: str
    weight: str
    rope: int = 0
    cache: str = "none"

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
        self.D, self.vector, self.weight, self.rope = shape.D, shape.vector, DTYPES.get(shape.weight), shape.rope
        self.dtype, self.warps, self.rows = DTYPES[shape.dtype], config.warps, config.rows
        self.target = OF_CACHE[shape.dtype if shape.cache == "none" else shape.cache]
        self.threads = 32 * config.warps  # of a row
        self.vectors = shape.D // shape.vector
        self.loads = -(-self.vectors // self.threads)

    @cute.jit
    def __call__(self, x, weight, cos, sin, out, slot, eps: Float32, inner: Int32, T: Int32, stream):
        self.kernel(x, weight, cos, sin, out, slot, eps, inner, T).launch(
            grid=[cute.ceil_div(x.shape[0], self.rows), 1, 1],
            block=[self.threads * self.rows, 1, 1],
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(self, x, weight, cos, sin, out, slot, eps, inner, T):
        of_warp.follow()
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        self.go(x, weight, cos, sin, out, slot, eps, inner, T, block, thread)

    @cute.jit
    def go(self, x, weight, cos, sin, out, slot, eps, inner, T, block, thread):
        """The rows of a block."""
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
        squares = of_warp.sum_of_row(squares, here, self.rows, t, self.warps)
        y = y * cute.math.rsqrt(squares / Float32(self.D) + eps)
        if const_expr(self.weight is not None):
            y = y * weights.load().to(Float32)
        if const_expr(self.rope > 0):
            y = self.rotated(y, (place // inner) % cos.shape[0], cos, sin, t)
        kept.store(y.to(self.dtype))
        if const_expr(self.target is Uint8):
            target = out[place // T, Int32(slot[place]) % out.shape[1], None]
            numbers = cute.make_rmem_tensor((self.vector, self.loads), Float32)
            numbers.store(kept.load().to(Float32))
            for i in cutlass.range_constexpr(self.loads):
                v = i * self.threads + t
                mine = [numbers[j, i] for j in range(self.vector)]
                packed.store(mine, target, v, v < self.vectors and inside, self.D, self.rope)
        else:
            if const_expr(slot is None):
                target = cute.zipped_divide(out[place, None], (self.vector,))
            else:
                target = cute.zipped_divide(out[place // T, Int32(slot[place]) % out.shape[1], None], (self.vector,))
            written = cute.make_rmem_tensor((self.vector, self.loads), self.target)
            written.store(kept.load().to(self.target))
            for i in cutlass.range_constexpr(self.loads):
                v = i * self.threads + t
                if v < self.vectors and inside:
                    cute.autovec_copy(written[None, i], target[None, v])

    @cute.jit
    def rotated(self, y, angles, cos, sin, t):
        """Pairs of the trailing columns, by their row of the tables."""
        turned = cute.make_rmem_tensor((self.vector, self.loads), Float32)
        turned.store(y)
        first = self.D - self.rope
        for i in cutlass.range_constexpr(self.loads):
            for p in cutlass.range_constexpr(self.vector // 2):
                if const_expr(((i + 1) * self.threads - 1) * self.vector + 2 * p >= first):  # else never among them
                    column = (i * self.threads + t) * self.vector + 2 * p
                    if column >= first and column < self.D:
                        c, s = cos[angles, (column - first) // 2], sin[angles, (column - first) // 2]
                        a, b = turned[2 * p, i], turned[2 * p + 1, i]
                        turned[2 * p, i] = a * c - b * s
                        turned[2 * p + 1, i] = a * s + b * c
        return turned.load()


def program(shape: Shape, config: Config):
    """x [N, D], weight [D] or None, cos and sin [P, rope / 2] fp32 or None -> out [N, D]; eps; inner: row r of x is turned by
    row (r / inner) mod P of the tables. With a cache out is that [B, S, D], and row b T + t goes to slot mod S, slot [N]
    int64, of b."""
    N, dtype = cute.sym_int(), DTYPES[shape.dtype]
    table = fake(Float32, cute.sym_int(), shape.rope // 2, align=4) if shape.rope else None
    align, cached = shape.vector * dtype.width // 8, shape.cache != "none"
    out = fake(dtype, N, shape.D, align=align)
    if cached:
        out = fake_cache(shape, cute.sym_int())
    arguments = (
        fake(dtype, N, shape.D, align=align),
        None if shape.weight == "none" else fake(DTYPES[shape.weight], shape.D, align=8 if shape.D % 8 else 16),
        table,
        table,
        out,
        fake(Int64, N, align=8) if cached else None,
        Float32(0.0),
        Int32(1),
        Int32(1),
        stream(),
    )
    return RMSNorm(shape, config), arguments


def fake_cache(shape: Shape, B):
    """[B, S, D], or bytes."""
    if shape.cache == "bytes":
        return fake(Uint8, B, cute.sym_int(), packed.row_bytes(shape.D, shape.rope))
    of_cache = DTYPES[shape.cache]
    return fake(of_cache, B, cute.sym_int(), shape.D, align=min(16, shape.vector * of_cache.width // 8))


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


def launch(shape: Shape, *arguments) -> None:
    """See `program`."""
    KERNEL.launcher(shape, work=(of_tokens(arguments[0].shape[0]),))(*arguments)
