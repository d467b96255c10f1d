"""What a decode step does between its products and attention, in one launch: norm and RoPE of the queries, where they lie; norm
and RoPE of the keys, and their cache; and up to two compressors' memories. Each block does one of these: see `norm` and
`compressor_append`."""

from collections.abc import Iterator
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from dsv4_compile.kernel import Kernel, fake, stream
from dsv4_compile.kernels import compressor, compressor_append, norm
from dsv4_compile.kernels import warps as of_warp

WARPS = 4  # of a block, at least
OfNorm, OfCompressor = norm.Shape, compressor_append.Shape


@dataclass(frozen=True)
class Shape:
    """queries: without a cache; keys: with one."""

    queries: norm.Shape
    keys: norm.Shape
    compressors: tuple[compressor_append.Shape, ...]

    @property
    def warps(self) -> int:
        """Of a block."""
        return max([WARPS, *(c.threads // 32 for c in self.compressors)])


@dataclass(frozen=True)
class Config:
    """queries and keys: with as many threads in a block. at_once: of the compressors."""

    queries: norm.Config
    keys: norm.Config
    at_once: tuple[int, ...]


class Prologue:
    def __init__(self, shape: Shape, config: Config):
        self.queries = norm.RMSNorm(shape.queries, config.queries)
        self.keys = norm.RMSNorm(shape.keys, config.keys)
        configs = [compressor.Config(n) for n in config.at_once]
        self.steps = [compressor_append.Step(s, c) for s, c in zip(shape.compressors, configs, strict=True)]
        self.threads = 32 * shape.warps

    @cute.jit
    def __call__(
        self,
        queries,
        keys,
        compressors,
        eps: Float32,
        eps_k: Float32,
        eps_0: Float32,
        eps_1: Float32,
        inner: Int32,
        inner_k: Int32,
        stream,
    ):
        of_queries = cute.ceil_div(queries[0].shape[0], self.queries.rows)
        of_keys = cute.ceil_div(keys[0].shape[0], self.keys.rows)
        batch = keys[4].shape[0]
        self.kernel(queries, keys, compressors, eps, eps_k, eps_0, eps_1, inner, inner_k).launch(
            grid=[of_queries + of_keys + len(self.steps) * batch, 1, 1],
            block=[self.threads, 1, 1],
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(self, queries, keys, compressors, eps, eps_k, eps_0, eps_1, inner, inner_k):
        of_warp.follow()
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        x, cos, sin = queries
        k, weight, k_cos, k_sin, ring, slot = keys
        of_keys, batch = cute.ceil_div(k.shape[0], self.keys.rows), ring.shape[0]
        for i in cutlass.range_constexpr(len(self.steps)):  # they take longest
            if block >= i * batch and block < (i + 1) * batch and thread < self.steps[i].threads:
                self.steps[i].go(*compressors[i], eps_0 if i == 0 else eps_1, block - i * batch, thread)
        rest = block - len(self.steps) * batch
        if rest >= 0 and rest < of_keys:
            T = k.shape[0] // batch
            self.keys.go(k, weight, k_cos, k_sin, ring, slot, eps_k, inner_k, T, rest, thread)
        if rest >= of_keys:
            self.queries.go(x, None, cos, sin, x, None, eps, inner, Int32(1), rest - of_keys, thread)


def program(shape: Shape, config: Config):
    """queries: x [N, D], which is written, cos and sin [P, rope / 2] fp32. keys: k [B T, D], weight [D] or None, cos and sin,
    ring [B, S, D], slot [B T] int64. compressors: the tensors of each, as in `compressor_append`, or None. Then eps of each
    of them, those that are not there being ignored; inner, of the queries and the keys, as in `norm`."""
    q, k, B, N, M = shape.queries, shape.keys, cute.sym_int(), cute.sym_int(), cute.sym_int()

    def of_norm(s: norm.Shape, rows):
        dtype, P = norm.DTYPES[s.dtype], cute.sym_int()
        tables = [fake(Float32, P, s.rope // 2, align=4) for _ in range(2)]
        weight = None if s.weight == "none" else fake(norm.DTYPES[s.weight], s.D, align=8 if s.D % 8 else 16)
        return fake(dtype, rows, s.D, align=s.vector * dtype.width // 8), weight, *tables

    x, _, cos, sin = of_norm(q, N)
    ring = norm.fake_cache(k, B)
    arguments = (
        (x, cos, sin),
        (*of_norm(k, M), ring, fake(Int64, M, align=8)),
        tuple(compressor_append.arguments_of(s, B) for s in shape.compressors) or None,
        *(Float32(0.0) for _ in range(4)),
        Int32(1),
        Int32(1),
        stream(),
    )
    return Prologue(shape, config), arguments


def configs(shape: Shape) -> Iterator[Config]:
    def of(s: norm.Shape) -> list[norm.Config]:
        sized = (norm.Config(c.warps, shape.warps // c.warps) for c in norm.configs(s) if shape.warps % c.warps == 0)
        return [c for c in sized if norm.fits(s, c)]

    if any(c.threads not in (32, 32 * shape.warps) for c in shape.compressors):
        return  # the barriers of a part are those of the block
    at_once = tuple(next(compressor.configs(c)).at_once for c in shape.compressors)
    for i, queries in enumerate(of(shape.queries)):
        for j, keys in enumerate(of(shape.keys)):
            if i == 0 or j == 0:
                yield Config(queries, keys, at_once)


KERNEL = Kernel("prologue", __file__, program, configs)


def launch(shape: Shape, *arguments) -> None:
    """See `program`."""
    KERNEL.launcher(shape)(*arguments)
