"""What a run measures: tokens a second, how far logits lie apart, bits per byte.

All calls have one of two shapes, a chunk of C tokens (padded, with `lengths`) or one token, both with a state of one
`max_len`: two graphs serve every prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .reference_model import DSV4, State

Forward = Callable[..., Tensor]
LN2 = math.log(2)


@dataclass(frozen=True)
class Sizes:
    """chunk: tokens of a prefill call. max_len: positions of every state."""

    chunk: int
    max_len: int

    @staticmethod
    def fit(need: int, context: int, chunk: int = 512, window: int = 2048) -> Sizes:
        """Room for `need` tokens, and for windows of held-out text, within the model's context."""
        max_len = min(context, max(need, window))
        return Sizes(min(chunk, max_len), max_len)


class Runner:
    """Feeds one sequence at a time to any forward of one model."""

    def __init__(self, model: DSV4, sizes: Sizes):
        self.model, self.sizes = model, sizes
        self.device = model.embed.weight.device

    def state(self) -> State:
        return self.model.new_state(1, self.sizes.max_len)

    def prefill(self, forward: Forward, tokens: Sequence[int], state: State) -> Tensor:
        """Append tokens to the state, chunk by chunk -> logits [T, V]."""
        logits = []
        for start in range(0, len(tokens), self.sizes.chunk):
            part = torch.tensor(tokens[start : start + self.sizes.chunk], dtype=torch.int64, device=self.device)
            padded = F.pad(part, (0, self.sizes.chunk - len(part))).unsqueeze(0)
            lengths = torch.tensor([len(part)], device=self.device)
            logits.append(forward(padded, state, lengths=lengths)[0, : len(part)])
        return torch.cat(logits)

    def decode(self, forward: Forward, token: int, state: State) -> Tensor:
        """Append one token -> logits [V] of the next."""
        return forward(torch.tensor([[token]], device=self.device), state)[0, -1]

    def seconds(self, work: Callable[[], object]) -> float:
        """Wall time of some work, the device's included."""
        self.wait()
        start = perf_counter()
        work()
        self.wait()
        return perf_counter() - start

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def prefill_rates(
    runner: Runner, forwards: dict[str, Forward], tokens: Sequence[int], rounds: int = 3
) -> dict[str, float]:
    """Tokens a second of one full chunk, by name; the contenders take turns, so that a busy machine is busy for all."""
    tokens = (list(tokens) * (runner.sizes.chunk // len(tokens) + 1))[: runner.sizes.chunk]
    seconds: dict[str, list[float]] = {name: [] for name in forwards}
    for _ in range(rounds):
        for name, forward in forwards.items():
            state = runner.state()
            seconds[name].append(runner.seconds(lambda f=forward, s=state: runner.prefill(f, tokens, s)))  # type: ignore[misc]
    return {name: len(tokens) / median(s) for name, s in seconds.items()}


@dataclass
class Decoding:
    """rates: tokens a second by name. error: largest difference to the logits of "eager", by name."""

    rates: dict[str, float]
    error: dict[str, float]


def decoding(
    runner: Runner,
    forwards: dict[str, Forward],
    prompt: Sequence[int],
    tokens: Sequence[int],
    tick: Callable[[], None],
    rounds: int = 4,
) -> Decoding:
    """Feed the same tokens after the same prompt to every forward, taking turns of len(tokens) / rounds steps.

    `forwards` must hold "eager". The prompt is read eagerly, so that all start from the same state.
    """
    turn = max(len(tokens) // rounds, 1)
    states = {name: runner.state() for name in forwards}
    for state in states.values():
        runner.prefill(forwards["eager"], prompt, state)
        tick()
    seconds: dict[str, list[float]] = {name: [] for name in forwards}
    error = dict.fromkeys(forwards, 0.0)
    for start in range(0, len(tokens), turn):
        part, logits = tokens[start : start + turn], {}
        for name, forward in forwards.items():
            out: list[Tensor] = []

            def steps(forward: Forward = forward, state: State = states[name], out: list[Tensor] = out) -> None:
                out.extend(runner.decode(forward, token, state) for token in part)  # noqa: B023 (called at once)

            seconds[name].append(runner.seconds(steps) / len(part))
            logits[name] = torch.stack(out)
            tick()
        for name in forwards:
            error[name] = max(error[name], distance(logits[name], logits["eager"]))
    return Decoding({name: 1 / median(s) for name, s in seconds.items()}, error)


def distance(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; NaN if either holds one."""
    return float((a.float() - b.float()).abs().max())


def windows(begin: Sequence[int], ids: Sequence[int], max_len: int) -> list[tuple[list[int], list[int]]]:
    """A text as independent (inputs, targets) of at most max_len tokens; each starts at bos, or at 0 without one."""
    parts = [list(ids[i : i + max_len]) for i in range(0, len(ids), max_len)]
    return [([*begin, 0][:1] + part[:-1], part) for part in parts]


@dataclass
class Reading:
    """bits_per_byte by name; error: largest difference to the logits of "eager", by name."""

    bits_per_byte: dict[str, float]
    error: dict[str, float]


def reading(
    runner: Runner,
    forwards: dict[str, Forward],
    parts: list[tuple[list[int], list[int]]],
    size: int,
    tick: Callable[[], None],
) -> Reading:
    """Bits per byte of a text of `size` bytes, cut into `windows` parts, under each forward; one must be "eager"."""
    nats = dict.fromkeys(forwards, 0.0)
    error = dict.fromkeys(forwards, 0.0)
    for inputs, targets in parts:
        aim = torch.tensor(targets, device=runner.device)
        logits = {}
        for name, forward in forwards.items():
            logits[name] = runner.prefill(forward, inputs, runner.state())
            nats[name] += float(F.cross_entropy(logits[name].float(), aim, reduction="sum"))
            tick()
        for name in forwards:
            error[name] = max(error[name], distance(logits[name], logits["eager"]))
    return Reading({name: n / LN2 / size for name, n in nats.items()}, error)
