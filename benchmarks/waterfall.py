"""A step launch by launch, each against its byte floor: the bytes that its op's cost says, at the read bandwidth.

Kernels of one stream may overlap, as one may start while the one before it ends; what a launch adds is the time from the
latest end before it to its own, and what all of them add is the time of the part. A part is a layer, or what comes before
the first one (embedding) and behind the last (norm, head, choice of the token). What a step computes once for several
layers, such as tables of RoPE, is in the layer where Inductor puts it. Marks between layers are left out.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from benchmarks.attribution import Call, Notes, attributed, body, short
from benchmarks.clock import Span
from benchmarks.layer_model import MARK

BEGIN, END = "begin", "end"


@dataclass(frozen=True)
class Launch:
    """start, end and adds: us, from the part's first start. op: whose it is, else the kernel's name. by: "dsv4", "inductor" or
    "torch". floor: us, of all launches of the op's call, at its first one; None for the others, and where no cost is known."""

    op: str
    kernel: str
    by: str
    start: float
    end: float
    adds: float
    floor: float | None


@dataclass(frozen=True)
class Part:
    """A layer, or the begin or end of the step. fits: launches could be told apart by op."""

    name: str
    launches: tuple[Launch, ...]
    fits: bool = True

    @property
    def us(self) -> float:
        return sum(x.adds for x in self.launches)

    @property
    def busy(self) -> float:
        return sum(x.end - x.start for x in self.launches)

    def as_dict(self) -> dict[str, Any]:
        about = dict(name=self.name, us=self.us, count=len(self.launches), fits=self.fits)
        return about | {"launches": [asdict(x) for x in self.launches]}


def typical(calls: Sequence[Sequence[Span]]) -> list[Span]:
    """One call from several equal ones: of each span the median start and end, counted from the call's first start."""
    if len({tuple(s.name for s in call) for call in calls}) > 1:
        calls = calls[:1]  # eager code may choose among kernels
    spans = []
    for same in zip(*calls, strict=True):
        starts, ends = (
            [getattr(s, at) - call[0].start for s, call in zip(same, calls, strict=True)] for at in ("start", "end")
        )
        spans.append(Span(same[0].name, median(starts), median(ends)))
    return spans


def split(spans: Sequence[Span]) -> list[Sequence[Span]]:
    """What lies before the first mark, between marks and behind the last. A mark is a copy and a kernel of its own."""
    marks = [i for i, span in enumerate(spans) if MARK in span.name]
    if not marks:
        return [spans]
    inner = [spans[before + 1 : after - 1] for before, after in pairwise(marks)]
    return [spans[: marks[0] - 1], *inner, spans[marks[-1] + 1 :]]


def parts_of(
    spans: Sequence[Span], names: Sequence[str], notes: Notes, bandwidth: float, scale: float = 1.0
) -> list[Part]:
    """A step's parts. names: of the layers. bandwidth: bytes a second. scale: of all times."""
    pieces, calls = split(spans), list(notes.parts)
    known = len(calls) == len(pieces)
    titles = [BEGIN, *names, END]
    assert len(pieces) == len(titles), f"{len(pieces) - 1} marks in a step of {len(names)} layers"
    found = []
    for i, (title, piece) in enumerate(zip(titles, pieces, strict=True)):
        found.append(part(title, piece, calls[i] if known else (), bandwidth, scale))
    return found


def part(title: str, spans: Sequence[Span], calls: Sequence[Call], bandwidth: float, scale: float = 1.0) -> Part:
    owners, launches, told = attributed(spans, calls), [], set[int]()
    latest = first = spans[0].start if spans else 0.0
    for i, span in enumerate(spans):
        call = None if owners is None else owners[i]
        floor = None
        if call is not None and call.moved is not None and id(call) not in told:
            floor = call.moved / bandwidth * 1e6
            told.add(id(call))
        by = "dsv4" if body(span.name) else "inductor" if span.name.startswith("triton_") else "torch"
        adds, latest = max(0.0, span.end - latest), max(latest, span.end)
        times = ((t - first) * scale for t in (span.start, span.end))
        launches.append(
            Launch(short(span.name) if call is None else call.op, short(span.name), by, *times, adds * scale, floor)
        )
    return Part(title, tuple(launches), owners is not None)


def text(parts: Sequence[Part], floors: dict[str, float]) -> str:
    """As lines. floors: us of what a layer must read, by its name."""
    lines = []
    for part in parts:
        whole = f"{part.name}: {part.us:.1f} us, {len(part.launches)} launches"
        if part.name in floors and part.us:
            whole += f", {floors[part.name]:.1f} us to read, {floors[part.name] / part.us:.2f} of the time"
        lines += [whole if part.fits else f"{whole}; launches and calls of ops do not fit together, no floors", HEAD]
        for x in part.launches:
            floor = "" if x.floor is None else f"{x.floor:.2f}"
            numbers = f"{x.start:9.2f}{x.end - x.start:9.2f}{x.adds:9.2f}{floor:>9}"
            lines.append(f"{numbers}  {x.op}" + (f" ({x.kernel})" if x.kernel != x.op else ""))
        lines.append("")
    return "\n".join(lines)


HEAD = f"{'start':>9}{'runs':>9}{'adds':>9}{'floor':>9}  op (kernel)"
