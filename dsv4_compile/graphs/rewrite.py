"""Put an op in the place of a match, or say why not. Nothing of the graph changes until everything has been checked."""

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node

from ..errors import BadRule
from ..match import Made, Match
from ..op import Op
from .graph import (
    CAST,
    RESHAPES,
    call,
    contiguous,
    depends_on,
    graft,
    head,
    inherit,
    is_cast,
    is_tensor,
    reshaped,
    shape,
    size_node,
    sort,
    trace_aten,
    undone_on_error,
    unwiden,
    value,
)
from .unify import outside_users

SITE = "dsv4_site"  # in node.meta: id of the rewrite that made the op
PARTS = "dsv4_parts"  # in node.meta: (what it called, its meta) of each op that this one took up


class Refused(Exception):
    """This match cannot be rewritten; the message says why."""


Examine = Callable[[Match, list[tuple[Node, Node]], Callable[[Node], bool]], None]


def rewrite(graph: fx.Graph, match: Match, examine: Examine | None = None) -> None:
    """Replace the match by one call of its op. Raises Refused, and whatever the op's meaning raises; both leave the graph
    as it was. `examine` is called while old and new stand side by side, with (old, new) pairs and a test that tells new
    nodes; it may raise Refused too."""
    for inside, user in outside_users(match.inner, set(match.outputs)):
        if head(inside) not in match.rule.shared:
            raise Refused(f"{inside} ({head(inside)}) is also read by {user} ({head(user)})")
    verdict = True if match.rule.check is None else match.rule.check(match)
    if verdict is not True:
        raise Refused(str(verdict))
    order = {node: i for i, node in enumerate(graph.nodes)}
    arguments = _in_order(match.rule.op, match.arguments)
    inputs = [n for a in arguments.values() for n in _read(a)]
    if depends_on(inputs, set(match.outputs), order):
        raise Refused("an input is computed from an output")
    first = min(match.outputs, key=order.__getitem__)
    last = max(inputs, key=order.__getitem__, default=first)
    late = order[last] > order[first]
    position = last.next if late else first
    with undone_on_error(graph), graph.inserting_before(position):
        replacements = _replacements(graph, match, arguments)
        if examine is not None:
            examine(match, replacements, lambda node: node not in order)
    match.absorbs = tuple(dict.fromkeys(n.meta[SITE] for n in match.inner if SITE in n.meta))
    for old, new in replacements:
        old.replace_all_uses_with(new)
    erase_dead([*(old for old, _ in replacements), *match.inner])
    if late:
        sort(graph)


def _read(argument: Any) -> tuple[Node, ...]:
    """The nodes that an argument is or is made of."""
    return argument.inputs if isinstance(argument, Made) else (argument,) if isinstance(argument, Node) else ()


def _in_order(op: Op, given: dict[str, Any]) -> dict[str, Any]:
    """The op's arguments by name."""
    try:
        return op.arguments(**given)
    except TypeError as error:
        raise BadRule(f"dsv4::{op.name}: {error}; the rule captured {', '.join(given)}") from error


def _replacements(graph: fx.Graph, match: Match, arguments: dict[str, Any]) -> list[tuple[Node, Node]]:
    """Call the op and give each replaced value its shape and dtype: (old, new) pairs.

    Casts around a block are its own business: with the inputs as they were before they were widened and the outputs
    after they are rounded, the op does both. Where that does not fit, it is given exactly what the block was given.
    """
    op, like = match.rule.op, match.outputs[0]
    widest = max((value(o).dtype for o in match.outputs), key=lambda d: d.is_floating_point * d.itemsize)
    made = {n: _made(graph, a, like) for n, a in arguments.items() if isinstance(a, Made)}
    arguments = arguments | made
    reason = ""
    for prepare in (lambda x: _narrow(graph, x, like), lambda x: x, lambda x: _widened(graph, x, widest, like)):
        args = [
            prepare(_flat(graph, a, None if n in made else match.ranks.get(n), like))
            if is_tensor(a)
            else size_node(graph, a)
            for n, a in arguments.items()
        ]
        node = call(graph, op.target, args, like)
        node.meta |= {SITE: match.site, PARTS: [(n.target, n.meta) for n in match.inner if SITE in n.meta]}
        values = node.meta["val"] if isinstance(node.meta["val"], (tuple, list)) else (node.meta["val"],)
        landings = [landing(o, v.dtype) for o, v in zip(match.outputs, values, strict=True)]
        if all(landings):
            news = (
                [node]
                if len(values) == 1
                else [call(graph, operator.getitem, (node, i), like) for i in range(len(values))]
            )
            return [(o, _fitted(graph, n, o)) for o, n in zip(landings, news, strict=True) if o is not None]
        reason = ", ".join(
            f"{value(o).dtype} of {o} from {v.dtype}" for o, v in zip(match.outputs, values, strict=True)
        )
        erase_dead([node])
    raise Refused(f"would lose precision: {reason}")


def _made(graph: fx.Graph, argument: Made, like: Node) -> Node:
    values = [value(n) for n in argument.inputs]
    with next(v.fake_mode for v in values if isinstance(v, FakeTensor)):
        piece = trace_aten(argument.fn, values)
    (node,) = graft(graph, piece, argument.inputs, like)
    return node


def landing(old: Node, dtype: torch.dtype) -> Node | None:
    """The node that a value of `dtype` can replace: `old`, or the cast to `dtype` that is all that is made of it."""
    node = old
    while value(node).dtype != dtype:
        readers = list(node.users)
        if len(readers) != 1 or not (is_cast(readers[0]) or readers[0].target in RESHAPES):
            return old if _holds(dtype, value(old).dtype) else None
        node = readers[0]
    return node


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether a value of `wide` can be rounded to `narrow` without having lost anything before."""
    return wide.is_floating_point == narrow.is_floating_point and wide.itemsize > narrow.itemsize


def _narrow(graph: fx.Graph, x: Node, like: Node) -> Node:
    """x as it was before it was widened, in the shape that it was brought to since."""
    source = unwiden(x)
    while source.target in RESHAPES:
        source = unwiden(source.args[0])
    return unwiden(x) if value(source).dtype == value(unwiden(x)).dtype else reshaped(graph, source, shape(x), like)


def _widened(graph: fx.Graph, x: Node, dtype: torch.dtype, like: Node) -> Node:
    return call(graph, CAST, (x, dtype), like) if _holds(dtype, value(x).dtype) else x


def _flat(graph: fx.Graph, x: Node, rank: int | None, like: Node) -> Node:
    """x with its leading axes multiplied together until it has the `rank` that the pattern gave it."""
    if rank is None or len(shape(x)) <= rank:
        return x
    lead = len(shape(x)) - rank + 1
    source = unwiden(x)
    flat = reshaped(graph, source, (_product(shape(x)[:lead]), *shape(x)[lead:]), like)
    return flat if source is x else call(graph, CAST, (flat, value(x).dtype), like)


def _product(sizes: Iterable[Any]) -> Any:
    result = 1
    for s in sizes:
        result = result * s
    return result


def _fitted(graph: fx.Graph, new: Node, old: Node) -> Node:
    """`new` in the shape and dtype of `old`."""
    if value(new).dtype != value(old).dtype:
        new = call(graph, CAST, (new, value(old).dtype), old)
    return reshaped(graph, new, shape(old), old)


def erase_dead(nodes: Iterable[Node]) -> None:
    """Erase nodes that nobody reads, and what only they read. Writes stay."""
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node._erased or node.users or node.op != "call_function" or node.is_impure():
            continue
        todo.extend(node.all_input_nodes)
        node.graph.erase_node(node)


# Back to ATen


def inline(graph: fx.Graph, node: Node, op: Op, pieces: dict[str, fx.Graph]) -> list[Node]:
    """Put the meaning of an op in its place, contiguous as the op is. `pieces` keeps what was traced: equal calls share it.
    Returns the calls of other ops that it is made of; those that the op took up have their lines and modules again."""
    arguments = op.arguments(*node.args, **node.kwargs)
    inputs = {name: a for name, a in arguments.items() if isinstance(a, Node)}

    def meaning(*xs: Any) -> Any:
        return op.meaning(**(arguments | dict(zip(inputs, xs, strict=True))))

    key = f"{op.name} " + ", ".join(f"{name}={_described(value(a))}" for name, a in arguments.items())
    if key not in pieces:
        pieces[key] = trace_aten(meaning, distinct([value(a) for a in inputs.values()]))
    with undone_on_error(graph), graph.inserting_before(node):
        before = node.prev
        outs = [contiguous(graph, o, node) for o in graft(graph, pieces[key], list(inputs.values()), node)]
        parts = list(_parts(before, node))
    replace_outputs(graph, node, op, outs)
    return parts


def replace_outputs(graph: fx.Graph, node: Node, op: Op, outs: Sequence[Node]) -> None:
    """Put the values `outs` in the place of those that the call of an op gives."""
    if len(op.outputs) == 1:
        node.replace_all_uses_with(outs[0])
    else:
        for item in list(node.users):
            index: Any = item.args[1]
            item.replace_all_uses_with(outs[index])
            graph.erase_node(item)
    graph.erase_node(node)


def distinct(values: list[Any]) -> list[Any]:
    """No two the same object, which tracing would take for one input: nodes that were copied from one piece share theirs."""
    found: list[Any] = []
    for x in values:
        if any(x is other for other in found):
            with x.fake_mode:
                x = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
        found.append(x)
    return found


def _parts(before: Node, whole: Node) -> Iterator[Node]:
    """Calls of ops between the two nodes, each with the place that it had before `whole` took it up."""
    taken = list(whole.meta.get(PARTS, ()))
    node = before.next
    while node is not whole:
        if head(node).startswith("dsv4."):
            own = next((t for t in taken if t[0] is node.target), None)
            if own is not None:
                taken.remove(own)
                node.meta |= {key: x for key, x in own[1].items() if key != "val"}
            yield node
        node = node.next


# Ops that write in place


def write_in_place(graph: fx.Graph, node: Node, op: Op) -> None:
    """Call the op that writes to its arguments, in the functional form that Inductor knows: new values, for which it takes
    the arguments' memory if nobody reads the old values any more."""
    arguments = op.arguments(*node.args, **node.kwargs)
    bases = [arguments.pop(name) for name in op.in_place]
    places = {f"_{name}_base_index": i for i, name in enumerate(op.in_place)}
    values = value(node) if len(op.outputs) > 1 else (value(node),)
    with graph.inserting_before(node):
        call = graph.call_function(
            auto_functionalized_v2, (op.writing_target,), arguments | places | {"_all_bases": bases}
        )
        news = [graph.call_function(operator.getitem, (call, 1 + i)) for i in range(len(bases))]
    call.meta["val"] = (None, *values)
    for new, made in zip(news, values, strict=True):
        new.meta["val"] = made
    for new in (call, *news):
        inherit(new, node)
    replace_outputs(graph, node, op, news)


def _described(x: Any) -> str:
    return f"{x.dtype} {tuple(x.shape)} {x.stride()} {x.device}" if isinstance(x, torch.Tensor) else repr(x)
