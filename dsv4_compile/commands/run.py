"""The job behind `dsv4 run`: load, compile, stream text, and measure compiled against eager in the same process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import Config
from ..reporting import sites
from ..reporting.report import reports
from . import inputs, measure
from .first_token import Mark
from .ring import Ring
from .screen import Screen
from .text import special, text_of

if TYPE_CHECKING:
    from ..reference_model import DSV4, Loop, State

Step = Callable[["DSV4", "Loop"], object]
TEXT_BYTES = 8192  # held-out text that accuracy is measured on
TIMED_STEPS = 32
FEW = 64  # tokens of a prompt that decode may read one by one

# Fields of `Ask` that are options of the backend.
BACKEND = ("passes", "disable", "lowerings", "mode", "strict", "verify", "cache_dir", "inner")


@dataclass(frozen=True)
class Ask:
    """What the user asked for; names and meanings are those of the command line."""

    model: Path | None = None
    prompt: str = "def "
    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0
    device: str | None = None
    dtype: str | None = None
    passes: str | None = None
    disable: str | None = None
    lowerings: str | None = None
    mode: str | None = None
    strict: bool | None = None
    verify: bool | None = None
    cache_dir: str | None = None
    inner: str | None = None
    compare: str | None = None


def run(ask: Ask, screen: Screen) -> dict[str, Any]:
    """Do the job, showing it on the screen; returns the content of `--report`. Raises InputError."""
    start = perf_counter()
    device = inputs.read_device(ask.device)
    dtype = inputs.read_dtype(ask.dtype, device)
    given = {name: getattr(ask, name) for name in BACKEND}
    if device.type == "cuda" and "DSV4_MODE" not in os.environ:
        given["mode"] = ask.mode or "decode"
    options, config = inputs.backend_options(given, device)
    if ask.compare not in (None, "inductor"):
        raise inputs.InputError(f"--compare {ask.compare}: expected inductor")
    if ask.temperature < 0:
        raise inputs.InputError(f"--temperature {ask.temperature}: expected 0 (greedy) or more")
    with torch.inference_mode():
        job = Job(ask, screen, start)
        job.load(device, dtype)
        job.prepare(options, config)
        job.generate()
        return job.compare()


class Job:
    """One run. Decode is compiled in full; prefill is rewritten and run op by op (inner="eager"), which spares its user the
    wait for generated code. The first token comes from prefill, or on a warm start from decode, whose graph is in torch's
    caches, with the prompt fed one token at a time. On a GPU a step is one CUDA graph of forward, choice of the next token
    and its writing; text is shown one step late, while the next is under way."""

    def __init__(self, ask: Ask, screen: Screen, start: float):
        self.ask, self.screen, self.start = ask, screen, start
        self.compile_s = self.first_token_s = 0.0
        self.recompiles = 0

    def load(self, device: torch.device, dtype: torch.dtype | None) -> None:
        """Model, tokenizer and prompt."""
        with self.screen.step("loading") as step:
            self.model, folder = inputs.load_model(self.ask.model, device, dtype, step.at)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # what loading took for a while is not what running takes
        config = self.model.config
        self.text = text_of(folder, config)
        self.begin = list(special(config.bos_token_id)[:1])
        self.prompt = [*self.begin, *self.text.encode(self.ask.prompt)]
        if not self.prompt:
            raise inputs.InputError("--prompt is empty and the model has no bos token to start from: give some text")
        inputs.check_fits(len(self.prompt), self.ask.max_new_tokens, config.max_position_embeddings)
        need = len(self.prompt) + self.ask.max_new_tokens
        self.runner = measure.Runner(self.model, measure.Sizes.fit(need, config.max_position_embeddings))

    def prepare(self, options: dict[str, Any], config: Config) -> None:
        """What will be compiled; nothing is yet."""
        weights = [(name, p.dtype, tuple(p.shape)) for name, p in self.model.named_parameters()]
        self.mark = Mark(config, self.model.config, weights, self.runner.device.type, self.runner.sizes)
        self.warm = len(self.prompt) <= FEW and config.inner != "eager" and self.mark.is_set()
        self.decode = compiled(self.model, backend="dsv4", options=options)
        self.prefill = compiled(self.model, backend="dsv4", options=options | {"inner": "eager", "capture": False})
        self.full = compiled(
            self.model, backend="dsv4", options=options | {"capture": False}
        )  # prefill, if it is timed
        self.step = self.step_of(self.decode, backend="dsv4", options=options)

    def step_of(self, decode: measure.Forward, **how: Any) -> Step:
        """A decode step: on a GPU all of it compiled, elsewhere around a compiled forward, of which there is one then."""
        from ..reference_model import decode_step

        if self.runner.device.type == "cuda":
            return compiled(decode_step, **how)
        return partial(measure.step, self.runner, decode)

    def generate(self) -> None:
        """Stream the continuation of the prompt."""
        from ..reference_model import Loop

        runner, ends, show = self.runner, special(self.model.config.eos_token_id), self.text.stream()
        loop = Loop.start(runner.state(), self.prompt[0], self.ask.temperature, self.ask.seed)
        if self.warm:
            self.read_step_by_step(loop)
        else:
            measure.choose(loop, self.compile_prefill(loop.state))
        token = int(loop.token)
        text = "" if token in ends else show(token)
        self.first_token_s = perf_counter() - self.start
        self.screen.note(
            f"first token after {self.first_token_s:.1f} s, from {'decode' if self.warm else 'prefill'}: {text!r}"
        )
        if self.warm:
            self.step(self.model, loop)
        else:
            with self.screen.step("compiling decode"):
                self.first_call(lambda: self.step(self.model, loop))
            self.tell_checks("decode")
            self.mark.set()
        graphs = graphs_compiled()
        self.screen.write(self.ask.prompt + text)
        if token not in ends:
            for token in self.tokens(loop, self.ask.max_new_tokens - 1):
                if token in ends:
                    break
                self.screen.write(show(token))
        self.screen.write("\n\n")
        self.recompiles = graphs_compiled() - graphs
        self.memory = measure.memory(self.model, loop.state)
        if self.warm:
            self.compile_prefill(runner.state())

    def tokens(self, loop: Loop, count: int) -> Iterator[int]:
        """The loop's token and those that follow, each while the next is worked on."""
        ring = Ring(self.runner.device)
        for n in range(count):
            if n == 0:
                ring.put(loop.token)
            if n + 1 < count:
                self.step(self.model, loop)
                ring.put(loop.token)
            yield ring.get()

    def read_step_by_step(self, loop: Loop) -> None:
        """The prompt through the decode graph."""
        with self.screen.step("compiling decode, in torch's caches"):
            self.first_call(lambda: self.step(self.model, loop))
        for token in self.prompt[1:]:
            loop.token.fill_(token)
            self.step(self.model, loop)

    def compile_prefill(self, state: State) -> Tensor:
        """The prompt through the prefill graph -> logits [V] of the next token. The graph passes by the caches, so its
        report is always there."""
        with self.screen.step("compiling prefill, to run op by op"):
            logits = self.first_call(lambda: self.runner.prefill(self.prefill, self.prompt, state)[-1])
        self.counts = dict(reports()[-1].counts)
        self.tell_checks("prefill")
        return logits

    def tell_checks(self, phase: str) -> None:
        """What `verify` says of the graphs compiled last, if it was asked for."""
        report = reports()[-1]
        if report.checks:
            found = f"{len(report.checks)} rewrites tried, {len(report.mismatches)} left out as wrong"
            self.screen.note(f"verify, {phase}: {found}")

    def first_call(self, work: Callable[[], Any]) -> Any:
        """The result of a call that compiles; its time counts as compile time."""
        out: list[Any] = []
        self.compile_s += self.runner.seconds(lambda: out.append(work()))
        return out[0]

    def compare(self) -> dict[str, Any]:
        """Speed and accuracy of compiled against eager, and the speed of plain Inductor if that was asked for."""
        from ..reference_model import nano

        runner, length = self.runner, self.runner.sizes.max_len
        content = nano.heldout()[:TEXT_BYTES]
        ids = self.text.encode(content.decode("utf-8", "ignore"))
        prefill: dict[str, measure.Forward] = {"compiled": self.prefill, "eager": self.model}
        decode: dict[str, measure.Forward] = {"compiled": self.decode, "eager": self.model}
        parts = measure.windows(self.begin, ids, length)
        with self.screen.step(f"reading {len(content)} bytes of held-out text") as step:
            read = measure.reading(runner, prefill, parts, len(content), step.tick)
        steps = {"compiled": self.step}
        if self.ask.compare:
            prefill["inductor"] = decode["inductor"] = self.plain_inductor(ids)
            plain_step = self.step_of(decode["inductor"], backend="inductor")
            steps["inductor"] = lambda _, loop: plain_step(self.other, loop)
            prefill["compiled"] = self.full
            with self.screen.step("compiling prefill in full"):
                self.first_call(lambda: runner.prefill(self.full, ids[:1], runner.state()))
        with self.screen.step("timing prefill"):
            prefill_rates = measure.prefill_rates(runner, prefill, ids)
        with self.screen.step("timing decode") as step:
            cut = length // 4
            aside = ids[cut : cut + min(TIMED_STEPS, cut)]
            decoded = measure.decoding(runner, decode, ids[:cut], aside, step.tick)
            rates = decoded.rates
            if runner.device.type == "cuda":
                rates = measure.free_running(runner, steps, ids[:cut], length - cut - 1, step.tick)
        return {
            "sites": sites.expected(self.model),
            "counts": self.counts,
            "compile_s": self.compile_s,
            "first_token_s": self.first_token_s,
            "prefill_tok_s": by_contender(prefill_rates),
            "decode_tok_s": by_contender(rates),
            "max_logit_error": max(read.error["compiled"], decoded.error["compiled"]),
            "median_logit_error": decoded.median["compiled"],
            "p99_logit_error": decoded.tail["compiled"],
            "choices_changed": read.changed["compiled"],
            "bits_per_byte": read.bits_per_byte,
            "recompiles": self.recompiles,
            "memory_mb": self.memory,
        }

    def plain_inductor(self, ids: list[int]) -> measure.Forward:
        """torch.compile without us, already compiled for both shapes."""
        runner, self.other = self.runner, measure.with_plain_scales(self.model)
        forward = compiled(self.other, backend="inductor")
        with self.screen.step("compiling prefill with plain Inductor"):
            runner.prefill(forward, ids[: runner.sizes.chunk], runner.state())
        with self.screen.step("compiling decode with plain Inductor"):
            runner.decode(forward, ids[0], runner.state())
        return forward


def compiled(f: Callable[..., Any], **how: Any) -> Callable[..., Any]:
    return torch.compile(f, dynamic=False, fullgraph=True, **how)


def by_contender(rates: dict[str, float]) -> dict[str, float | None]:
    return {name: rates.get(name) for name in ("compiled", "eager", "inductor")}


def graphs_compiled() -> int:
    """Graphs that Dynamo has handed to any backend in this process."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]
