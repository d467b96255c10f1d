"""Writes the nodes of a graph in other words.

FORMS maps ATen ops to functions that write one call in other words: equal as mathematics, in numbers at most a rounding
apart. What a form makes must lie in memory as what it replaces, or the form is dropped.
"""

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.fx import Node
from torch.fx.node import map_aggregate, map_arg

from ..errors import BrokenGraph
from .graph import CAST, VIEWS, aten, call, head, is_tensor, known, literal, same_shape, size_node, users, value


class Writer:
    """Writes the nodes of one graph anew, in order."""

    def __init__(self, graph: fx.Graph):
        self.graph = graph
        self.seen: dict[Any, Node] = {}

    def settle(self, node: Node) -> Node:
        """The node that stands for `node` from now on."""
        if node.op != "call_function" or not (isinstance(node.target, torch._ops.OpOverload) or is_part(node)):
            return node
        new = node.args[0] if is_nothing(node) else self.earlier_equal(node)
        if isinstance(new, Node):
            return self.replace(node, new)
        with self.graph.inserting_before(node):
            for write in FORMS.get(node.target, ()):
                before = node.prev
                try:
                    new = write(self, node)
                except BrokenGraph:  # it needs a size that only the data knows
                    new = None
                if new is not None and alike(value(new), value(node), exactly=escapes(node)):
                    return self.replace(node, new)
                while node.prev is not before and not node.prev.users:  # made in vain
                    self.graph.erase_node(node.prev)
        return node

    def make(self, like: Node, target: Any, *args: Any) -> Node:
        """A call, canonical itself, with the model's line of `like`; sizes among the arguments are computed in the graph."""
        return self.settle(call(self.graph, target, map_aggregate(args, partial(size_node, self.graph)), like))

    def laid_out(self, node: Node, new: torch.Tensor) -> bool:
        """Let the value of `node` lie in memory as `new`, and with it what is computed from it, if nobody outside sees."""
        values: dict[Node, Any] = {node: new}
        todo = list(node.users)
        while todo:
            user = todo.pop(0)
            if user.op != "call_function" or user.target is aten.copy_.default or user.is_impure():
                return False
            target: Any = user.target
            arguments: Any = map_arg((user.args, user.kwargs), lambda x: values.get(x, value(x)))
            try:
                found = target(*arguments[0], **arguments[1])
            except RuntimeError:  # a view that does not fit
                return False
            if not (isinstance(found, torch.Tensor) and isinstance(value(user), torch.Tensor)):
                if not _same_parts(found, value(user)):
                    return False
            elif not alike(found, value(user)):
                values[user] = found
                todo.extend(user.users)
        for changed, found in values.items():
            changed.meta["val"] = found
        return True

    def replace(self, node: Node, new: Node) -> Node:
        node.replace_all_uses_with(new)
        self.erase(node, keep=new)
        return new

    def drop(self, node: Node, keep: Node | None = None) -> None:
        """Erase a node if nobody reads it."""
        if node.op == "call_function" and not (node is keep or node.users or node._erased or node.is_impure()):
            self.erase(node, keep)

    def erase(self, node: Node, keep: Node | None = None) -> None:
        """Erase a node, and what only it read; `keep` is about to be read."""
        operands = node.all_input_nodes
        self.graph.erase_node(node)
        for operand in operands:
            self.drop(operand, keep)

    def earlier_equal(self, node: Node) -> Node | None:
        """A node above that computes the same."""
        if not is_part(node) and (changes(node) or "empty" in head(node)):
            return None
        if escapes(node):
            return None
        key = node.target, _frozen(node.args), tuple((k, _frozen(v)) for k, v in sorted(node.kwargs.items()))
        try:
            first = self.seen.get(key)
            if first is None or first._erased:
                self.seen[key] = first = node
        except TypeError:  # an argument that cannot be hashed, such as a symbolic size
            return None
        return None if first is node else first


def alike(new: torch.Tensor, old: torch.Tensor, exactly: bool = True) -> bool:
    """Whether one can stand in the place of the other, whatever is done to it next. The stride of an axis of size 1 says
    nothing, but those that see the graph's outputs may look at it."""
    if new.dtype != old.dtype or not same_shape(new.shape, old.shape):
        return False
    strides = zip(old.shape, new.stride(), old.stride(), strict=True)
    return all(known(a == b) or (not exactly and known(size == 1)) for size, a, b in strides)


def is_part(node: Node) -> bool:
    """One of the results of a call that gives several."""
    return node.target is operator.getitem


def changes(node: Node) -> bool:
    """Whether a call writes to memory, or gives something else each time."""
    assert isinstance(node.target, torch._ops.OpOverload)
    return node.target._schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags


def _same_parts(new: Any, old: Any) -> bool:
    """Whether a call with several results gives them as before."""
    if not isinstance(new, (tuple, list)):
        return not isinstance(new, torch.Tensor)
    return all(not isinstance(a, torch.Tensor) or alike(a, b) for a, b in zip(new, old, strict=True))


def escapes(node: Node) -> bool:
    """Whether the value, or a view of it, leaves the graph: then its storage must stay its own."""
    return any(u.op == "output" or u.target is aten.copy_.default for u in users(node))


def is_nothing(node: Node) -> bool:
    """A view to the same shape, a slice of everything, a cast to the same dtype, a product with 1. Clones stay: they may
    part storages."""
    product = node.target is aten.mul.Tensor and isinstance(node.args[1], (int, float)) and node.args[1] == 1
    views = VIEWS - {aten.clone.default, aten.lift_fresh_copy.default} | {aten.slice.Tensor, aten.permute.default}
    if not (product or node.target is CAST or node.target in views):
        return False
    return is_tensor(node.args[0]) and not escapes(node) and alike(value(node), value(node.args[0]))


def _frozen(x: Any) -> Any:
    if isinstance(x, (list, tuple)):
        return tuple(_frozen(i) for i in x)
    if isinstance(x, slice):
        return ("slice", x.start, x.stop, x.step)
    return (type(x), repr(x)) if isinstance(x, float) else (type(x), x)


# Forms

Form = Callable[[Writer, Node], Node | None]
FORMS: dict[Any, list[Form]] = {}


def form(*targets: Any) -> Callable[[Form], Form]:
    """Declare another way to write calls of these ops: the new value, or None where it does not apply."""

    def declare(fn: Form) -> Form:
        for target in targets:
            FORMS.setdefault(target, []).append(fn)
        return fn

    return declare


def args(node: Node) -> tuple[Any, ...]:
    """A call's arguments; what they are is up to the op."""
    return node.args


def is_call(x: Any, *targets: Any) -> bool:
    return isinstance(x, Node) and x.target in targets


def number(x: Any) -> float | int | None:
    """The number that x is, or that each element of it is."""
    sign = 1
    while isinstance(x, Node) and x.target in VIEWS | {aten.permute.default, aten.neg.default, CAST}:
        sign, x = (-sign if x.target is aten.neg.default else sign), x.args[0]
    x = x.args[1] if is_call(x, aten.full.default) else literal(x)
    return sign * x if isinstance(x, (int, float)) and not isinstance(x, bool) else None


def floating(x: Any) -> bool:
    return value(x).dtype.is_floating_point


def both_ways(node: Node) -> list[tuple[Any, Any]]:
    a, b = args(node)
    return [(a, b), (b, a)]
