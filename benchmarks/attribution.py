"""Which op each launch of a step belongs to: calls are noted while the step runs from Python, when its graph is captured, and
laid beside the kernels of a replay, which come in the same order.

A kernel of ours says in its name which program it is of: kernel_cutlass_<entry>_dsv4_compilekernels<module><Class>_object_at_.
A launch may be several kernels, of other entries or classes each. Where names and notes do not fit together, launches are
called by their kernels' names and have no floor.
"""

import importlib
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.clock import Span
from benchmarks.layer_model import AT_MARKS
from dsv4_compile.op import Implementation, Op

OURS = re.compile(r"kernel_cutlass_(\w+?)_dsv4_compilekernels(\w+?)_object_at_")


@dataclass
class Call:
    """Of an op by an implementation of ours. moved: bytes that it reads and writes, by its cost. modules: of kernels/, one for
    each launch."""

    op: str
    moved: float | None
    modules: list[str] = field(default_factory=list)


@dataclass
class Notes:
    """Calls of one run of a step: before the first mark, between marks, behind the last. captured: into a graph."""

    parts: list[list[Call]] = field(default_factory=lambda: [[]])
    captured: bool = False


class Recorder:
    """Keeps the notes of the latest run, or of the latest that was captured."""

    def __init__(self) -> None:
        self.kept, self.open, self.inside = Notes(), Notes(), 0

    def begin(self) -> None:
        """A step begins."""
        self.keep()
        self.open = Notes()

    def keep(self) -> None:
        ran = len(self.open.parts) > 1 or any(self.open.parts)
        if ran and self.open.captured >= self.kept.captured:
            self.kept = self.open

    @property
    def notes(self) -> Notes:
        self.keep()
        return self.kept

    def capturing(self) -> None:
        """What was noted before the capture was another run, to warm up."""
        if not self.open.captured and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            self.open = Notes(captured=True)

    def mark(self) -> None:
        self.capturing()
        self.open.parts.append([])

    def call(self, op: Op, arguments: dict[str, Any]) -> None:
        self.capturing()
        self.open.parts[-1].append(Call(op.name, moved(op, arguments)))

    def launch(self, file: str) -> None:
        if self.inside and self.open.parts[-1]:
            self.open.parts[-1][-1].modules.append(Path(file).stem)

    def wrapped(self, op: Op, found: Implementation) -> Implementation:
        """The implementation, noted when it runs; calls that it makes of other ops count as its own."""

        def noting(run: Any) -> Any:
            def noted(*args: Any) -> Any:
                if not self.inside:
                    self.call(op, dict(zip(op.signature.parameters, args, strict=True)))
                self.inside += 1
                try:
                    return run(*args)
                finally:
                    self.inside -= 1

            return noted

        return replace(found, run=noting(found.run), write=None if found.write is None else noting(found.write))


def moved(op: Op, arguments: dict[str, Any]) -> float | None:
    sizes = op.bound_sizes(arguments)
    if sizes is None or op.cost_of is None:
        return None
    cost = op.cost_of(**sizes)
    return float(cost.read + cost.write)


@contextmanager
def recording() -> Iterator[Recorder]:
    """Inside, calls of ops and launches of kernels are noted."""
    recorder, claim = Recorder(), Op.claim

    def claimed(op: Op, arguments: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        found, reasons = claim(op, arguments, *args, **kwargs)
        return None if found is None else recorder.wrapped(op, found), reasons

    with ExitStack() as changed:
        changed.enter_context(patch.object(Op, "claim", claimed))
        with suppress(ImportError):  # without CuTeDSL nothing is launched
            from dsv4_compile.kernel import Kernel

            launcher = Kernel.launcher

            def launched(kernel: Kernel, *args: Any, **kwargs: Any) -> Any:
                recorder.launch(kernel.file)
                return launcher(kernel, *args, **kwargs)

            changed.enter_context(patch.object(Kernel, "launcher", launched))
        AT_MARKS.append(recorder.mark)
        changed.callback(AT_MARKS.remove, recorder.mark)
        yield recorder


@cache
def classes(module: str) -> frozenset[str]:
    """How the programs of a module of kernels/ may be called in its kernels' names: by the module that made the class."""
    found = vars(importlib.import_module(f"dsv4_compile.kernels.{module}")).values()
    named = [c.__name__ for c in found if isinstance(c, type)]
    return frozenset(f"{place}{name}" for name in named for place in (module, "stream"))


def body(name: str) -> tuple[str, str] | None:
    """(entry, module and class) of a kernel of ours."""
    found = OURS.search(name)
    return None if found is None else (found[1], found[2])


def short(name: str) -> str:
    """A kernel's name without its types."""
    ours = body(name)
    if ours is not None:
        return ours[1] if ours[0] == "kernel" else f"{ours[1]}.{ours[0]}"
    return re.split(r"[<(]", name.removeprefix("void "))[0].split("::")[-1] or name


def attributed(spans: Sequence[Span], calls: Sequence[Call]) -> list[Call | None] | None:
    """For each span of a part the call that it belongs to, None for what others launch; or None if they do not fit."""
    launches = [(call, module) for call in calls for module in call.modules]
    bodies = [ours for span in spans if (ours := body(span.name)) is not None]

    @cache
    def places(i: int, at: int, seen: frozenset[tuple[str, str]]) -> tuple[int, ...] | None:
        """Which launches the kernels from i on are of, after the kernels `seen` of launch `at`."""
        if i == len(bodies):
            return () if at + 1 == len(launches) else None
        ours = bodies[i]
        for of, before in ((at, seen), (at + 1, frozenset[tuple[str, str]]())):  # one more of it, or the next begins
            if 0 <= of < len(launches) and ours not in before and ours[1] in classes(launches[of][1]):
                rest = places(i + 1, of, before | {ours})
                if rest is not None:
                    return of, *rest
        return None

    found = places(0, -1, frozenset())
    if found is None:
        return None
    of = iter(found)
    return [None if body(span.name) is None else launches[next(of)][0] for span in spans]
