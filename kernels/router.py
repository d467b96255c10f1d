"""The router: one warp a token. Each lane keeps every 32nd score as an integer that sorts like the float; k times the warp
finds the largest, ties to the lower expert, by two integer reductions."""

from collections.abc import Iterator
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64

from dsv4_compile.kernel import Kernel, fake, stream
from dsv4_compile.kernels import warps as of_warp

LANES = 32
SMALLEST = -(2**31)
NOBODY = 1 << 30


@dataclass(frozen=True)
class Shape:
    """experts: at most 1024. k: at most 32, one lane each."""

    experts: int
    k: int


@dataclass(frozen=True)
class Config:
    """warps: tokens of a block."""

    warps: int


def sqrt_softplus(x: Float32) -> Float32:
    """log1p keeps the small scores of very negative logits exact."""
    softplus = cute.arch.fmax(x, Float32(0.0)) + cute.math.log1p(cute.math.exp(-cute.math.absf(x)))
    return cute.math.sqrt(softplus)


def sortable(x: Float32) -> Int32:
    """Integers in the order of the floats: the magnitude bits of negative ones are flipped."""
    bits = cute.arch.inline_ptx("mov.b32 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[x])
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


class Program:
    def __init__(self, shape: Shape, config: Config):
        self.experts, self.k, self.warps = shape.experts, shape.k, config.warps
        self.rounds = -(-self.experts // LANES)  # experts of a lane

    @cute.jit
    def __call__(
        self,
        logits: cute.Tensor,
        bias: cute.Tensor,
        expert: cute.Tensor,
        gate: cute.Tensor,
        scale: Float32,
        eps: Float32,
        stream,
    ):
        grid = [cute.ceil_div(logits.shape[0], self.warps), 1, 1]
        self.kernel(logits, bias, expert, gate, scale, eps).launch(
            grid=grid, block=[LANES * self.warps, 1, 1], stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(self, logits, bias, expert, gate, scale, eps):
        of_warp.follow()
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        lane = thread % LANES
        token = block * self.warps + thread // LANES
        if token < logits.shape[0]:  # the same for a whole warp
            row = logits[token, None]
            key = cute.make_rmem_tensor((self.rounds,), Int32)
            for j in cutlass.range_constexpr(self.rounds):
                e = j * LANES + lane
                key[j] = Int32(SMALLEST)
                if e < self.experts:
                    key[j] = sortable(sqrt_softplus(row[e]) + bias[e])
            mine = Int32(0)  # lane r keeps the r-th choice
            for r in cutlass.range_constexpr(self.k):
                best, best_e = key[0], lane
                for j in cutlass.range_constexpr(1, self.rounds):
                    better = key[j] > best  # of equals in a lane, the lower expert stays
                    best_e = j * LANES + lane if better else best_e
                    best = key[j] if better else best
                top = cute.arch.warp_redux_sync(best, kind="max")
                winner = cute.arch.warp_redux_sync(best_e if best == top else Int32(NOBODY), kind="min")
                mine = winner if lane == r else mine
                for j in cutlass.range_constexpr(self.rounds):
                    key[j] = Int32(SMALLEST) if j * LANES + lane == winner else key[j]
            score = Float32(0.0)
            if lane < self.k:
                score = sqrt_softplus(row[mine])  # reading it again is cheaper than carrying it along
            total = cute.arch.warp_reduction_sum(score)
            if lane < self.k:
                expert[token, lane] = Int64(mine)
                gate[token, lane] = score / (total + eps) * scale


def program(shape: Shape, config: Config):
    """logits [N, X] fp32, bias [X] fp32 -> expert [N, k] int64, gate [N, k] fp32; scale, eps."""
    N = cute.sym_int()
    arguments = (
        fake(Float32, N, shape.experts, align=4),
        fake(Float32, shape.experts, align=4),
        fake(Int64, N, shape.k, align=8),
        fake(Float32, N, shape.k, align=4),
        Float32(1.0),
        Float32(0.0),
        stream(),
    )
    return Program(shape, config), arguments


def configs(shape: Shape) -> Iterator[Config]:
    """Few warps spread a small batch over the processors."""
    for warps in (4, 1, 2, 8):
        yield Config(warps)


KERNEL = Kernel("router", __file__, program, configs)


def launch(logits, bias, expert, gate, scale: float, eps: float) -> None:
    """Fill expert and gate; see `program`."""
    KERNEL.launcher(Shape(logits.shape[1], gate.shape[1]))(logits, bias, expert, gate, scale, eps)
