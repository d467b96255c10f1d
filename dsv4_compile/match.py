"""What a pattern file declares: rules that say "this subgraph is that op".

A rule is a plain PyTorch function of the op's arguments. It is traced through the same front end as the model, rewritten
by the rules before it, and searched for from its anchor, the rarest op in it (see `unify` for what is free).

    @rule(rms_norm, name="raise.rms_norm", anchor="rsqrt", example=dict(x=T(5, 7), weight=T(7)))
    def weighted(x, weight, eps: Scalar):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight

Chains of varying length are walked by hand: a `finder` gets the anchor node and says what it found.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NewType

import torch
from torch.fx import Node

from .errors import BadRule
from .graphs.constant import constant
from .graphs.graph import (
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
    users,
    value,
    where,
)
from .graphs.trace import again, trace
from .graphs.unify import Binding, Pattern, Search, captured
from .op import Op

__all__ = [
    "Found", "Int", "Made", "Match", "NearMiss", "Rule", "Scalar", "T", "constant", "finder", "head", "is_cast", "is_tensor",
    "is_view", "known", "literal", "rule", "same_elements", "shape", "strip", "term", "users", "value",
]  # fmt: skip

Scalar = NewType("Scalar", float)  # a number in the graph that the rule captures: eps, limit, scale
Int = NewType("Int", int)  # an integer in the graph that the rule captures: k, a window, the width of a slice


@dataclass(frozen=True)
class T:
    """An example tensor. Give every axis a size of its own, none below 3: sizes are how axes are told apart."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __init__(self, *shape: int, dtype: torch.dtype = torch.float32):
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "dtype", dtype)


@dataclass(frozen=True)
class Made:
    """An argument that the graph does not hold as such: `fn` of some of its values, traced in front of the op. A `check` or
    a finder gives it where a model has the same content in another layout."""

    fn: Callable[..., Any]
    inputs: tuple[Node, ...]


@dataclass
class Found:
    """What a finder found: the op's arguments, the values to replace (in the op's order), and all nodes that they replace."""

    arguments: dict[str, Any]
    outputs: Sequence[Node]
    inner: Sequence[Node]


@dataclass
class Match:
    """A rule at one place of a graph. `arguments` may be read and changed by the rule's `check`."""

    rule: "Rule"
    anchor: Node
    arguments: dict[str, Any]
    outputs: tuple[Node, ...]
    inner: tuple[Node, ...]
    ranks: dict[str, int] = field(default_factory=dict)  # axes that the pattern gave each tensor argument
    sizes: dict[int, Any] = field(default_factory=dict)  # example size -> size in the graph
    site: str = ""  # id of the rewrite that the match leads to
    absorbs: tuple[str, ...] = ()  # ids of the rewrites whose ops it takes up

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a captured tensor."""
        return value(self.arguments[name]).dtype


@dataclass(frozen=True)
class NearMiss:
    """An anchor from which a rule did not match: what it looked for, what stood there, and the model's line."""

    rule: str
    anchor: str
    expected: str
    found: str
    where: str
    progress: float  # 0 to 1: how much of the pattern was found
    node: Node | None = field(default=None, compare=False, repr=False)
    rough: bool = False  # found by passing over what differs

    def __str__(self) -> str:
        return f"{self.rule} from {self.anchor} at {self.where}: expected {self.expected}, found {self.found}"


@dataclass(frozen=True, eq=False)
class Rule:
    """One way to recognise an op. Rules of one `name` are switched together; `label` tells them apart."""

    op: Op
    name: str
    label: str
    anchor: str
    source: str
    attempt: Callable[["Rule", Node, "Patterns"], Match | NearMiss | None]
    check: Callable[[Match], bool | str] | None = None
    shared: frozenset[str] = frozenset()
    spellings: tuple["Spelling", ...] = ()
    any_rank: bool = False

    @property
    def qualified(self) -> str:
        return f"{self.name}/{self.label}"

    def miss(self, anchor: Node, expected: str, found: str, place: str, progress: float = 1.0) -> NearMiss:
        return NearMiss(self.qualified, self.anchor, expected, found, place, progress, anchor)


@dataclass(frozen=True, eq=False)
class Spelling:
    """A rule's function with one set of example arguments."""

    fn: Callable[..., Any]
    example: dict[str, Any]
    scalars: tuple[str, ...]

    traced: dict[str, Pattern] = field(default_factory=dict)  # by device

    def trace(self, device: str) -> Pattern:
        """The function as a pattern of one's own, to be rewritten."""
        if device not in self.traced:
            self.traced[device] = trace(self.fn, self.example, self.scalars, device)
        return again(self.traced[device])


# Given a rule and a device, the traced spellings, rewritten by the rules before it.
Patterns = Callable[[Rule], Sequence[Pattern]]


def rule(
    op: Op,
    *,
    name: str,
    anchor: str | Op,
    example: dict[str, Any] | Sequence[dict[str, Any]],
    check: Callable[[Match], bool | str] | None = None,
    shared: Sequence[str] = (),
    any_rank: bool = False,
) -> Callable[[Callable[..., Any]], Rule]:
    """Declare a rule for `op`: a function of the op's parameters, those annotated Scalar or Int captured from the graph.

    `example`: T(...) for each tensor parameter, a number (3 or more, unlike any size) for each Int; several dicts are
    several spellings. `anchor`: an op, or the name of an ATen op in the pattern ("topk"). `check(match)`: True, or the
    reason why this place is none; it may also fill `match.arguments` for op parameters that the function does not have.
    `shared`: heads (as "aten.lt") whose values others may read too, because they are cheap to compute twice. `any_rank`:
    the op takes extra leading axes as they are; otherwise they are multiplied together for it.
    """
    examples = [example] if isinstance(example, dict) else list(example)

    def declare(fn: Callable[..., Any]) -> Rule:
        parameters = inspect.signature(fn).parameters
        scalars = tuple(n for n, p in parameters.items() if p.annotation is Scalar)
        for e in examples:
            if e.keys() != parameters.keys() - set(scalars):
                raise BadRule(
                    f"{name}/{fn.__name__}: parameters {sorted(parameters.keys() - set(scalars))}, example {sorted(e)}"
                )
        spellings = tuple(Spelling(fn, e, scalars) for e in examples)
        place, kept = _source(fn), frozenset(shared)
        return Rule(op, name, fn.__name__, _anchor(anchor), place, attempt_patterns, check, kept, spellings, any_rank)

    return declare


def finder(
    op: Op,
    *,
    name: str,
    anchor: str | Op,
    check: Callable[[Match], bool | str] | None = None,
    shared: Sequence[str] = (),
) -> Callable[[Callable[[Node], Found | str | None]], Rule]:
    """Declare a rule that walks the graph by hand: given the anchor node it returns what it found, a reason why not, or
    None when this is not even near."""

    def declare(fn: Callable[[Node], Found | str | None]) -> Rule:
        def attempt(self: Rule, node: Node, patterns: Patterns) -> Match | NearMiss | None:
            found = fn(node)
            if isinstance(found, Found):
                return Match(self, node, dict(found.arguments), tuple(found.outputs), tuple(found.inner))
            return None if found is None else self.miss(node, found, head(node), where(node))

        return Rule(op, name, fn.__name__, _anchor(anchor), _source(fn), attempt, check, frozenset(shared))

    return declare


def attempt_patterns(self: Rule, node: Node, patterns: Patterns) -> Match | NearMiss | None:
    """The first spelling that matches with its anchor at `node`, else the spelling that came farthest."""
    best: NearMiss | None = None
    for pattern in patterns(self):
        for start in pattern.anchors(self.anchor):
            search = Search(pattern, start, node)
            if search.binding is not None:
                return _match(self, node, pattern, search.binding)
            why = search.mismatch
            if why is not None and (best is None or why.progress / len(pattern.nodes) > best.progress):
                best = self.miss(node, why.expected, why.found, why.where, why.progress / len(pattern.nodes))
    return best


def _match(self: Rule, anchor: Node, pattern: Pattern, binding: Binding) -> Match:
    outputs = tuple(binding.nodes[strip(o)] for o in pattern.outputs)
    inner = tuple(binding.nodes[n] for n in pattern.nodes)
    ranks = {} if self.any_rank else {name: len(shape(p)) for p, name in pattern.inputs.items()}
    return Match(self, anchor, captured(pattern, binding), outputs, inner, ranks, binding.sizes)


def _anchor(anchor: str | Op) -> str:
    return f"dsv4.{anchor.name}" if isinstance(anchor, Op) else anchor if "." in anchor else f"aten.{anchor}"


def _source(fn: Callable[..., Any]) -> str:
    return f"{fn.__module__.removeprefix('dsv4_compile.').replace('.', '/')}.py:{fn.__code__.co_firstlineno}"
