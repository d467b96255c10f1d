"""The job behind `dsv4 run`: load, compile, stream text, and measure compiled against eager in the same process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from . import inputs, measure
from .report import Report, reports
from .screen import Screen
from .text import special, text_of

TEXT_BYTES = 8192  # held-out text that accuracy is measured on
TIMED_STEPS = 32


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
    disable: str | None = None
    inner: str | None = None
    compare: str | None = None


def run(ask: Ask, screen: Screen) -> dict[str, Any]:
    """Do the job, showing it on the screen; returns the content of `--report`. Raises InputError."""
    start = perf_counter()
    device = inputs.read_device(ask.device)
    dtype = inputs.read_dtype(ask.dtype)
    options = inputs.backend_options(ask.disable, ask.inner, device)
    if ask.compare not in (None, "inductor"):
        raise inputs.InputError(f"--compare {ask.compare}: expected inductor")
    if ask.temperature < 0:
        raise inputs.InputError(f"--temperature {ask.temperature}: expected 0 (greedy) or more")
    with torch.inference_mode():
        job = Job(ask, screen, device, dtype, options, start)
        job.generate()
        return job.compare()


class Job:
    """One run. Prefill is compiled with inner="eager": captured, rewritten and run op by op, so that the first token
    does not wait for generated code; decode is compiled in full."""

    def __init__(
        self,
        ask: Ask,
        screen: Screen,
        device: torch.device,
        dtype: torch.dtype | None,
        options: dict[str, Any],
        start: float,
    ):
        self.ask, self.screen, self.start = ask, screen, start
        with screen.step("loading") as step:
            self.model, folder = inputs.load_model(ask.model, device, dtype, step.at)
        config = self.model.config
        self.text = text_of(folder, config)
        self.begin = list(special(config.bos_token_id)[:1])
        self.prompt = [*self.begin, *self.text.encode(ask.prompt)]
        inputs.check_fits(len(self.prompt), ask.max_new_tokens, config.max_position_embeddings)
        need = len(self.prompt) + ask.max_new_tokens
        self.runner = measure.Runner(self.model, measure.Sizes.fit(need, config.max_position_embeddings))
        self.prefill = torch.compile(
            self.model, backend="dsv4", options=options | {"inner": "eager"}, dynamic=False, fullgraph=True
        )
        self.decode = torch.compile(self.model, backend="dsv4", options=options, dynamic=False, fullgraph=True)
        self.report = Report()
        self.compile_s = self.first_token_s = 0.0
        self.recompiles = 0

    def generate(self) -> None:
        """Stream the continuation of the prompt. The first token comes from prefill, before decode is compiled."""
        from .reference_model import sample

        runner, ends, show = self.runner, special(self.model.config.eos_token_id), self.text.stream()
        generator = torch.Generator(runner.device).manual_seed(self.ask.seed)

        def choose(logits: Tensor) -> int:
            return int(sample(logits.unsqueeze(0), self.ask.temperature, generator=generator))

        state = runner.state()
        with self.screen.step("compiling prefill (graph rewritten, run op by op)"):
            logits = self.first_call(lambda: runner.prefill(self.prefill, self.prompt, state)[-1])
        self.report = reports()[-1]
        token = choose(logits)
        text = "" if token in ends else show(token)
        self.first_token_s = perf_counter() - self.start
        self.screen.note(f"first token after {self.first_token_s:.1f} s: {text!r}")
        with self.screen.step("compiling decode"):
            logits = self.first_call(lambda: runner.decode(self.decode, token, state))
        graphs = graphs_compiled()
        self.screen.write(self.ask.prompt + text)
        for _ in range(self.ask.max_new_tokens - 1):
            if token in ends or (token := choose(logits)) in ends:
                break
            self.screen.write(show(token))
            logits = runner.decode(self.decode, token, state)
        self.screen.write("\n\n")
        self.recompiles = graphs_compiled() - graphs

    def first_call(self, work: Callable[[], Tensor]) -> Tensor:
        """The result of a call that compiles; its time counts as compile time."""
        out: list[Tensor] = []
        self.compile_s += self.runner.seconds(lambda: out.append(work()))
        return out[0]

    def compare(self) -> dict[str, Any]:
        """Speed and accuracy of compiled against eager, and the speed of plain Inductor if that was asked for."""
        from .reference_model import nano

        runner, length = self.runner, self.runner.sizes.max_len
        content = nano.heldout()[:TEXT_BYTES]
        ids = self.text.encode(content.decode("utf-8", "ignore"))
        prefill: dict[str, measure.Forward] = {"compiled": self.prefill, "eager": self.model}
        decode: dict[str, measure.Forward] = {"compiled": self.decode, "eager": self.model}
        parts = measure.windows(self.begin, ids, length)
        with self.screen.step(f"reading {len(content)} bytes of held-out text") as step:
            read = measure.reading(runner, prefill, parts, len(content), step.tick)
        if self.ask.compare:
            prefill["inductor"] = decode["inductor"] = self.plain_inductor(ids)
        with self.screen.step("timing prefill"):
            prefill_rates = measure.prefill_rates(runner, prefill, ids)
        with self.screen.step("timing decode") as step:
            cut = length // 4
            steps = min(TIMED_STEPS, cut)
            decoded = measure.decoding(runner, decode, ids[:cut], ids[cut : cut + steps], step.tick)
        return {
            "sites": dict(self.report.sites),
            "counts": dict(self.report.counts),
            "compile_s": self.compile_s,
            "first_token_s": self.first_token_s,
            "prefill_tok_s": by_contender(prefill_rates),
            "decode_tok_s": by_contender(decoded.rates),
            "max_logit_error": max(read.error["compiled"], decoded.error["compiled"]),
            "bits_per_byte": read.bits_per_byte,
            "recompiles": self.recompiles,
        }

    def plain_inductor(self, ids: list[int]) -> measure.Forward:
        """torch.compile without us, already compiled for both shapes."""
        forward, runner = torch.compile(self.model, dynamic=False, fullgraph=True), self.runner
        with self.screen.step("compiling prefill with plain Inductor"):
            runner.prefill(forward, ids[: runner.sizes.chunk], runner.state())
        with self.screen.step("compiling decode with plain Inductor"):
            runner.decode(forward, ids[0], runner.state())
        return forward


def by_contender(rates: dict[str, float]) -> dict[str, float | None]:
    return {name: rates.get(name) for name in ("compiled", "eager", "inductor")}


def graphs_compiled() -> int:
    """Graphs that Dynamo has handed to any backend in this process."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]
