"""A report as text: fusions, then each kind of layer with its ops, who runs them and what they cost, then near misses."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from .report import GraphReport, Ran, Report
from .unclaimed import REASONS, Left, summed

SHOWN = 12
AROUND = "around the layers"
LINES = 4  # of the model that are told of one reason
P = TypeVar("P", Ran, Left)
_LAYER = re.compile(r"^(.*?\.\d+)(?:\.|$)")


@dataclass(frozen=True)
class Row:
    """`times` equal calls of an op in one layer. flops, moved (bytes) and seconds (the least time) are those of all; None
    where the op declares no cost."""

    op: str
    times: int
    by: str
    rule: str
    where: str
    sizes: tuple[tuple[str, float], ...]
    flops: float | None
    moved: float | None
    seconds: float | None
    bound: str


@dataclass(frozen=True)
class Kind:
    """Layers that were compiled to the same ops. `left`: what no rewrite took in the first of them."""

    name: str
    layers: tuple[str, ...]
    rows: tuple[Row, ...]
    left: tuple[Left, ...] = ()

    @property
    def seconds(self) -> float:
        """The least time of one such layer's ops."""
        return sum(r.seconds or 0.0 for r in self.rows)


def kinds(report: Report) -> list[Kind]:
    """The model by kinds of layer, in the order of their first layers; what is in no layer comes last."""
    members: dict[tuple[Row, ...], list[str]] = {}
    left: dict[tuple[Row, ...], tuple[Left, ...]] = {}
    for graph in report.graphs:
        remains = _by_layer(graph, graph.left)
        for layer, ran in _by_layer(graph, graph.ran).items():
            layers = [layer_of(path) for path in graph.layers] or [layer]
            rows = _rows(report, graph, ran)
            members.setdefault(rows, []).extend(layers)
            left.setdefault(rows, tuple(remains.get(layer, ())))
    found = []
    for rows, layers in members.items():
        names = dict.fromkeys(report.kinds[layer] for layer in layers if layer in report.kinds)
        found.append(Kind(" / ".join(names) or layers[0], tuple(sorted(layers, key=_natural)), rows, left[rows]))
    return sorted(found, key=lambda k: _natural(k.layers[0]))


def layer_of(path: str) -> str:
    """`layers.3` of `layers.3.attn.indexer`."""
    found = _LAYER.match(path)
    return found[1] if found else AROUND


def text(report: Report) -> str:
    if report.skipped:
        return f"dsv4: no rewrites: {report.skipped}"
    if not report.graphs:
        return "dsv4: graph loaded from cache, passes not run; DSV4_EXPLAIN=1 bypasses the cache"
    return "\n".join(_lines(report))


def _lines(report: Report) -> list[str]:
    nodes = f"{sum(g.nodes_before for g in report.graphs)} -> {sum(g.nodes_after for g in report.graphs)} nodes"
    from_file = "; loaded from cache, this is the report of the compile that filled it" if report.stored else ""
    lines = [f"dsv4: {len(report.graphs)} graphs, {nodes}, {report.seconds:.2f} s{from_file}", ""]
    expected = {f"fuse.{name}": str(n) for name, n in report.sites.items()}
    names = sorted({*report.rules, *expected})
    lines += aligned(
        ["fusion", "found", "in the model"], [[n, str(report.rules[n]), expected.get(n, "")] for n in names]
    )
    found = kinds(report)
    for kind in found:
        lines += ["", *_kind(kind)]
    if found:
        total = sum(k.seconds * len(k.layers) for k in found)
        lines += [
            "",
            f"least time of these ops on {report.machine.name}: {total * 1e6:.1f} us (roofline; activations as bf16)",
        ]
    named = {part.reason for kind in found for part in kind.left}
    if named:
        reasons = [[name or "?", why] for name, why in REASONS.items() if name in named]
        lines += ["", *aligned(["left to Inductor", "because"], reasons)]
    if report.checks:
        lines += ["", f"verify: {len(report.checks)} rewrites tried, {len(report.mismatches)} left out as wrong"]
        lines += [f"  {c}" for c in report.checks if c.reason]
    for failed in dict.fromkeys(g.failed for g in report.graphs if g.failed):
        lines += ["", failed]
    if report.hint:
        lines += ["", report.hint]
    misses = report.misses
    if misses:
        lines += ["", f"near misses ({min(SHOWN, len(misses))} of {len(misses)})", *(f"  {m}" for m in misses[:SHOWN])]
    silent = set(report.missing) - {m.rule.split("/")[0].removeprefix("fuse.") for m in misses}
    for fusion in sorted(silent):
        have, want = report.missing[fusion]
        lines += [
            "",
            f"fuse.{fusion}: {want - have} of {want} places not found, and nothing in the graph is near its patterns",
        ]
    for name, diff in report.diffs:
        lines += ["", f"pass {name}", diff or "  nothing changed"]
    return lines


def _kind(kind: Kind) -> list[str]:
    many = f"{len(kind.layers)} layers: " if len(kind.layers) > 1 else ""
    title = kind.name if kind.layers == (kind.name,) else f"{kind.name} ({many}{_shortened(kind.layers)})"
    head = ["op", "times", "run by", "MFLOP", "KB", "us", "bound", "sizes", "rule", "at"]
    rows = []
    for r in kind.rows:
        cost = [_number(r.flops, 1e6), _number(r.moved, 1e3), _number(r.seconds, 1e-6), r.bound]
        sizes = " ".join(f"{k}={v:g}" for k, v in r.sizes)
        rows.append([r.op, str(r.times), r.by, *cost, sizes, r.rule, r.where])
    return [title, *("  " + line for line in [*aligned(head, rows), *_left(kind.left)])]


def _left(left: Sequence[Left]) -> list[str]:
    """What Inductor compiles besides."""
    rows = []
    for reason, ops, lines in summed(left):
        counts = ", ".join(f"{op.removeprefix('aten.')} {n}" for op, n in ops.items())
        at = ", ".join(lines[:LINES]) + (f" and {len(lines) - LINES} more" if len(lines) > LINES else "")
        rows.append([reason or "?", counts, at])
    return aligned(["left to Inductor", "ATen ops", "at"], rows) if rows else []


def aligned(header: list[str], rows: Sequence[list[str]]) -> list[str]:
    """Lines of a table."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in [header, *rows]]


def _by_layer(graph: GraphReport, of: Sequence[P]) -> dict[str, list[P]]:
    """What a graph did, by layer. A body is one layer, whoever calls it."""
    parts: dict[str, list[P]] = {}
    for part in of:
        parts.setdefault("" if graph.layers else layer_of(part.layer), []).append(part)
    return parts


def _rows(report: Report, graph: GraphReport, ran: list[Ran]) -> tuple[Row, ...]:
    rules: dict[tuple[str, str], str] = {(s.op, s.made): s.rule for s in graph.sites}
    same = Counter((r.op, r.by, r.where, tuple(r.sizes.items()), r.flops, r.moved) for r in ran)
    rows = []
    for (op, by, where, sizes, flops, moved), times in same.items():
        rule = rules.get((op, where), "")
        if flops is None or moved is None:
            rows.append(Row(op, times, by, rule, where, sizes, None, None, None, ""))
        else:
            least = report.machine.seconds(flops, moved) * times
            bound = report.machine.bound(flops, moved)
            rows.append(Row(op, times, by, rule, where, sizes, flops * times, moved * times, least, bound))
    return tuple(rows)


def _number(x: float | None, unit: float) -> str:
    return "" if x is None else f"{x / unit:.3g}"


def _shortened(layers: Sequence[str]) -> str:
    return ", ".join(layers) if len(layers) <= 6 else f"{', '.join(layers[:3])} ... {layers[-1]}"


def _natural(path: str) -> tuple[bool, list[tuple[int, str]]]:
    """Order of layers: by number where there is one."""
    return path == AROUND, [(int(p), "") if p.isdigit() else (-1, p) for p in path.split(".")]
