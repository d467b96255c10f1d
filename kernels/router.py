"""The router: one block a token, one thread an expert. A warp then takes the best ones, one after the other."""

from collections.abc import Iterator
from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr

from dsv4_compile.kernel import Kernel, fake, stream
from dsv4_compile.kernels import warps as of_warp

LANES = 32
SMALLEST = -(2**31)
LARGEST = 2**31 - 1


@dataclass(frozen=True)
class Shape:
    """experts: at most 1024, unless they are `chosen` already. k: at most 32, one lane each."""

    experts: int
    k: int
    chosen: bool = False


@dataclass(frozen=True)
class Config:
    """There is one."""


def sqrt_softplus(x: Float32) -> Float32:
    """log1p keeps the small scores of very negative logits exact."""
    softplus = cute.arch.fmax(x, Float32(0.0)) + cute.math.log1p(cute.math.exp(-cute.math.absf(x)))
    return cute.math.sqrt(softplus)


def sortable(x: Float32) -> Int32:
    """Integers in the order of the floats: the magnitude bits of negative ones are flipped."""
    bits = cute.arch.inline_ptx("mov.b32 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[x])
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@cute.jit
def best(keys, lane, k: cutlass.Constexpr):
    """For lane i < k the place of the i-th largest key, the lowest among equals. keys [whole warps] are SMALLEST where there is
    none."""
    runs, found = const_expr(cute.size(keys) // LANES), Int32(0)
    mine = cute.make_rmem_tensor((runs,), Int32)
    for i in cutlass.range_constexpr(runs):
        mine[i] = keys[i * LANES + lane]
    for rank in cutlass.range(k, unroll=1):
        top, at = mine[0], lane
        for i in cutlass.range_constexpr(1, runs):
            better = mine[i] > top
            top = mine[i] if better else top
            at = lane + i * LANES if better else at
        largest = cute.arch.warp_redux_sync(top, "max")
        first = cute.arch.warp_redux_sync(at if top == largest else Int32(LARGEST), "min")
        found = first if lane == rank else found
        for i in cutlass.range_constexpr(runs):
            mine[i] = Int32(SMALLEST) if first == lane + i * LANES else mine[i]
    return found


@cute.jit
def choose(logits, bias, expert, keys, scores, thread, threads: cutlass.Constexpr, k: cutlass.Constexpr):
    """Of one token, by a block: lane i < k of each warp gets the i-th choice and its score; others get 0. logits and bias [X],
    keys and scores [whole warps] in shared memory; without bias, expert [k] says what the choices are."""
    lane, experts = thread % LANES, const_expr(cute.size(logits))
    choice, score = Int32(0), Float32(0.0)
    if const_expr(bias is None):
        if lane < k:
            choice, score = Int32(expert[lane]), Float32(float("nan"))
            if choice >= 0 and choice < experts:
                score = sqrt_softplus(logits[choice])
    else:
        for i in cutlass.range_constexpr(-(-cute.size(keys) // threads)):
            at = i * threads + thread
            if at < cute.size(keys):
                keys[at] = Int32(SMALLEST)
                if at < experts:
                    found = sqrt_softplus(logits[at])
                    keys[at] = sortable(found + bias[at])
                    scores[at] = found
        cute.arch.barrier()
        choice = best(keys, lane, k)
        if lane < k:
            score = scores[choice]
    return choice, score


@cute.jit
def share(score, lane, scale, eps):
    """Of lane i, the gate of the i-th choice."""
    return score / (cute.arch.warp_reduction_sum(score) + eps) * scale


def whole(experts: int) -> int:
    """Filled up to whole warps."""
    return -(-experts // LANES) * LANES


class Program:
    def __init__(self, shape: Shape, config: Config):
        self.experts, self.k, self.chosen = shape.experts, shape.k, shape.chosen
        self.threads = LANES if shape.chosen else whole(shape.experts)

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
        keys, scores = None, None
        if const_expr(not self.chosen):
            smem = cutlass.memory.SmemAllocator()
            keys = smem.allocate_tensor(Int32, cute.make_layout((self.threads,)), 16)
            scores = smem.allocate_tensor(Float32, cute.make_layout((self.threads,)), 16)
        of_warp.follow()
        row = cute.make_tensor(logits[token, None].iterator, cute.make_layout((self.experts,)))
        choice, score = choose(row, bias, expert[token, None], keys, scores, thread, self.threads, self.k)
        if thread < LANES:
            result = share(score, thread, scale, eps)
            if thread < self.k:
                gate[token, thread] = result
                if const_expr(not self.chosen):
                    expert[token, thread] = choice.to(Int64)


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
    yield Config()


KERNEL = Kernel("router", __file__, program, configs)


def launch(logits, bias, expert, gate, scale: float, eps: float) -> None:
    """Fill expert and gate, or gate alone where bias is None; see `program`."""
    shape = Shape(logits.shape[1], gate.shape[1], bias is None)
    KERNEL.launcher(shape)(logits, bias, expert, gate, scale, eps)
