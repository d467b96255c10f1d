"""Which rewrites make a model wrong?  The model is captured once and run with more and fewer of them, by delta debugging."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import config as configuration
from ..errors import AlreadyWrong
from ..lowerings import OPS
from ..match import Rule
from ..op import DEVICES, Op
from ..passes import PassManager
from ..patterns import RULES
from ..reporting.report import Report, Site
from . import metrics, repro
from .capture import Captured

BUDGET = 200  # compiles


@dataclass(frozen=True)
class Guilty:
    """Rewrites that make the model wrong together, none of them alone if there are several. value: the metric with these
    alone. contribution: with each of them alone."""

    sites: tuple[Site, ...]
    value: float
    contribution: tuple[float, ...]


@dataclass
class Bisection:
    """guilty: the parts of the fault. value: the metric with all rewrites. rest: with all but the guilty ones (and those
    that need one of them). compiles: how often the passes ran; `spent` if the budget did not suffice for all of it."""

    metric: str
    threshold: float
    sites: int
    value: float
    guilty: list[Guilty] = field(default_factory=list)
    rest: float = 0.0
    compiles: int = 0
    spent: bool = False
    script: Path | None = None
    needed: tuple[str, ...] = ()  # ids of the guilty rewrites and of those that they are made of

    def __str__(self) -> str:
        lines = [f"{self.sites} rewrites, {self.metric} {self.value:.3g} (threshold {self.threshold:.3g})"]
        if not self.guilty and not self.spent:
            return f"{lines[0]}: nothing to find, {self.compiles} compiles"
        for part in self.guilty:
            together = f"  together {part.value:.3g}" if len(part.sites) > 1 else ""
            for site, value in zip(part.sites, part.contribution, strict=True):
                lines.append(f"{site.rule} in {site.layer} at {site.where}: alone {value:.3g}{together}")
                lines.append(f"    {site.id}")
        lines.append(f"without them {self.rest:.3g}; {self.compiles} compiles")
        if self.spent:
            lines.append(f"the budget of {self.compiles} compiles is spent, there may be more: give a larger budget")
        if self.guilty:
            names = sorted({s.rule.split("/")[0] for g in self.guilty for s in g.sites})
            lines.append(
                f"to do without: options={{'disable': '{','.join(names)}'}}, or DSV4_DISABLE={','.join(names)}"
            )
        if self.script is not None:
            lines.append(f"script: {self.script}")
        return "\n".join(lines)


def bisect(
    model: Any,
    *args: Any,
    metric: str | metrics.Metric = "logits",
    threshold: float | None = None,
    budget: int = BUDGET,
    options: dict[str, Any] | None = None,
    script: str | Path | None = None,
    source: str | None = None,
    tell: Callable[[str], None] = lambda _: None,
    rules: Sequence[Rule] = RULES,
    ops: Sequence[Op] = OPS,
    **kwargs: Any,
) -> Bisection:
    """Find the rewrites of model(*args, **kwargs) that push `metric` above `threshold`.

    metric: "logits" (largest difference), "kl" (mean nats a position), "tokens" (share of other greedy choices), "bits"
    (change of the bits a token of the prompt takes), or a function of (output, eager output), larger being worse.
    threshold: by default what rounding does not reach. budget: compiles to spend; for k guilty among n rewrites at most
    k (ceil(log2 n) + 2) + 2, and one for each member of a group. options: those of the backend. script: where to write a
    Python file that shows the fault; `source` is an expression that makes the model there, by default it is stored beside.
    tell: gets a line on what was found so far, now and then.

    Raises AlreadyWrong if the model is wrong without any rewrite, NotForAScript if the script could not load the model.
    """
    name, measure = metrics.chosen(metric, args)
    if script is not None:
        repro.check(model, metric, source)
    config = configuration.resolve(
        {**(options or {}), "regions": False, "inner": "eager"}, passes={r.name for r in rules}, devices=DEVICES
    )
    hunt = Hunt(Captured(model, args, kwargs), config, tuple(rules), tuple(ops), measure, budget, tell)
    threshold = metrics.default(name, hunt.want) if threshold is None else threshold
    found = hunt.run(name, threshold)
    if script is not None and found.guilty:
        found.script = repro.write(Path(script), found, model, args, kwargs, metric, options or {}, source)
    return found


class Spent(Exception):
    """No compiles are left."""


class Hunt:
    """One search over the rewrites of a captured model."""

    def __init__(
        self,
        captured: Captured,
        config: configuration.Config,
        rules: tuple[Rule, ...],
        ops: tuple[Op, ...],
        measure: metrics.Metric,
        budget: int,
        tell: Callable[[str], None] = lambda _: None,
    ):
        self.tell = tell
        self.captured, self.config, self.rules, self.ops = captured, config, rules, ops
        self.measure, self.budget, self.compiles = measure, budget, 0
        self.want = captured.eager()
        self.sites: list[Site] = []
        self.known: dict[frozenset[str], float] = {}

    def compile(self, sites: Sequence[str]) -> tuple[float, Report]:
        """The metric with these rewrites alone; globs are understood. Infinite if the graph does not hold together then."""
        self.charge()
        config = replace(self.config, sites=tuple(sites))
        manager = PassManager(config, self.rules, self.ops)
        got = self.captured.rewritten(manager)
        failed = any(g.failed for g in manager.report.graphs)
        return math.inf if failed else metrics.finite(self.measure(got, self.want)), manager.report

    def charge(self) -> None:
        if self.compiles >= self.budget:
            raise Spent
        self.compiles += 1

    def value(self, sites: Sequence[str]) -> float:
        """The metric with these rewrites and those that they are made of."""
        wanted = frozenset(self.needed(sites))
        if wanted not in self.known:
            self.known[wanted], _ = self.compile([s.id for s in self.sites if s.id in wanted])
        return self.known[wanted]

    def needed(self, sites: Sequence[str]) -> set[str]:
        """These rewrites and those whose ops they take up."""
        parts = {s.id: s.absorbs for s in self.sites}
        found, todo = set(), list(sites)
        while todo:
            site = todo.pop()
            if site not in found:
                found.add(site)
                todo.extend(parts[site])
        return found

    def run(self, name: str, threshold: float) -> Bisection:
        base, _ = self.compile([])
        if base > threshold:
            raise AlreadyWrong(name, base, threshold)
        value, report = self.compile(self.config.sites)
        self.sites = [s for g in report.graphs for s in (*g.sites, *g.undone)]
        found = Bisection(name, threshold, len(self.sites), value, rest=value)
        self.tell(f"{len(self.sites)} rewrites, {name} {value:.3g}")
        rest = [s.id for s in self.sites]
        try:
            while found.rest > threshold:
                group = first_group(rest, lambda sites: self.value(sites) > threshold)
                sites = tuple(s for s in self.sites if s.id in group)
                found.guilty.append(Guilty(sites, self.value(group), tuple(self.value([s.id]) for s in sites)))
                rest = [s for s in rest if not self.needed([s]) & set(group)]
                found.rest = self.value(rest)
                places = ", ".join(f"{s.rule} in {s.layer}" for s in sites)
                self.tell(
                    f"{places}: {found.guilty[-1].value:.3g}, without it {found.rest:.3g}; {self.compiles} compiles"
                )
        except Spent:
            found.spent = True
        found.compiles = self.compiles
        needed = self.needed([s.id for g in found.guilty for s in g.sites])
        found.needed = tuple(s.id for s in self.sites if s.id in needed)
        return found


def first_group(items: Sequence[str], bad: Callable[[Sequence[str]], bool]) -> list[str]:
    """Some items that are bad together and of which none can be left out, given that all items are bad and none are good.

    The shortest bad prefix ends in a guilty item. If that is not bad alone, it is kept, and the shortest prefix before it
    that is bad together with it ends in the next one. Each costs ceil(log2 n) + 1 tests.
    """
    group: list[str] = []
    pool = list(items)
    while True:
        good, wrong = 0, len(pool)
        while wrong - good > 1:
            middle = (good + wrong) // 2
            if bad([*pool[:middle], *group]):
                wrong = middle
            else:
                good = middle
        group.append(pool[wrong - 1])
        pool = pool[: wrong - 1]
        if not pool or bad(group):
            return group
