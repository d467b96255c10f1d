"""The router: one block a token, one thread an expert. A score's place among all is the number of those before it: each thread
counts them, which is little code and no chain of reductions."""

from collections.abc import Iterator
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr

from dsv4_compile.kernel import Kernel, fake, stream
from dsv4_compile.kernels import warps as of_warp

LANES = 32
SMALLEST = -(2**31)
TOGETHER = 4  # scores that are read at once


@dataclass(frozen=True)
class Shape:
    """experts: at most 1024, unless they are `chosen` already. k: at most 32, one lane each."""

    experts: int
    k: int
    chosen: bool = False


@dataclass(frozen=True)
class Config:
    """unroll: of the loop that counts."""

    unroll: int


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
        self.experts, self.k, self.chosen, self.unroll = shape.experts, shape.k, shape.chosen, config.unroll
        self.threads = LANES if shape.chosen else -(-shape.experts // LANES) * LANES

    @cute.jit
    def __call__(
        self,
        logits: cute.Tensor,
        bias,
        expert: cute.Tensor,
        gate: cute.Tensor,
        scale: Float32,
        eps: Float32,
        stream,
    ):
        self.kernel(logits, bias, expert, gate, scale, eps).launch(
            grid=[logits.shape[0], 1, 1], block=[self.threads, 1, 1], stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(self, logits, bias, expert, gate, scale, eps):
        thread, _, _ = cute.arch.thread_idx()
        token, _, _ = cute.arch.block_idx()
        row = logits[token, None]
        smem = cutlass.memory.SmemAllocator()
        score = Float32(0.0)
        if const_expr(self.chosen):
            of_warp.follow()
            if thread < self.k:
                e = expert[token, thread]
                score = Float32(float("nan"))
                if e >= 0 and e < self.experts:
                    score = sqrt_softplus(row[e])
        else:
            keys = smem.allocate_tensor(Int32, cute.make_layout((self.threads,)), 16)
            best = smem.allocate_tensor(Float32, cute.make_layout((LANES,)), 16)
            mine, key = Float32(0.0), Int32(SMALLEST)
            of_warp.follow()
            if thread < self.experts:
                mine = sqrt_softplus(row[thread])
                key = sortable(mine + bias[thread])
            keys[thread] = key
            cute.arch.barrier()
            place = self.before(keys, key, thread)
            if thread < self.experts and place < self.k:
                expert[token, place] = Int64(thread)
                best[place] = mine
            cute.arch.barrier()
            if thread < self.k:
                score = best[thread]
        if thread < LANES:
            total = cute.arch.warp_reduction_sum(score)
            if thread < self.k:
                gate[token, thread] = score / (total + eps) * scale

    @cute.jit
    def before(self, keys, key, thread):
        """How many are larger, or equal and of a lower expert."""
        fours, count = cute.zipped_divide(keys, (TOGETHER,)), Int32(0)
        for i in cutlass.range(self.threads // TOGETHER, unroll=self.unroll):
            others = cute.make_rmem_tensor((TOGETHER,), Int32)
            cute.autovec_copy(fours[None, i], others)
            for j in cutlass.range_constexpr(TOGETHER):
                equal = others[j] == key and i * TOGETHER + j < thread
                count = count + (Int32(1) if others[j] > key or equal else Int32(0))
        return count


def program(shape: Shape, config: Config):
    """logits [N, X] fp32, bias [X] fp32 -> expert [N, k] int64, gate [N, k] fp32; scale, eps. With experts that are chosen,
    bias is None and expert is read."""
    N = cute.sym_int()
    arguments = (
        fake(Float32, N, shape.experts, align=4),
        None if shape.chosen else fake(Float32, shape.experts, align=4),
        fake(Int64, N, shape.k, align=8),
        fake(Float32, N, shape.k, align=4),
        Float32(1.0),
        Float32(0.0),
        stream(),
    )
    return Program(shape, config), arguments


def configs(shape: Shape) -> Iterator[Config]:
    for unroll in (1,) if shape.chosen else (4, 2, 8):
        yield Config(unroll)


KERNEL = Kernel("router", __file__, program, configs)


def launch(logits, bias, expert, gate, scale: float, eps: float) -> None:
    """Fill expert and gate, or gate alone where bias is None; see `program`."""
    shape = Shape(logits.shape[1], gate.shape[1], bias is None)
    KERNEL.launcher(shape)(logits, bias, expert, gate, scale, eps)
