"""What the compiler did to each graph: where rules matched, where they nearly did, and what runs each op."""

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from ..accuracy.verify import Check
from ..graphs.graph import where
from ..graphs.instances import module_path
from ..match import Match, NearMiss
from ..op import Op
from .roofline import H200, Machine
from .unclaimed import Left

NEAR = 0.5  # how much of a pattern the exact search must find for a miss to be told
CLEAR = 0.6  # the same for a rough miss, in a model of which nothing is known
ROUGH = 3  # rough misses of one fusion that are told


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
    made: str = ""  # the line of the value that the op gives


@dataclass(frozen=True)
class Ran:
    """One op of the rewritten graph: who runs it, its module, the model's line, the sizes that its cost names, and that
    cost. flops and moved (bytes read and written) are None for an op that declares none. `apart`: it was put back as
    smaller ops, which stand beside it, and its cost is what theirs leave."""

    op: str
    by: str
    layer: str
    where: str
    sizes: Mapping[str, float] = field(default_factory=dict)
    flops: float | None = None
    moved: float | None = None
    apart: bool = False


@dataclass
class GraphReport:
    """One captured graph: the outer one, or the body of a region that it calls `calls` times, from the modules `layers`."""

    sites: list[Site] = field(default_factory=list)
    misses: list[NearMiss] = field(default_factory=list)
    ran: list[Ran] = field(default_factory=list)
    nodes_before: int = 0
    nodes_after: int = 0
    seconds: float = 0.0
    calls: int = 1
    checks: list[Check] = field(default_factory=list)  # with the option `verify`
    bodies: Counter[int] = field(default_factory=Counter)  # index of a body -> calls of it from this graph
    layers: list[str] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)  # what no rewrite took
    failed: str = ""  # why the graph was put back as it was
    undone: list[Site] = field(default_factory=list)  # rewrites that were made by then

    @property
    def runs(self) -> Counter[tuple[str, str]]:
        """(op, implementation or why it was inlined) -> calls."""
        return Counter((r.op, r.by) for r in self.ran)

    def matched(self, match: Match) -> None:
        rule = match.rule
        site = Site(rule.qualified, rule.name, rule.op.name, where(match.anchor), module_path(match.anchor))
        self.sites.append(replace(site, id=match.site, absorbs=match.absorbs, made=where(match.outputs[0])))

    def settled(
        self,
        op: Op,
        by: str,
        place: tuple[str, str],
        arguments: dict[str, Any],
        parts: Sequence[tuple[Op, dict[str, Any]]] = (),
    ) -> None:
        """Note who runs a call of `op` at (module, model line); `parts`: the ops that it was put back as."""
        sizes = op.bound_sizes(arguments)
        if sizes is None:
            self.ran.append(Ran(op.name, by, *place, apart=bool(parts)))
            return
        theirs = [cost(part, given) for part, given in parts]
        whole = cost(op, arguments)
        flops, moved = (max(0.0, x - sum(part[i] for part in theirs)) for i, x in enumerate(whole))
        self.ran.append(Ran(op.name, by, *place, sizes, flops, moved, apart=bool(parts)))

    def finish(self, graph: fx.Graph, nearer: Callable[[NearMiss], NearMiss | None]) -> None:
        """Keep the near misses that stayed misses: whose anchor was not taken by another rule after all. Those that the
        exact search left early are asked for again, by `nearer`."""
        alive = set(graph.nodes)
        left = [m for m in self.misses if m.node in alive]
        found = [m if m.progress >= NEAR else nearer(m) for m in left]
        self.misses = [replace(m, node=None) for m in found if m is not None]  # a report must not keep the graph
        self.nodes_after = len(alive)


def cost(op: Op, arguments: dict[str, Any]) -> tuple[float, float]:
    """Operations and bytes of one call; 0 for an op that declares none."""
    sizes = op.bound_sizes(arguments)
    if sizes is None or op.cost_of is None:
        return 0.0, 0.0
    found = op.cost_of(**sizes)
    return float(found.flops), float(found.read + found.write)


@dataclass
class Report:
    """What happened in one compile. `counts` and `sites` speak of fusions by their short names: attention moe router
    compressor mhc.

    counts: matches, each body's as often as the body is called. sites: how many the model has, told by its configuration
    or its modules; empty for a model that is not known. misses: places where a rule nearly matched. diffs: what a pass did
    to each graph, for the passes named in the option `diff`. machine: whose ceilings the least times are of.
    """

    graphs: list[GraphReport] = field(default_factory=list)
    sites: Mapping[str, int] = field(default_factory=dict)
    fusions: tuple[str, ...] = ()
    off: tuple[str, ...] = ()  # passes that were not to run
    hint: str = ""  # what keeps patterns from matching, and what to do
    skipped: str = ""  # why there were no rewrites at all
    stored: bool = False  # read from a file that an earlier compile wrote
    kinds: Mapping[str, str] = field(default_factory=dict)  # layer -> its kind
    diffs: list[tuple[str, str]] = field(default_factory=list)  # (pass, text)
    machine: Machine = H200

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
        """Near misses, the nearest first. In a model whose places are known, only those of fusions that lack some, and of
        idioms if any fusion does; elsewhere a rough miss must have most of its pattern."""
        told: dict[str, list[NearMiss]] = {}
        lacking = self.missing
        for miss in sorted(dict.fromkeys(m for g in self.graphs for m in g.misses), key=lambda m: -m.progress):
            fusion = miss.rule.split("/")[0].removeprefix("fuse.")
            wanted = miss.progress >= CLEAR or not miss.rough
            if self.sites:
                wanted = fusion in lacking or (bool(lacking) and fusion not in self.sites)
            of_fusion = told.setdefault(fusion, [])
            if wanted and (not miss.rough or sum(m.rough for m in of_fusion) < ROUGH):
                of_fusion.append(miss)
        return [m for first in (True, False) for f, ms in told.items() if (f in lacking) is first for m in ms]

    @property
    def missing(self) -> dict[str, tuple[int, int]]:
        """Fusions that ran and found less than the model has places for them: (found, expected)."""
        ran = {f: n for f, n in self.sites.items() if f"fuse.{f}" not in self.off}
        return {f: (self.counts[f], n) for f, n in ran.items() if self.counts[f] < n}

    @property
    def checks(self) -> list[Check]:
        """What `verify` tried, one rewrite of a graph or body each."""
        return [c for g in self.graphs for c in g.checks]

    @property
    def mismatches(self) -> list[Check]:
        """Rewrites that `verify` found to change the result; they were left out."""
        return [c for c in self.checks if c.failed]

    @property
    def runs(self) -> Counter[tuple[str, str]]:
        """Calls of each op by who runs it: (op, implementation) or (op, "inlined: why")."""
        total: Counter[tuple[str, str]] = Counter()
        for graph in self.graphs:
            for key, count in graph.runs.items():
                total[key] += count * graph.calls
        return total

    @property
    def unexplained(self) -> list[Left]:
        """What no rewrite took and the table of reasons does not know."""
        return [part for g in self.graphs for part in g.left if not part.reason]

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
        self.diffs.extend(other.diffs)
        self.fusions = self.fusions or other.fusions
        self.off = self.off or other.off
        self.skipped = self.skipped or other.skipped
        self.hint = self.hint or other.hint

    def __str__(self) -> str:
        from .table import text

        return text(self)


HISTORY: deque[Report] = deque(maxlen=64)


def reports() -> list[Report]:
    """Reports of the latest compiles in this process, oldest first: one for each graph that Dynamo handed over."""
    return list(HISTORY)
