"""What a run measures: tokens a second, how far logits lie apart, bits per byte.

All calls have one of two shapes, a chunk of C tokens (padded, with `lengths`) or one token, both with a state of one
`max_len`: two graphs serve every prompt. Every call records its choices of experts and entries, or replays recorded ones:
logits are compared under the same choices, since a near tie that falls the other way says nothing about accuracy.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from ..reference_model import DSV4, Loop, Selection, State

Forward = Callable[..., Tensor]
LN2 = math.log(2)
WARM_STEPS = 4  # until a step is captured


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


def memory(model: DSV4, state: State) -> dict[str, float | None]:
    """MB of the model's tensors and of a state's; on a GPU also `beside`, what was allocated besides both at most
    since the count of it began anew."""
    weights = size(*model.parameters(), *model.buffers())
    kept = size(*state.tensors())
    most = torch.cuda.max_memory_allocated() if state.position.is_cuda else None
    found = dict(weights=weights, state=kept, beside=None if most is None else most - weights - kept)
    return {name: None if count is None else count / 1e6 for name, count in found.items()}


def size(*given: Tensor) -> int:
    """Bytes of the memory that tensors lie in, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in given}.values())


class Runner:
    """Feeds one sequence at a time to any forward of one model. `picks`: one selection a call; recorded where the list is
    empty, replayed where it is not."""

    def __init__(self, model: DSV4, sizes: Sizes):
        self.model, self.sizes = model, sizes
        self.device = model.embed.weight.device

    def state(self) -> State:
        return self.model.new_state(1, self.sizes.max_len)

    def prefill(
        self, forward: Forward, tokens: Sequence[int], state: State, picks: list[Selection] | None = None
    ) -> Tensor:
        """Append tokens to the state, chunk by chunk -> logits [T, V]."""
        chunk = self.sizes.chunk
        starts = range(0, len(tokens), chunk)
        logits = []
        for start, pick in zip(starts, self.picked(picks, len(starts)), strict=True):
            part = torch.tensor(tokens[start : start + chunk], dtype=torch.int64, device=self.device)
            padded = F.pad(part, (0, chunk - len(part))).unsqueeze(0)
            lengths = torch.tensor([len(part)], device=self.device)
            logits.append(forward(padded, state, lengths=lengths, selection=pick)[0, : len(part)])
        return torch.cat(logits)

    def decode(self, forward: Forward, token: int, state: State) -> Tensor:
        """Append one token -> logits [V] of the next."""
        return self.decode_all(forward, [token], state)[0]

    def decode_all(
        self, forward: Forward, tokens: Sequence[int], state: State, picks: list[Selection] | None = None
    ) -> Tensor:
        """Append tokens one by one -> logits [T, V]."""
        pairs = zip(tokens, self.picked(picks, len(tokens)), strict=True)
        at = self.device
        return torch.stack([forward(torch.tensor([[t]], device=at), state, selection=s)[0, -1] for t, s in pairs])

    def picked(self, picks: list[Selection] | None, calls: int) -> list[Selection]:
        """The selections of so many calls; new ones are put into the list."""
        from ..reference_model import Selection

        picks = [] if picks is None else picks
        if not picks:
            picks.extend(Selection() for _ in range(calls))
        return picks

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


def with_plain_scales(model: DSV4) -> DSV4:
    """A model that shares everything with `model` but its e8m0 scales, which are the same numbers in fp32: Inductor alone
    cannot call region bodies with e8m0 (graphs/regions.py)."""
    e8m0 = torch.float8_e8m0fnu
    other = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
    for module in other.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if p.dtype == e8m0:
                setattr(module, name, torch.nn.Parameter(p.float(), requires_grad=False))
    return other


def choose(loop: Loop, logits: Tensor) -> None:
    """The loop's next token, from logits [V]."""
    from ..reference_model import draw

    token = draw(logits.unsqueeze(0), loop.temperature, loop.seed, loop.state.position)
    loop.token.copy_(token.unsqueeze(1))


def step(runner: Runner, forward: Forward, model: DSV4, loop: Loop) -> None:
    """`decode_step` around a forward."""
    choose(loop, runner.decode(forward, int(loop.token), loop.state))


def prefill_rates(
    runner: Runner, forwards: dict[str, Forward], tokens: Sequence[int], rounds: int = 3
) -> dict[str, float]:
    """Tokens a second of one full chunk, by name; the contenders take turns, so that a busy machine is busy for all."""
    tokens = (list(tokens) * (runner.sizes.chunk // len(tokens) + 1))[: runner.sizes.chunk]
    seconds: dict[str, list[float]] = {name: [] for name in forwards}
    for _ in range(rounds):
        for name, forward in forwards.items():
            state = runner.state()
            seconds[name].append(runner.seconds(partial(runner.prefill, forward, tokens, state)))
    return {name: len(tokens) / median(s) for name, s in seconds.items()}


@dataclass
class Decoding:
    """By name: rates, tokens a second; error, of each against "eager" under its choices, the largest; median and tail, of all
    such differences the median and the 99th percentile."""

    rates: dict[str, float]
    error: dict[str, float]
    median: dict[str, float]
    tail: dict[str, float]


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
    states, shadows = ({name: runner.state() for name in forwards} for _ in range(2))
    for state in (*states.values(), *shadows.values()):
        runner.prefill(forwards["eager"], prompt, state)
        tick()
    seconds: dict[str, list[float]] = {name: [] for name in forwards}
    apart: dict[str, list[Tensor]] = {name: [] for name in forwards}
    for start in range(0, len(tokens), turn):
        part = tokens[start : start + turn]
        for name, forward in forwards.items():
            picks: list[Selection] = []
            out: list[Tensor] = []

            def steps(forward: Forward = forward, state: State = states[name], out=out, picks=picks) -> None:
                out.append(runner.decode_all(forward, part, state, picks))  # noqa: B023 (called at once)

            seconds[name].append(runner.seconds(steps) / len(part))
            want = runner.decode_all(forwards["eager"], part, shadows[name], picks)
            apart[name].append((out[0].float() - want.float()).abs().flatten().cpu())
            tick()
    rates = {name: 1 / median(s) for name, s in seconds.items()}
    every = {name: torch.cat(parts).sort().values for name, parts in apart.items()}  # NaN sorts last
    return Decoding(
        rates, *({name: float(x[int(q * (len(x) - 1))]) for name, x in every.items()} for q in (1, 0.5, 0.99))
    )


def free_running(
    runner: Runner,
    steps: dict[str, Callable[[DSV4, Loop], object]],
    prompt: Sequence[int],
    count: int,
    tick: Callable[[], None],
    rounds: int = 4,
) -> dict[str, float]:
    """Tokens a second of decode loops that nobody waits for, by name, and of the eager one; they take turns."""
    from ..reference_model import Loop, decode_step

    steps = steps | {"eager": decode_step}
    loops = {}
    for name, step in steps.items():
        loops[name] = Loop.start(runner.state(), prompt[-1])
        runner.prefill(runner.model, prompt[:-1], loops[name].state)
        for _ in range(WARM_STEPS):
            step(runner.model, loops[name])
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    turn = max((count - WARM_STEPS) // rounds, 1)
    for _ in range(rounds):
        for name, step in steps.items():
            few = turn if name != "eager" else max(turn // 8, 1)  # it is slow, and no less steady

            def steps_of_one(step=step, loop=loops[name], few=few) -> None:
                for _ in range(few):
                    step(runner.model, loop)

            seconds[name].append(runner.seconds(steps_of_one) / few)
            tick()
    return {name: 1 / median(s) for name, s in seconds.items()}


def distance(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; NaN if either holds one."""
    return float((a.float() - b.float()).abs().max())


def windows(begin: Sequence[int], ids: Sequence[int], max_len: int) -> list[tuple[list[int], list[int]]]:
    """A text as independent (inputs, targets) of at most max_len tokens; each starts at bos, or at 0 without one."""
    parts = [list(ids[i : i + max_len]) for i in range(0, len(ids), max_len)]
    return [([*begin, 0][:1] + part[:-1], part) for part in parts]


@dataclass
class Reading:
    """By name: bits_per_byte; error, of each against "eager" under its choices; changed, the share of tokens and layers
    in which it chose other experts than "eager" did."""

    bits_per_byte: dict[str, float]
    error: dict[str, float]
    changed: dict[str, float]


def reading(
    runner: Runner,
    forwards: dict[str, Forward],
    parts: list[tuple[list[int], list[int]]],
    size: int,
    tick: Callable[[], None],
) -> Reading:
    """Bits per byte of a text of `size` bytes, cut into `windows` parts, under each forward; one must be "eager"."""
    nats, error, changed = (dict.fromkeys(forwards, 0.0) for _ in range(3))
    for inputs, targets in parts:
        aim = torch.tensor(targets, device=runner.device)
        picks: dict[str, list[Selection]] = {name: [] for name in forwards}
        for name, forward in forwards.items():
            logits = runner.prefill(forward, inputs, runner.state(), picks[name])
            nats[name] += float(F.cross_entropy(logits.float(), aim, reduction="sum"))
            if name != "eager":
                want = runner.prefill(forwards["eager"], inputs, runner.state(), picks[name])
                error[name] = max(error[name], distance(logits, want))
            tick()
        for name in forwards:
            share = len(inputs) / sum(len(i) for i, _ in parts)
            changed[name] += share * differing(picks[name], picks["eager"], len(inputs))
    return Reading({name: n / LN2 / size for name, n in nats.items()}, error, changed)


def differing(ours: Sequence[Selection], theirs: Sequence[Selection], count: int) -> float:
    """The share of the first `count` tokens, over all layers, whose experts differ as sets."""

    def experts(calls: Sequence[Selection]) -> list[Tensor]:  # a layer [count, k]
        layers = zip(*(c.experts for c in calls), strict=True)
        return [torch.cat(parts)[:count].sort(-1).values for parts in layers]

    other = [(a != b).any(-1) for a, b in zip(experts(ours), experts(theirs), strict=True)]
    return float(torch.cat(other).float().mean())
