"""Does this subgraph say the same as that pattern?  Structural matching, up to what does not change the mathematics.

Free: casts, views, operand order of commutative ops, argument spelling, order of independent nodes, extra leading axes.
Sizes are unified, not compared: the pattern is traced with sizes of its own (5, 7, 35 ...), and every size of the pattern
must stand for one size of the graph. That is also what makes free views safe: a view that mixed axes would show.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from .graph import (
    Term,
    head,
    is_cast,
    is_tensor,
    is_view,
    known,
    literal,
    same_elements,
    shape,
    strip,
    term,
    unexpanded,
    users,
    value,
    where,
)

BUDGET = 20_000  # steps before an ambiguous search is given up
SIZED = {"size", "k", "start", "end", "length", "split_sizes", "split_size"}  # arguments that are sizes, not numbers


@dataclass(frozen=True)
class Pattern:
    """A traced rule: its outputs and anchors, and which placeholders and numbers in it stand for a parameter."""

    graph: torch.fx.Graph
    inputs: dict[Node, str]
    scalars: dict[float, str]  # sentinel -> parameter
    integers: dict[str, int]  # parameter -> its size in the pattern
    outputs: tuple[Node, ...]
    nodes: tuple[Node, ...]  # what must be found: every node that computes something
    sizes: frozenset[int]  # every size that the pattern's values have

    def anchors(self, name: str) -> list[Node]:
        return [n for n in self.nodes if head(n) == name]


@dataclass
class Binding:
    """What of the graph stands for what of the pattern, so far."""

    nodes: dict[Node, Node] = field(default_factory=dict)
    scalars: dict[str, float] = field(default_factory=dict)
    sizes: dict[int, Any] = field(default_factory=dict)

    def copy(self) -> "Binding":
        return Binding(dict(self.nodes), dict(self.scalars), dict(self.sizes))


@dataclass(frozen=True)
class Mismatch:
    """The farthest point that a failed attempt came to."""

    progress: int
    expected: str
    found: str
    where: str


Work = list[tuple[Any, Any]]


class Search:
    """One attempt: pattern against graph from one anchor. `binding` is the result; `mismatch` says why there is none."""

    def __init__(self, pattern: Pattern, start: Node, anchor: Node):
        self.pattern, self.budget, self.at = pattern, BUDGET, anchor
        self.mismatch: Mismatch | None = None
        self.binding = self.solve([(start, anchor)], Binding())

    def fail(self, binding: Binding, expected: Any, found: Any) -> None:
        progress = len(binding.nodes)
        if self.mismatch is None or progress > self.mismatch.progress:
            self.mismatch = Mismatch(progress, str(expected), str(found), where(self.at))

    def solve(self, work: Work, binding: Binding) -> Binding | None:
        """Relate all pairs of `work`, then climb to users, until every node of the pattern is bound."""
        while True:
            while work:
                self.budget -= 1
                if self.budget < 0:
                    self.fail(binding, "a search without this many choices", "budget exhausted")
                    return None
                choices = self.relate(*work.pop(), binding)
                if choices is None:
                    return None
                if len(choices) > 1:
                    return self.first(choices, work, binding)
                work.extend(choices[0])
            missing = [n for n in self.pattern.nodes if n not in binding.nodes]
            if not missing:
                return binding
            choices = self.climb(missing, binding)
            if len(choices) != 1:
                return self.first(choices, work, binding)
            work.extend(choices[0])

    def first(self, choices: Iterable[Work], work: Work, binding: Binding) -> Binding | None:
        return next((b for c in choices if (b := self.solve(work + c, binding.copy())) is not None), None)

    def climb(self, missing: list[Node], binding: Binding) -> list[Work]:
        """A pattern node above what is bound, against each user in the graph that could be it."""
        below = binding.nodes
        above = [(p, strip(below[o])) for p in missing for o in map(strip, p.all_input_nodes) if o in below]
        if not above:
            self.fail(binding, "a connected pattern", f"{missing[0]} touches nothing that is bound")
            return []
        p, read, candidates = min(((p, m, _users_like(p, m)) for p, m in above), key=lambda x: len(x[2]))
        if not candidates:
            taken = set(binding.nodes.values())
            others = sorted({head(u) for u in users(read) if u not in taken})
            self.fail(binding, f"a use by {head(p)}", ", ".join(others) or "none")
        return [[(p, c)] for c in candidates]

    # one pair

    def relate(self, p: Any, m: Any, binding: Binding) -> list[Work] | None:
        """Ways in which graph value m can be pattern value p, each a list of further pairs; None if there is no way."""
        if not isinstance(p, Node):
            return [[]] if self.number(p, literal(m), binding) else None
        if not isinstance(m, Node):
            self.fail(binding, head(_strip(p)), m)
            return None
        self.at = m if m.op == "call_function" else self.at
        p = strip(p)
        if p in self.pattern.inputs:
            return self.bind_input(p, m, binding)
        m = strip(m)
        if p in binding.nodes:
            if binding.nodes[p] is m:
                return [[]]
            self.fail(binding, f"the same {head(p)} as before", m)
            return None
        if head(p) != head(m) or m.op != "call_function":
            self.fail(binding, head(p), head(m))
            return None
        self.at = m
        return self.same_call(p, m, term(p), term(m), binding)

    def bind_input(self, p: Node, m: Node, binding: Binding) -> list[Work] | None:
        """m, or what it is a view of, as the parameter p: the first that has its shape, then the first that has it when
        leading axes are multiplied together."""
        chain, rank = list(_chain(m)), len(shape(p))
        if p in binding.nodes:
            if any(self.again(p, c, binding) for c in chain):
                return [[]]
            self.fail(binding, f"{self.pattern.inputs[p]} again", m)
            return None
        tensors = [c for c in chain if is_tensor(c) and len(shape(c)) >= rank]
        for c in sorted(tensors, key=lambda c: len(shape(c)) > rank):
            trial = binding.copy()
            if self.shapes(shape(p), shape(c), trial):
                binding.sizes = trial.sizes
                binding.nodes[p] = c
                return [[]]
        self.fail(binding, f"{self.pattern.inputs[p]} of shape {list(shape(p))}", m)
        return None

    def again(self, p: Node, m: Node, binding: Binding) -> bool:
        """Whether m is the parameter p once more: of p's shape, with the elements of what stands for p already."""
        before = binding.nodes[p]
        if m is before or not (is_tensor(m) and same_elements(before, m)):
            return m is before
        return len(shape(m)) >= len(shape(p)) and self.shapes(shape(p), shape(m), binding.copy())

    def same_call(self, p: Node, m: Node, a: Term, b: Term, binding: Binding) -> list[Work] | None:
        if len(a.operands) != len(b.operands) or a.literals.keys() != b.literals.keys():
            self.fail(binding, f"{a} with {len(a.operands)} operands", f"{len(b.operands)}, {b.literals}")
            return None
        implied, given = self.implied_bound(a), _in_steps_of(a, b, m)
        for key, wanted in a.literals.items():
            if key != implied and not self.number(wanted, given[key], binding, key):
                return None
        if is_tensor(p) and not self.shapes(shape(p), shape(m), binding):
            return None
        binding.nodes[p] = m
        orders = [b.operands]
        if a.commutes:
            orders.append(b.operands[::-1])
        alike = [o for o in orders if all(map(self.plausible, a.operands, o))]
        if not alike:
            self.fail(binding, f"{a} of {', '.join(map(_name, a.operands))}", ", ".join(map(_name, b.operands)))
            return None
        fitting = [o for o in alike if self.operand_shapes(a, o, binding)]
        if not fitting:
            self.fail(binding, f"{a} of {_shapes(a.operands)}", _shapes(b.operands))
            return None
        return [list(zip(a.operands, o, strict=True))[::-1] for o in fitting]

    def plausible(self, p: Any, m: Any) -> bool:
        """Cheap look ahead, so that most operand orders are decided at once."""
        if not isinstance(p, Node):
            return not isinstance(literal(m), Node)
        p, at_input = _strip(p), p in self.pattern.inputs
        if at_input or p in self.pattern.inputs:
            return isinstance(m, Node)
        return isinstance(m, Node) and head(p) == head(strip(m))

    def operand_shapes(self, a: Term, operands: Sequence[Any], binding: Binding) -> bool:
        trial = binding.copy()
        for p, m in zip(a.operands, operands, strict=True):
            if not (is_tensor(p) and is_tensor(m)):
                continue
            if a.pointwise and p in self.pattern.inputs and self.shapes(shape(p), shape(m), whole := trial.copy()):
                trial = whole  # a parameter may be what the model expanded
                continue
            if a.pointwise:
                p, m = unexpanded(p), unexpanded(m)
            if not self.shapes(shape(p), shape(m), trial, broadcast=a.pointwise):
                return False
        return True

    # numbers and sizes

    def number(self, p: Any, m: Any, binding: Binding, key: str = "") -> bool:
        """A literal of the pattern against one of the graph."""
        m = value(m) if isinstance(m, Node) and not is_tensor(m) else m  # a symbolic size in a list
        if isinstance(p, (list, tuple)):
            same = isinstance(m, (list, tuple)) and len(p) == len(m)
            same = same and all(self.number(i, j, binding, key) for i, j in zip(p, m, strict=True))
        elif isinstance(p, float) and abs(p) in self.pattern.scalars:
            same = isinstance(m, (int, float)) and self.scalar(p, m, binding)
        elif isinstance(p, int) and not isinstance(p, bool):
            free = self.is_size(p, key)
            same = isinstance(m, (int, float, torch.SymInt)) and (
                self.size(p, m, binding) if free and not isinstance(m, float) else known(p == m)
            )
        elif isinstance(p, float):
            same = isinstance(m, (int, float)) and (p == m or math.isclose(p, m, rel_tol=1e-12))
        else:
            same = type(p) is type(m) and p == m
        if not same:
            self.fail(binding, f"{key or 'value'} {self.pattern.scalars.get(p, p) if isinstance(p, float) else p}", m)
        return same

    def is_size(self, p: Any, key: str) -> bool:
        """Whether an integer of the pattern stands for a size or a captured integer, not for itself."""
        if not isinstance(p, int) or isinstance(p, bool):
            return False
        return abs(p) in self.pattern.integers.values() or (key in SIZED and abs(p) in self.pattern.sizes)

    def implied_bound(self, a: Term) -> str:
        """The bound of a slice that follows from the other one and the size of the result: a sum of sizes, as in
        x[n : n + m], is no size that the pattern knows."""
        if a.head != "aten.slice" or a.literals["step"] != 1:
            return ""
        fixed = {k: a.literals[k] == 0 or self.is_size(a.literals[k], k) for k in ("start", "end")}
        return next((k for k in fixed if not fixed[k]), "") if any(fixed.values()) else ""

    def scalar(self, p: float, m: float, binding: Binding) -> bool:
        captured = float(m if p > 0 else -m)
        return binding.scalars.setdefault(self.pattern.scalars[abs(p)], captured) == captured

    def size(self, p: int, m: Any, binding: Binding) -> bool:
        """A size of the pattern stands for one size of the graph."""
        if abs(p) < 2:
            return known(p == m)
        p, m = abs(p), m if p > 0 else -m
        return known(binding.sizes.setdefault(p, m) == m)

    def shapes(self, p: Sequence[int], m: Sequence[Any], binding: Binding, broadcast: bool = False) -> bool:
        """Unify two shapes; the one with more axes has its leading ones multiplied together. With `broadcast`, leading
        axes of size 1 count for nothing; others must be broadcast on both sides or on neither, for free views could turn
        x[:, None] into x[None] where two sizes are equal."""
        if broadcast:
            p, m = _without_leading_ones(p), _without_leading_ones(m)
            if not p or not m:
                return True
        rank = min(len(p), len(m))
        for i, j in zip(_of_rank(p, rank), _of_rank(m, rank), strict=True):
            if not self.size(i, j, binding):
                self.fail(binding, f"shape {list(p)} of the pattern", list(m))
                return False
        return bool(rank) or known(math.prod(p) == math.prod(m))


def captured(pattern: Pattern, binding: Binding) -> dict[str, Any]:
    """The rule's parameters: nodes, floats and integers by name."""
    found: dict[str, Any] = {name: binding.nodes[p] for p, name in pattern.inputs.items() if p in binding.nodes}
    found |= binding.scalars
    return found | {name: binding.sizes[size] for name, size in pattern.integers.items() if size in binding.sizes}


def outside_users(inner: Iterable[Node], outputs: set[Node]) -> Iterator[tuple[Node, Node]]:
    """(value, user) for each value inside a match that somebody outside reads. Values made from nothing (iota) are free."""
    inside = set(inner)
    for node in inside - outputs:
        if any(isinstance(value(a), (torch.Tensor, tuple, list)) for a in node.all_input_nodes):
            yield from ((node, u) for u in users(node) if u not in inside)


def _in_steps_of(a: Term, b: Term, m: Node) -> dict[str, Any]:
    """The literals of b, which m computes; one element of an axis is in the steps of a, whatever they are."""
    if a.head != "aten.slice" or not known(shape(m)[b.literals["dim"]] == 1):
        return b.literals
    start, step = b.literals["start"], a.literals["step"]
    end = start + 1 if step == 1 else shape(b.operands[0])[b.literals["dim"]]
    return b.literals | {"end": end, "step": step}


def _strip(x: Any) -> Any:
    return strip(x) if isinstance(x, Node) else x


def _users_like(p: Node, m: Node) -> list[Node]:
    return list(dict.fromkeys(u for u in users(m) if head(u) == head(p)))


def _without_leading_ones(sizes: Sequence[Any]) -> tuple[Any, ...]:
    sizes = tuple(sizes)
    while sizes and known(sizes[0] == 1):
        sizes = sizes[1:]
    return sizes


def _of_rank(sizes: Sequence[Any], rank: int) -> tuple[Any, ...]:
    lead = len(sizes) - rank + 1
    return (math.prod(sizes[:lead]), *sizes[lead:]) if rank else ()


def _chain(x: Any) -> Iterator[Node]:
    """x, and what it is a view or cast of, down to what computes the value."""
    yield x
    while is_view(x) or is_cast(x):
        x = x.args[0]
        yield x


def _name(x: Any) -> str:
    return head(strip(x)) if isinstance(x, Node) else str(x)


def _shapes(operands: Iterable[Any]) -> str:
    return ", ".join(str(list(value(o).shape)) if is_tensor(o) else str(o) for o in operands)
