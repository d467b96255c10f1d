"""Timing: replays of captured graphs, inputs that come from memory, and what the machine can do at most. Without a GPU the
same by the host's clock, to try things out.

Refused, with `Refused`: arms that change the inputs they share, and inputs that an L2 cache holds from call to call.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch

from dsv4_compile.autotune import captured
from dsv4_compile.autotune import seconds as replay

BEYOND_L2 = 200 << 20  # bytes of inputs that a graph goes through
MOST = 48  # copies of the inputs; where they are too small for it, the cache is swept between calls
SWEPT = 16  # copies then
FEW = 4  # copies of what is small beside large tensors
SHARED = 128 << 20  # bytes; larger tensors are in all copies, and alone are more than any cache holds
ROUNDS = 5
LONGEST = 0.4  # seconds for the rounds of an arm

Arm = Callable[..., Any]
Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Prepared:
    """An arm that has inputs and results in another form: `call` alone is timed. finish: of call's result and of what it was
    called with."""

    prepare: Arm
    call: Arm
    finish: Arm = lambda result, *given: result

    def __call__(self, *args: Any) -> Any:
        given = self.prepare(*args)
        return self.finish(self.call(*given), *given)


class Refused(RuntimeError):
    """A measurement that would say something else than it seems to."""


def on_gpu() -> bool:
    return torch.cuda.is_available()


def microseconds(
    arms: dict[str, Arm], inputs: Sequence[Inputs], rounds: int = ROUNDS, sweep: torch.Tensor | None = None
) -> dict[str, float]:
    """Median time of a call by arm; the arms take turns, forwards and backwards. `sweep`: memory that is overwritten before
    each call; its own time is taken off. An arm that runs out of memory beside those before it has no time. Raises Refused."""
    if on_gpu() and sweep is None and not beyond_l2(inputs):
        raise Refused(f"{distinct(inputs) / 1e6:.1f} MB of inputs stay in L2: more copies, or `sweep`, are needed")
    before, runs = fingerprint(inputs[0]), {}
    for name, f in arms.items():
        try:
            runs[name] = runner(f, inputs, sweep)
        except torch.OutOfMemoryError:
            continue
        if fingerprint(inputs[0]) != before:
            raise Refused(f"arm {name!r} changes its inputs: the next arm would not see the same ones")
    empty = runner(nothing, inputs, sweep) if sweep is not None else None
    times: dict[str, list[float]] = {name: [] for name in runs}
    least = {name: run() for name, run in runs.items()}
    many = {name: max(1, min(rounds, int(LONGEST / 2 / t))) for name, t in least.items()}
    for i in range(rounds):
        for name in (*runs, *reversed(runs)):
            if i < many[name]:
                times[name].append(runs[name]())
    own = median(empty() for _ in range(2 * rounds)) if empty is not None else 0.0
    return {name: max(0.0, median(t) - own) / len(inputs) * 1e6 for name, t in times.items()}


def nothing(*args: Any) -> None:
    """The arm that a sweep's own time is measured with."""


def runner(f: Arm, inputs: Sequence[Inputs], sweep: torch.Tensor | None) -> Callable[[], float]:
    """Call it to run `f` on all inputs: the seconds that took. Raises Refused."""
    if isinstance(f, Prepared):
        f, inputs = f.call, [f.prepare(*given) for given in inputs]
        if on_gpu() and sweep is None and not beyond_l2(inputs):
            raise Refused(f"{distinct(inputs) / 1e6:.1f} MB of inputs, laid out otherwise, stay in L2")
    if on_gpu():

        def swept(*given: Any) -> None:
            sweep.zero_()
            f(*given)

        graph, held = captured(f if sweep is None else swept, inputs), inputs
        return lambda: replay(graph) if held else 0.0  # what the graph reads stays

    def all_() -> float:
        start = perf_counter()
        for given in inputs:
            f(*given)
        return perf_counter() - start

    all_()
    return all_


def distinct(inputs: Sequence[Inputs]) -> int:
    """Bytes of the tensors, each counted once."""
    tensors = {t.data_ptr(): size(t) for given in inputs for t in given if isinstance(t, torch.Tensor)}
    return sum(tensors.values())


def beyond_l2(inputs: Sequence[Inputs]) -> bool:
    """Whether a pass over all inputs leaves nothing of the first in the cache."""
    return distinct(inputs) >= 2 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


def fingerprint(given: Inputs) -> tuple[int, ...]:
    """Of the tensors that copies do not share."""
    small = [t for t in given if isinstance(t, torch.Tensor) and size(t) <= SHARED]
    return tuple(int(t.contiguous().view(-1).view(torch.uint8).sum(dtype=torch.int64)) for t in small)


def size(x: Any) -> int:
    """Bytes of a tensor, or of a tuple of them."""
    if isinstance(x, (tuple, list)):
        return sum(map(size, x))
    return x.numel() * x.element_size() if isinstance(x, torch.Tensor) else 0


def rotated(args: Inputs, shared: int = SHARED) -> tuple[list[Inputs], torch.Tensor | None]:
    """Copies of the inputs, as many as L2 cannot hold; tensors larger than `shared` bytes are in all of them. And memory to
    sweep the cache with, where that would take too many copies."""
    own = sum(size(a) for a in args if size(a) <= shared)
    copy = lambda a: a.clone() if isinstance(a, torch.Tensor) and size(a) <= shared else a  # noqa: E731
    if not on_gpu():
        return [args, tuple(map(copy, args))], None
    many, sweep = max(2, BEYOND_L2 // max(1, own)), None
    if own < size(args):  # what is large comes from memory anyway
        many = min(many, FEW)
    elif many > MOST:
        many, sweep = SWEPT, torch.empty(BEYOND_L2, dtype=torch.uint8, device="cuda")
    return [args, *(tuple(map(copy, args)) for _ in range(many - 1))], sweep


def launches(f: Arm, args: Inputs) -> int | None:
    """What a call puts on the GPU: kernels, copies and fills."""
    if not on_gpu():
        return None
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    if isinstance(f, Prepared):
        f, args = f.call, f.prepare(*args)
    f(*args)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profile:
        f(*args)
        torch.cuda.synchronize()
    found = [e for e in profile.events() if e.device_type == DeviceType.CUDA and "##" not in e.name]
    return sum(not getattr(e, "is_user_annotation", False) for e in found)


@dataclass(frozen=True)
class Ceilings:
    """Of this machine, measured now. read: bytes a second that a sum reads. copy: bytes a second that a copy reads and
    writes. gemm, gemm_fp8: operations a second of a large product, bf16 and FP8 (0: not there). gap: seconds from one
    smallest kernel to the next one that depends on it, in a graph."""

    read: float
    copy: float
    gemm: float
    gemm_fp8: float
    gap: float

    def __str__(self) -> str:
        memory = f"reads {self.read / 1e12:.2f} TB/s, copies {self.copy / 1e12:.2f} TB/s"
        products = f"bf16 products {self.gemm / 1e12:.0f} TFLOP/s, FP8 {self.gemm_fp8 / 1e12:.0f}"
        return f"{memory}, {products}, kernel to kernel {self.gap * 1e6:.2f} us"

    def least(self, flops: float, moved: float) -> float:
        """Seconds that so many operations on so many bytes take at least."""
        return max(flops / self.gemm, moved / self.read)

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def best(f: Arm, inputs: Sequence[Inputs], rounds: int = 2 * ROUNDS) -> float:
    """Seconds of a call, the least of several replays."""
    run = runner(f, inputs, None)
    return min(run() for _ in range(rounds)) / len(inputs)


def ceilings() -> Ceilings:
    device, numbers, n = ("cuda", 1 << 29, 8192) if on_gpu() else ("cpu", 1 << 20, 128)
    source = torch.randn(numbers, device=device)
    target, a, b = torch.empty_like(source), *(torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    small, flops = torch.zeros(32, device=device), 2 * n**3
    return Ceilings(
        read=size(source) / best(torch.sum, [(source,)]),
        copy=2 * size(source) / best(torch.Tensor.copy_, [(target, source)]),
        gemm=flops / best(torch.mm, [(a, b)] * 4),
        gemm_fp8=flops / best(fp8_product, [(a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t())] * 4)
        if on_gpu() and torch.cuda.get_device_capability() >= (8, 9)
        else 0.0,
        gap=best(torch.Tensor.add_, [(small, 1.0)] * 200),
    )


def fp8_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    one = a.new_ones((), dtype=torch.float32)
    return torch._scaled_mm(a, b, one, one, out_dtype=torch.bfloat16)
