"""Choosing a kernel's configuration by timing the candidates on the GPU at hand, while a graph is compiled.

An op that a GPU implementation claimed is run on random inputs of its real shapes, strides and dtypes. Each kernel that it
launches is tried in each of its configurations, the others as they are: first the result is held against the op's meaning,
then replays of a captured graph are timed, on several copies of the inputs, so that they come from memory as in a model.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import tuning
from .cudagraph import recording
from .lowerings import Contract, InBytes, contract_of
from .op import Implementation, Op, hinted

if TYPE_CHECKING:
    from .kernel import Kernel

BUDGET = 30.0  # seconds for a kernel; candidates beyond it are not tried
QUICK, ROUNDS = 2, 7  # replays: a first look, and what is kept
HOPELESS = 1.3  # times the best so far: a first look is enough
NEAR = 0.02  # of the best: as good as it, so that the earlier candidate is taken
MOST_COPIES, BEYOND_L2, SHARED = (
    24,
    200 << 20,
    64 << 20,
)  # copies of the inputs, bytes of all, bytes of a tensor that all share
DRAWN = 1 << 22  # numbers that are drawn; longer tensors repeat them

Call = Callable[..., Any]
Timer = Callable[[Call, Sequence[tuple[Any, ...]], int], list[float]]


@dataclass(frozen=True)
class Trial:
    """What became of a candidate: microseconds of a call, or why it is not in the running."""

    config: Any
    us: float | None
    why: str = ""


@dataclass(frozen=True)
class Outcome:
    """choice: index of the winner. margin: how much longer the best of the others takes, as a share."""

    trials: list[Trial]
    choice: int
    margin: float
    seconds: float

    def record(self) -> dict[str, Any]:
        trials = [{"config": asdict(t.config), "us": t.us, "why": t.why} for t in self.trials]
        return {"choice": self.choice, "margin": self.margin, "seconds": self.seconds, "trials": trials}

    def __str__(self) -> str:
        first, best = self.trials[0], self.trials[self.choice]
        out = sum(t.us is None for t in self.trials)
        times = "nothing could be timed" if best.us is None else f"{best.us:.2f} us"
        default = "" if self.choice == 0 or first.us is None else f", the default {first.us:.2f} us"
        return f"{best.config}: {times}{default} ({len(self.trials)} candidates, {out} out, {self.seconds:.1f} s)"


def race(
    candidates: Sequence[Any],
    run: Callable[..., Any],
    inputs: Sequence[tuple[Any, ...]],
    wrong: Callable[[Any], str],
    timer: Timer,
    budget: float = BUDGET,
    clock: Callable[[], float] = perf_counter,
) -> Outcome:
    """Time `run(config, *inputs)` for each candidate. `wrong` says what is wrong with a result, or "". One that raises, or
    is wrong, is out; so are those whose turn comes after `budget` seconds, but never the first."""
    start, best = clock(), math.inf
    trials: list[Trial] = []
    for config in candidates:
        if trials and clock() - start > budget:
            trials.append(Trial(config, None, "no time was left"))
            continue
        call = partial(run, config)
        try:
            why = wrong(call(*inputs[0]))
            us = None if why else median(timer(call, inputs, QUICK)) * 1e6
            if us is not None and us <= HOPELESS * best:
                us = median(timer(call, inputs, ROUNDS)) * 1e6
        except Exception as error:  # a configuration that does not compile or start is a finding
            us, why = None, f"{type(error).__name__}: {error}"
        trials.append(Trial(config, us, why))
        best = min(best, math.inf if us is None else us)
    choice, margin = winner(trials)
    return Outcome(trials, choice, margin, clock() - start)


def winner(trials: Sequence[Trial]) -> tuple[int, float]:
    """The earliest candidate that is as good as the best, and by how much the best of the others is slower; the first one
    where none could be timed."""
    times = [math.inf if t.us is None else t.us for t in trials]
    best = min(times)
    if best == math.inf:
        return 0, 0.0
    choice = next(i for i, us in enumerate(times) if us <= best * (1 + NEAR))
    others = [us for i, us in enumerate(times) if i != choice and us < math.inf]
    return choice, min(others, default=times[choice]) / times[choice] - 1


# On a GPU


def captured(call: Call, inputs: Sequence[tuple[Any, ...]]) -> torch.cuda.CUDAGraph:
    """A graph of one call on each of the inputs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for given in inputs[:2]:
            call(*given)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with recording(graph, stream):
        for given in inputs:
            call(*given)
    return graph


def seconds(graph: torch.cuda.CUDAGraph) -> float:
    """Of one replay."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def replays(call: Call, inputs: Sequence[tuple[Any, ...]], rounds: int) -> list[float]:
    """Seconds of a call in `rounds` replays of a graph of one call on each of the inputs."""
    graph = captured(call, inputs)
    return [seconds(graph) / len(inputs) for _ in range(rounds + 1)][1:]


def tune(op: Op, implementation: Implementation, arguments: Mapping[str, Any], timer: Timer = replays) -> list[Outcome]:
    """Time what this call launches, unless the cache has a record of it; one line for each kernel that was timed. Nothing is
    done for kernels without a choice."""
    from . import kernel as base

    inputs = [tuple(copy.values()) for copy in copies(op, arguments)]
    with base.trying() as trial:
        implementation.run(*inputs[0])
    outcomes = []
    for kernel, shape, work in trial.seen:
        candidates = kernel.candidates(shape, work)
        record = kernel.record(shape, work)
        if len(candidates) < 2 or tuning.recorded(base.STORE, record) is not None:
            continue
        wrong = judge(contract_of(op.name), op.arguments(*inputs[0]), op.meaning(*inputs[0]))
        run = partial(forced, implementation.run, (kernel, shape, work))
        outcome = race(candidates, run, inputs, wrong, timer)
        base.STORE.save(record, json.dumps(outcome.record()).encode(), {"choice": str(outcome)})
        kernel.choices.clear()  # the next launch reads the record
        print(f"autotune: {kernel.name} {shape} {work}: {outcome}", file=sys.stderr, flush=True)
        outcomes.append(outcome)
    return outcomes


def forced(run: Call, launch: "tuple[Kernel, Any, tuple[int, ...]]", config: Any, *given: Any) -> Any:
    """The op with one of its kernels in this configuration."""
    from . import kernel as base

    with base.trying({launch: config}):
        return run(*given)


def judge(contract: Contract, arguments: Mapping[str, Any], want: Any) -> Callable[[Any], str]:
    """What is wrong with a result of these arguments, or ""."""
    from .accuracy.verify import distance, sizes_in

    sizes, allowed = sizes_in(arguments), contract.allowed(narrowest([*arguments.values()]))

    def differs(got: Any) -> str:
        pairs = zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]
        error = max(distance(contract, sizes, g, w) for g, w in pairs)
        return "" if error <= allowed else f"a wrong result: error {error:.1e}, allowed {allowed:.1e}"

    return differs


def narrowest(given: Sequence[Any]) -> torch.dtype:
    floats = [x.dtype for x in given if isinstance(x, Tensor) and x.dtype.is_floating_point and x.dtype.itemsize > 1]
    return min(floats, key=lambda d: d.itemsize, default=torch.float32)


def copies(op: Op, arguments: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Random arguments like these, several times: as many as a cache cannot hold. Index lists differ between them; the
    largest tensors, of which lists name parts, are the same."""
    g = torch.Generator().manual_seed(0)
    from .accuracy.verify import sizes_in

    sizes = sizes_in(arguments)
    draw = {name: partial(like, a, contract_of(op.name).draws.get(name), g, sizes) for name, a in arguments.items()}
    first = {name: draw[name]() if isinstance(a, Tensor) else hinted(a) for name, a in arguments.items()}
    yield first
    own = {n: x for n, x in first.items() if isinstance(x, Tensor) and x.numel() * x.element_size() <= SHARED}
    size = sum(x.numel() * x.element_size() for x in own.values())
    for _ in range(max(1, min(MOST_COPIES, BEYOND_L2 // max(1, size))) - 1):
        new = {
            n: x.clone() if x.dtype.is_floating_point or x.dtype == torch.uint8 else draw[n]() for n, x in own.items()
        }
        yield first | new


def like(fake: Tensor, draw: Any, g: torch.Generator, sizes: Mapping[str, tuple[int, ...]]) -> Tensor:
    """A random tensor of this dtype, shape, layout and device; of a long one, rows repeat."""
    shape = [hinted(s) for s in fake.shape]
    few = shape[:]
    while math.prod(few) > DRAWN and (axis := next((i for i, n in enumerate(few[:-1]) if n > 1), None)) is not None:
        few[axis] = max(1, few[axis] * DRAWN // math.prod(few))
    if fake.dtype == torch.uint8 and not isinstance(draw, InBytes):
        x = torch.randint(0, 256, few, generator=g, dtype=torch.uint8)
    elif draw is not None:
        x = draw.draw(tuple(few), g, sizes)
    elif fake.dtype.is_floating_point:
        x = torch.randn(few, generator=g)
    else:
        x = torch.zeros(few, dtype=torch.int64)
    x = x.float() if x.is_floating_point() and fake.dtype.itemsize == 1 else x
    x = x.to(fake.device, fake.dtype)
    out = torch.empty_strided(shape, [hinted(s) for s in fake.stride()], dtype=fake.dtype, device=fake.device)
    for axis, (n, have) in enumerate(zip(shape, few, strict=True)):
        if n != have:
            x = x.index_select(axis, torch.arange(n, device=x.device) % have)
    return out.copy_(x)
