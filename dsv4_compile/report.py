"""What the compiler did to each graph: where rules matched, where they nearly did, and what runs each op."""

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import fx

from .graph import where
from .instances import module_path
from .match import Match, NearMiss

NEAR = 0.5  # how much of a pattern must be found for a miss to be worth telling
SHOWN = 12


@dataclass(frozen=True)
class Site:
    """One match: the rule, the op that took its place, the model's source line, and the module. `id` names it in the option
    `sites`; in a body that several layers share, module and id are those of the first. `absorbs`: earlier rewrites whose
    ops are part of the match."""

    rule: str
    fusion: str
    op: str
    where: str
    layer: str = ""
    id: str = ""
    absorbs: tuple[str, ...] = ()


@dataclass
class GraphReport:
    """One captured graph: the outer one, or the body of a region that it calls `calls` times."""

    sites: list[Site] = field(default_factory=list)
    misses: list[NearMiss] = field(default_factory=list)
    runs: Counter[tuple[str, str]] = field(default_factory=Counter)  # (op, implementation or why it was inlined)
    nodes_before: int = 0
    nodes_after: int = 0
    seconds: float = 0.0
    calls: int = 1
    bodies: Counter[int] = field(default_factory=Counter)  # index of a body -> calls of it from this graph

    def matched(self, match: Match) -> None:
        rule = match.rule
        site = Site(rule.qualified, rule.name, rule.op.name, where(match.anchor), module_path(match.anchor))
        self.sites.append(replace(site, id=match.site, absorbs=match.absorbs))

    def finish(self, graph: fx.Graph) -> None:
        """Keep the near misses that stayed misses: whose anchor was not taken by another rule after all."""
        alive = set(graph.nodes)
        kept = [m for m in self.misses if m.progress >= NEAR and m.node in alive]
        self.misses = [replace(m, node=None) for m in kept]  # a report must not keep the graph
        self.nodes_after = len(alive)


@dataclass
class Report:
    """What happened in one compile. `counts` and `sites` speak of fusions by their short names: attention moe router
    compressor mhc.

    counts: matches, each body's as often as the body is called. sites: how many the model has (`explain` only; empty
    for a model that is not known). misses: places where a rule nearly matched.
    """

    graphs: list[GraphReport] = field(default_factory=list)
    sites: Mapping[str, int] = field(default_factory=dict)
    fusions: tuple[str, ...] = ()
    skipped: str = ""  # why there were no rewrites at all

    @property
    def counts(self) -> Counter[str]:
        """Matches of each fusion in the model: fuse.* by short name."""
        return Counter({n.removeprefix("fuse."): c for n, c in self.rules.items() if n.startswith("fuse.")})

    @property
    def rules(self) -> Counter[str]:
        """Matches of each pass name, raise.* and fuse.*."""
        counts = Counter(dict.fromkeys(self.fusions, 0))
        for graph in self.graphs:
            for site in graph.sites:
                counts[site.fusion] += graph.calls
        return counts

    @property
    def misses(self) -> list[NearMiss]:
        return list(dict.fromkeys(m for g in self.graphs for m in g.misses))

    @property
    def runs(self) -> Counter[tuple[str, str]]:
        """Calls of each op by who runs it: (op, implementation) or (op, "inlined: why")."""
        total: Counter[tuple[str, str]] = Counter()
        for graph in self.graphs:
            for key, count in graph.runs.items():
                total[key] += count * graph.calls
        return total

    @property
    def seconds(self) -> float:
        """Time spent in our passes."""
        return sum(g.seconds for g in self.graphs)

    def settle(self) -> None:
        """Work out how often each graph runs: bodies are reported before the graphs that call them."""
        called = {i for g in self.graphs for i in g.bodies}
        for i, graph in enumerate(self.graphs):
            graph.calls = 0 if i in called else 1
        for graph in reversed(self.graphs):
            for body, count in graph.bodies.items():
                self.graphs[body].calls += count * graph.calls

    def merge(self, other: "Report") -> None:
        """Add what happened in another graph of the same model."""
        shift = len(self.graphs)
        for graph in other.graphs:
            graph.bodies = Counter({i + shift: n for i, n in graph.bodies.items()})
        self.graphs.extend(other.graphs)
        self.fusions = self.fusions or other.fusions
        self.skipped = self.skipped or other.skipped

    def __str__(self) -> str:
        if self.skipped:
            return f"dsv4: no rewrites: {self.skipped}"
        if not self.graphs:
            return "dsv4: graph loaded from cache, passes not run; DSV4_EXPLAIN=1 bypasses the cache"
        return "\n".join(self._lines())

    def _lines(self) -> list[str]:
        nodes = f"{sum(g.nodes_before for g in self.graphs)} -> {sum(g.nodes_after for g in self.graphs)} nodes"
        lines = [f"dsv4: {len(self.graphs)} graphs, {nodes}, {self.seconds:.2f} s", ""]
        lines += _table(["fusion", "found", "in the model"], self._rows())
        lines += [
            "",
            *_table(["op", "calls", "run by"], [[o, str(c), how] for (o, how), c in sorted(self.runs.items())]),
        ]
        places = Counter((s.rule, s.where) for g in self.graphs for s in g.sites for _ in range(g.calls))
        lines += ["", *_table(["rule", "times", "at"], [[r, str(c), w] for (r, w), c in sorted(places.items())])]
        if self.misses:
            lines += ["", f"near misses ({min(SHOWN, len(self.misses))} of {len(self.misses)})"]
            lines += [f"  {m}" for m in sorted(self.misses, key=lambda m: -m.progress)[:SHOWN]]
        return lines

    def _rows(self) -> list[list[str]]:
        expected = {f"fuse.{name}": str(n) for name, n in self.sites.items()}
        names = sorted({*self.rules, *expected})
        return [[name, str(self.rules[name]), expected.get(name, "")] for name in names]


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in [header, *rows]]


HISTORY: deque[Report] = deque(maxlen=64)


def reports() -> list[Report]:
    """Reports of the latest compiles in this process, oldest first: one for each graph that Dynamo handed over."""
    return list(HISTORY)
