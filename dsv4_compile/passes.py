"""The pipeline, at Inductor's joint hook: canonicalise, raise and fuse, lower, inline back, verify."""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import groupby
from typing import Any

import torch
from torch import fx
from torch._guards import tracing
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node

from .accuracy.torch_bisect import left_out
from .accuracy.verify import Verifier
from .config import LOWER, Config
from .errors import BrokenGraph, DSV4Error, DSV4Warning, LoweringFailed, PassesFailed, RuleFailed, WrongRewrite
from .graphs.canonical import canonicalise
from .graphs.copies import aside, put_back
from .graphs.graph import contract, is_tensor, keeps, value, verify, where
from .graphs.instances import module_path, number, site_id
from .graphs.listing import difference, lines
from .graphs.near import align
from .graphs.regions import scales_as_bytes
from .graphs.rewrite import Examine, Refused, inline, rewrite, write_in_place
from .graphs.trace import pattern_of
from .graphs.unify import Pattern
from .identity import identity
from .match import Match, NearMiss, Rule
from .op import DEVICES, Implementation, Op
from .reporting.report import GraphReport, Report
from .reporting.unclaimed import unclaimed
from .tuning import SETTINGS

ROUGHLY = 0.55  # how much of a pattern must be there, differences passed over, for a place to be kept in mind


class Front:
    """The rules of one configuration on one device type, with their patterns: traced on first use, each rewritten by the
    rules before it, so that both sides of a match went through the same front end."""

    def __init__(self, rules: tuple[Rule, ...], device: str):
        self.rules, self.device = rules, device
        self.traced: dict[Rule, list[Pattern]] = {}

    def patterns(self, rule: Rule) -> Sequence[Pattern]:
        if rule not in self.traced:
            with unset_fake_temporarily(), tracing(None):  # patterns belong to no compile
                self.traced[rule] = [self.raised(s.trace(self.device), rule) for s in rule.spellings]
        return self.traced[rule]

    def raised(self, pattern: Pattern, rule: Rule) -> Pattern:
        for earlier in self.rules[: self.rules.index(rule)]:
            for anchor in anchors(pattern.graph, earlier):
                self.try_at(earlier, anchor, GraphReport())
        return pattern_of(pattern.graph, pattern.inputs, pattern.scalars, pattern.integers)

    def try_at(self, rule: Rule, anchor: Node, report: GraphReport, examine: Examine | None = None) -> None:
        """Rewrite at this anchor if the rule matches there; note the match or the near miss."""
        found = rule.attempt(rule, anchor, self.patterns)
        if isinstance(found, Match):
            found.site = site_id(rule.qualified, anchor)
            try:
                rewrite(anchor.graph, found, examine)
                report.matched(found)
            except Refused as reason:
                report.misses.append(rule.miss(anchor, "a block that can be replaced", str(reason), where(anchor)))
        elif found is not None:
            report.misses.append(found)

    def nearer(self, miss: NearMiss) -> NearMiss | None:
        """A miss that the exact search left early, measured again past its first difference; None if little is there."""
        rule = next((r for r in self.rules if r.qualified == miss.rule), None)
        if rule is None or miss.node is None or not rule.spellings or not rule.name.startswith("fuse."):
            return None
        starts = [(p, start) for p in self.patterns(rule) for start in p.anchors(rule.anchor)]
        best = max((align(p, start, miss.node) for p, start in starts), key=lambda a: a.share, default=None)
        if best is None or best.share < ROUGHLY:
            return None
        told = (best.expected, best.found, best.where) if best.expected else (miss.expected, miss.found, miss.where)
        return NearMiss(miss.rule, miss.anchor, *told, best.share, miss.node, rough=True)


@lru_cache(maxsize=64)
def front(rules: tuple[Rule, ...], device: str) -> Front:
    return Front(rules, device)


def anchors(graph: fx.Graph, rule: Rule) -> list[Node]:
    """Where a rule starts: the graph's calls of that op, whatever its overload, in order."""
    space, name = rule.anchor.split(".")
    packet = getattr(getattr(torch.ops, space), name, None)  # no op of a library that nobody has imported
    targets = [] if packet is None else [getattr(packet, overload) for overload in packet.overloads()]
    return sorted(n for t in targets for n in graph.find_nodes(op="call_function", target=t, sort=False))


def silent(rules: Sequence[Rule], config: Config) -> tuple[str, ...]:
    """Names of rules that cannot match: switched off, or built on an op that only such rules emit."""
    emitted, off = set(), []
    for name, group in groupby(rules, key=lambda rule: rule.name):
        alike = list(group)
        if config.enabled(name) and any(not r.anchor.startswith("dsv4.") or r.anchor in emitted for r in alike):
            emitted |= {f"dsv4.{r.op.name}" for r in alike}
        else:
            off.append(name)
    return tuple(off)


class PassManager(CustomGraphPass):
    """All of our passes as the one object that Inductor calls, for the graphs of one compile."""

    def __init__(self, config: Config, rules: tuple[Rule, ...], ops: tuple[Op, ...]):
        self.config = config
        SETTINGS.take(config.autotune, config.batch_invariant)
        self.rules = tuple(r for r in rules if config.enabled(r.name))
        self.ops = {op.target: op for op in ops}
        self.report = Report(fusions=tuple(dict.fromkeys(r.name for r in rules)), off=silent(rules, config))
        self.verifier = Verifier(self.ops, lambda op, arguments: self.claim(op, arguments)[0])
        self.seen: dict[fx.Graph, int] = {}  # graphs of this compile, by their place in the report
        self.pieces: dict[str, fx.Graph] | None = None  # meanings that were traced, to keep beyond one graph
        self.canonical = False  # whether graphs come in canonical form

    def uuid(self) -> str:
        """Identity for Inductor's caches: our sources and the configuration."""
        return identity(self.config)

    def __call__(self, graph: fx.Graph) -> None:
        """All passes, or under `strict` an error, or the graph as it was and a warning."""
        before = None if self.config.strict else aside(graph)
        report = GraphReport(nodes_before=len(graph.nodes))
        try:
            self.run(graph, report)
        except Exception as error:
            if before is None:
                raise
            put_back(graph, before)
            failure, nodes = PassesFailed(error), len(graph.nodes)
            left = GraphReport(nodes_before=nodes, nodes_after=nodes, failed=str(failure), undone=report.sites)
            self.record(graph, left)
            self.tell(failure, error)

    def run(self, graph: fx.Graph, report: GraphReport) -> None:
        start = time.perf_counter()
        promised = contract(graph)
        if not self.canonical:
            canonicalise(graph)
        number(graph)
        rules = front(self.rules, device_type(graph))
        for name, group in groupby(rules.rules, key=lambda rule: rule.name):
            with self.compared(graph, name):
                for rule in group:
                    self.apply(rules, rule, graph, report)
        report.finish(graph, rules.nearer)
        report.left = unclaimed(graph)
        with self.compared(graph, LOWER):
            self.lower(graph, report)
            graph.eliminate_dead_code()
        scales_as_bytes(graph)
        verify(graph, "the dsv4 passes")
        if not keeps(contract(graph), promised):
            raise BrokenGraph("the dsv4 passes", f"outputs were {promised}, are {contract(graph)}")
        report.nodes_after = len(graph.nodes)
        report.seconds = time.perf_counter() - start
        self.record(graph, report)

    def apply(self, rules: Front, rule: Rule, graph: fx.Graph, report: GraphReport) -> None:
        """One rule at all its anchors; under strict the graph is checked after a rule that changed it."""
        before = len(report.sites)
        for anchor in anchors(graph, rule):
            if not anchor._erased and self.config.selects(site_id(rule.qualified, anchor)):
                self.guarded(rules, rule, anchor, report)
        if self.config.strict and len(report.sites) > before:
            verify(graph, f"rule {rule.qualified} ({rule.source})")

    @contextmanager
    def compared(self, graph: fx.Graph, name: str) -> Iterator[None]:
        """Note what is done to the graph in between, if that was asked for."""
        if not self.config.compares(name):
            yield
            return
        before = lines(graph)
        yield
        self.report.diffs.append((name, difference(before, lines(graph), name)))

    def guarded(self, rules: Front, rule: Rule, anchor: Node, report: GraphReport) -> None:
        """One attempt; a rule that raises is an error if strict, else a warning. The graph is as it was either way."""
        place = where(anchor)
        try:
            rules.try_at(rule, anchor, report, partial(self.examine, report))
        except WrongRewrite:
            raise
        except Exception as error:
            self.tell(RuleFailed(rule.qualified, rule.source, place, error), error)

    def examine(
        self, report: GraphReport, match: Match, pairs: list[tuple[Node, Node]], is_new: Callable[[Node], bool]
    ) -> None:
        """Look at a rewrite that is about to be made; raises Refused if it must not be."""
        if left_out(lambda: f"{match.site} at {where(match.anchor)}"):
            raise Refused("left out by torch's bisector")
        if not self.config.verify:
            return
        check = self.verifier.check(match, pairs, is_new)
        report.checks.append(check)
        if check.failed:
            rule = match.rule
            wrong = WrongRewrite(rule.qualified, rule.source, check.where, check.layer, rule.op.name, check.reason)
            self.tell(wrong, Refused(check.reason))
            raise Refused(f"another result: {check.reason}")

    def tell(self, failure: DSV4Error, cause: Exception) -> None:
        if self.config.strict:
            raise failure from cause
        warnings.warn(str(failure), DSV4Warning, stacklevel=3)

    def lower(self, graph: fx.Graph, report: GraphReport) -> None:
        """Ask who can run each op; put back the meaning of those that nobody claims."""
        kept: set[Node] = set()
        pieces = {} if self.pieces is None else self.pieces
        while open_ := [n for n in graph.nodes if n.target in self.ops and n not in kept]:
            for node in open_:
                kept.add(node)
                try:
                    self.settle(graph, node, pieces, report)
                except Exception as error:
                    self.tell(LoweringFailed(self.ops[node.target].name, where(node), error), error)

    def settle(self, graph: fx.Graph, node: Node, pieces: dict[str, fx.Graph], report: GraphReport) -> None:
        """Leave the op to the implementation that claims it, or inline it; note which."""
        op, arguments = self.called(node)
        note = partial(report.settled, op, place=(module_path(node), where(node)), arguments=arguments)
        implementation, reasons = self.claim(op, arguments)
        if implementation is not None:
            note(by=implementation.name)
            self.tune(op, implementation, arguments)
            if implementation.in_place:
                write_in_place(graph, node, op)
            return
        parts = inline(graph, node, op, pieces)
        note(by=f"inlined: {'; '.join(reasons) or 'no implementation'}", parts=[self.called(n) for n in parts])

    def tune(self, op: Op, implementation: Implementation, arguments: dict[str, Any]) -> None:
        """Time the kernels of a call, if that was asked for."""
        if self.config.autotune != "full" or implementation.device != "cuda":
            return
        from .autotune import tune

        with unset_fake_temporarily(), tracing(None), torch.no_grad():
            tune(op, implementation, arguments)

    def called(self, node: Node) -> tuple[Op, dict[str, Any]]:
        """The op of a node, and its arguments as fake values."""
        op = self.ops[node.target]
        return op, {k: value(a) for k, a in op.arguments(*node.args, **node.kwargs).items()}

    def claim(self, op: Op, arguments: dict[str, Any]) -> tuple[Implementation | None, list[str]]:
        """Who runs an op under this configuration, and why others do not."""
        among = tuple(d for d in DEVICES if self.config.may_lower_to(d))
        return op.claim(arguments, among, if_worth=not self.config.forces_lowering)

    def record(self, graph: fx.Graph, report: GraphReport) -> None:
        """File the report; find the region bodies that this graph calls."""
        self.seen[graph] = len(self.report.graphs)
        self.report.graphs.append(report)
        for node in graph.find_nodes(op="get_attr"):
            body = getattr(getattr(graph.owning_module, node.target, None), "graph", None)
            if body in self.seen:
                report.bodies[self.seen[body]] += len(node.users)
                self.report.graphs[self.seen[body]].layers.extend(map(module_path, node.users))
        self.report.settle()


def device_type(graph: fx.Graph) -> str:
    """Where the graph runs: on the first accelerator that one of its inputs is on, else on the CPU."""
    devices = [value(n).device.type for n in graph.find_nodes(op="placeholder") if is_tensor(n)]
    return next((d for d in devices if d != "cpu"), "cpu")
