"""How much faster each op is than the eager subgraph that it stands for.

    python benchmarks/ops.py [--threads N] [--rounds N]

nano is compiled without code generation, reads a chunk of its held-out text and decodes one token; every op call is
kept with its inputs. Then each call runs as the op and as its meaning in eager PyTorch, taking turns. The table sums
over all calls of a step.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dsv4_compile.lowerings import OPS
from dsv4_compile.op import Implementation, Op
from dsv4_compile.reference_model import load, nano

CHUNK, MAX_LEN = 512, 2048
Call = tuple[Any, ...]


def recording(op: Op, implementation: Implementation, kept: dict[Op, list[Call]]) -> Implementation:
    """The implementation, which also keeps a copy of what it is called with: state is written to later."""

    def run(*args: Any) -> Any:
        kept[op].append(tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args))
        return implementation.run(*args)

    return replace(implementation, run=run)


def record(device: str) -> dict[str, dict[Op, list[Call]]]:
    """By phase and op: the calls of one step of nano."""
    model = load(nano.CHECKPOINT, device=device, dtype=torch.float32)
    forward = torch.compile(model, backend="dsv4", options={"inner": "eager"}, dynamic=False, fullgraph=True)
    tokens = nano.encode(nano.heldout()[: CHUNK + 1]).unsqueeze(0).to(device)
    state, found = model.new_state(1, MAX_LEN), {}
    for name, part in {"prefill": tokens[:, :CHUNK], "decode": tokens[:, -1:]}.items():
        forward(part, model.new_state(1, MAX_LEN))  # compiles
        found[name] = kept = defaultdict[Op, list[Call]](list)
        plain = {op: op.implementations[:] for op in OPS}
        for op, implementations in plain.items():
            op.implementations[:] = [recording(op, i, kept) for i in implementations]
        forward(part, state)
        for op, implementations in plain.items():
            op.implementations[:] = implementations
    return found


def seconds(work: Callable[..., Any], calls: list[Call]) -> float:
    start = perf_counter()
    for call in calls:
        work(*call)
    return perf_counter() - start


@contextmanager
def plain() -> Iterator[None]:
    """No op has an implementation: one that is called within a meaning runs its own meaning."""
    kept = {op: op.implementations[:] for op in OPS}
    for op in OPS:
        op.implementations.clear()
    try:
        yield
    finally:
        for op, implementations in kept.items():
            op.implementations.extend(implementations)


def compare(op: Op, calls: list[Call], rounds: int) -> tuple[float, float]:
    """Median seconds of all calls as the op and as its meaning."""
    ours, eager = [], []
    for _ in range(rounds + 1):
        ours.append(seconds(op.target, calls))
        with plain():
            eager.append(seconds(op.meaning, calls))
    return median(ours[1:]), median(eager[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    ask = parser.parse_args()
    torch.set_num_threads(ask.threads)
    table = Table("op", "phase", "calls", "op, ms", "eager, ms", "eager / op")
    with torch.inference_mode():
        for phase, calls in record("cpu").items():
            for op in sorted(calls, key=lambda o: o.name):
                ours, eager = compare(op, calls[op], ask.rounds)
                numbers = f"{len(calls[op])}", f"{ours * 1e3:.3f}", f"{eager * 1e3:.3f}", f"{eager / ours:.2f}"
                table.add_row(op.name, phase, *numbers)
    Console().print(table)


if __name__ == "__main__":
    main()
