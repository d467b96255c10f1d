"""A real prompt, rewrite by rewrite: every op against the plain graph on the values that stand there while the model runs."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx import Node

from .. import config as configuration
from ..graphs.copies import copied
from ..lowerings import OPS
from ..match import Match, Rule
from ..op import DEVICES, Op
from ..passes import PassManager
from ..patterns import RULES
from ..reporting.report import GraphReport
from .capture import Captured, fake_mode
from .cut import Cut, by_meaning, evaluate
from .metrics import finite, logits
from .verify import Check, Values, Verifier


@dataclass
class Shadow:
    """checks: one for each rewrite, on its own inputs. error: largest difference of the whole model's logits."""

    checks: list[Check] = field(default_factory=list)
    error: float = 0.0

    @property
    def failed(self) -> list[Check]:
        return [c for c in self.checks if c.failed]

    def table(self) -> dict[str, dict[str, float]]:
        """Largest error by layer (`layers.3`, or "" outside) and rule."""
        rows: dict[str, dict[str, float]] = {}
        for check in self.checks:
            layer = ".".join(check.layer.split(".")[:2]) if check.layer.startswith("layers.") else ""
            row = rows.setdefault(layer, {})
            row[check.rule] = max(row.get(check.rule, 0.0), check.error)
        return rows

    def __str__(self) -> str:
        rules = list(dict.fromkeys(c.rule for c in self.checks))
        rows = self.table()
        names = sorted(rows, key=lambda n: (not n, [int(p) if p.isdigit() else 0 for p in n.split(".")]))
        lines = [["rule", *(n or "around" for n in names)]]
        lines += [[r, *(f"{rows[n][r]:.1e}" if r in rows[n] else "" for n in names)] for r in rules]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        text.append(
            f"logits of the whole model: {self.error:.1e}; {len(self.failed)} of {len(self.checks)} above tolerance"
        )
        return "\n".join([*text, *(str(c) for c in self.failed)])


def shadow(
    model: Any,
    *args: Any,
    options: dict[str, Any] | None = None,
    rules: Sequence[Rule] = RULES,
    ops: Sequence[Op] = OPS,
    **kwargs: Any,
) -> Shadow:
    """Run model(*args, **kwargs) plainly and try every rewrite on the values that it meets: `print(shadow(model, ids))`.

    Errors are those of single ops, since each gets the plain graph's values. Arguments are copied, buffers restored,
    gradients off. options: those of the backend. All intermediate values are held at once: give it a short prompt.
    """
    config = configuration.resolve(
        {**(options or {}), "regions": False, "inner": "eager"}, passes={r.name for r in rules}, devices=DEVICES
    )
    captured = Captured(model, args, kwargs)
    manager = ShadowManager(config, tuple(rules), tuple(ops))
    for slot in captured.slots:
        slot.now = graph = copied(slot.graph)
        inputs = [x.clone() if isinstance(x, torch.Tensor) else x for x in slot.inputs]
        manager.recorded.values = recorded(graph, slot.root, inputs)
        with fake_mode(graph):
            manager(graph)
        manager.recorded.values = {}
    error = finite(logits(captured.call(captured.compiled), captured.eager()))
    return Shadow([c for g in manager.report.graphs for c in g.checks], error)


def recorded(graph: fx.Graph, root: Any, inputs: Sequence[Any]) -> Values:
    """The value of every node. Writes to the inputs, which come last, are left out."""
    values: Values = dict(zip(graph.find_nodes(op="placeholder"), inputs, strict=True))
    values |= {n: getattr(root, n.target) for n in graph.find_nodes(op="get_attr")}
    writes = torch.ops.aten.copy_.default
    with torch.no_grad():
        evaluate([n for n in graph.nodes if n.op == "call_function" and n.target is not writes], values, {}, by_meaning)
    return values


class Recorded(Verifier):
    """Checks each rewrite on the values that its inputs have; new ops leave theirs for those that read them."""

    precisions = ()

    def __init__(self, *how: Any):
        super().__init__(*how)
        self.values: Values = {}

    def verdict(self, part: Cut, op: Op, blank: Check) -> Check:
        self.complete(part.inputs)
        env = {n: self.values[n] for n in part.inputs}
        found = self.compared(part, op, env, blank)
        self.values |= self.run(part.new, env, None)
        return found

    def complete(self, nodes: Iterable[Node]) -> None:
        """Work out values of nodes that were not in the graph when it ran: those of its canonical form."""
        missing, todo = set(), list(nodes)
        while todo:
            node = todo.pop()
            if node not in self.values and node not in missing:
                missing.add(node)
                todo.extend(node.all_input_nodes)
        if missing:
            in_order = [n for n in next(iter(missing)).graph.nodes if n in missing]
            evaluate(in_order, self.values, {}, by_meaning)


class ShadowManager(PassManager):
    """Makes every rewrite, right or wrong, and notes how far it is off."""

    def __init__(self, *how: Any):
        super().__init__(*how)
        self.recorded = Recorded(self.verifier.ops, self.verifier.claim)

    def examine(
        self, report: GraphReport, match: Match, pairs: list[tuple[Node, Node]], is_new: Callable[[Node], bool]
    ) -> None:
        report.checks.append(self.recorded.check(match, pairs, is_new))
