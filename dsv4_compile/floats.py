"""The floats of modules (eps, scales) as constants of a graph.

Dynamo makes them inputs under dynamic=True, and patterns cannot read inputs. Here they are written into the graph and the
region bodies that it calls, under a guard, as Dynamo holds the ints of modules anyway. A caller's own floats stay inputs.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx import Node

from .graphs.instances import inline_regions

CALL = torch.ops.higher_order.invoke_subgraph
Numbers = dict[Node, float]  # what nodes are known to hold


def hold_floats_of_modules(gm: fx.GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """Write the floats of modules into Dynamo's graph. Returns the inputs that are left; Dynamo, whose graph it is, passes
    no others when it calls what the backend returns."""
    from torch._dynamo.symbolic_convert import TensorifyState
    from torch.fx.experimental.symbolic_shapes import guard_scalar

    placeholders = gm.graph.find_nodes(op="placeholder")
    symbols = {n: symbol(n) for n in placeholders if symbol(n) is not None}
    numbers = {n: s.node.hint for n, s in symbols.items() if is_of_module(n)}
    written = write(gm, numbers)
    if any(isinstance(x, float) or is_float(x) or x in symbols for call in calls_of(gm) for x in call.args[2:]):
        inline_regions(gm)  # torch has no regions that read floats
        written = write(gm, numbers)
    for node in written:
        TensorifyState.specialize(symbols[node].node._expr.name)  # else Inductor has Dynamo trace again without it
        guard_scalar(symbols[node])
        gm.graph.erase_node(node)
    if written:
        gm.recompile()
    return [x for x, node in zip(inputs, placeholders, strict=True) if node not in written]


def symbol(node: Node) -> Any:
    """The SymFloat of an input that is a caller's or a module's float: it comes as a tensor. None for other inputs."""
    as_tensor = getattr(node.meta.get("grapharg"), "pass_arg_as_tensor", False)
    return getattr(node.meta.get("example_value"), "item_memo", None) if as_tensor else None


def is_of_module(node: Node) -> bool:
    kind = node.meta["grapharg"].source.guard_source
    kind = kind() if callable(kind) else kind  # a method in older torch
    return bool(kind.is_unspecialized_nn_module())


def write(gm: fx.GraphModule, numbers: Numbers) -> set[Node]:
    """Put the numbers that nodes are known to hold in their places, also in the bodies that the graph calls. Returns the
    nodes that nobody reads any more; those that are computed are erased."""
    known = dict(numbers)
    for node in gm.graph.nodes:
        if is_float(node) and node.op != "placeholder" and all(n in known for n in node.all_input_nodes):
            known[node] = computed(node, known)
    for body, calls in called(gm):
        write_into(body, calls, known)
    for node in reversed(known):
        if is_float(node):
            for user in [u for u in node.users if takes_literals(u) and u not in known]:
                put(user, node, known[node])
        if not node.users and node not in numbers:
            gm.graph.erase_node(node)
    return {n for n in numbers if not n.users}


def write_into(body: fx.GraphModule, calls: Sequence[Node], known: Mapping[Any, float]) -> None:
    """Put the numbers that all calls of a body pass into the body, and pass them no more."""
    placeholders = body.graph.find_nodes(op="placeholder")
    for place, inside in reversed(list(enumerate(placeholders, 2))):
        found = {known.get(call.args[place], call.args[place]) for call in calls}
        if len(found) == 1 and isinstance(number := found.pop(), float) and readable(inside):
            write(body, {inside: number})
            body.graph.erase_node(inside)
            for call in calls:
                call.args = (*call.args[:place], *call.args[place + 1 :])
    body.recompile()


def put(user: Node, node: Node, number: float) -> None:
    """Have `user` read a number in the place of a node."""
    new: Any = fx.node.map_arg((user.args, user.kwargs), lambda n: number if n is node else n)
    user.args, user.kwargs = new


def is_float(x: Any) -> bool:
    return isinstance(x, Node) and isinstance(x.meta.get("example_value"), torch.SymFloat)


def takes_literals(node: Node) -> bool:
    """Whether a node may get a number in a float's place."""
    return node.op != "output" and node.target is not CALL


def computed(node: Any, known: Numbers) -> float:
    """A float from those that it is made of; of an input that comes as a tensor that is its item."""
    both: Any = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
    args, kwargs = both
    if node.target == "item":
        return float(args[0])
    return float(node.target(*args, **kwargs))


def readable(node: Node) -> bool:
    """Whether a number can take the place of a body's input wherever that is read."""
    readers = list(node.users)
    if not is_float(node):  # a tensor
        return all(reader.target == "item" and readable(reader) for reader in readers)
    return all(takes_literals(r) and (not is_float(r) or readable(r)) for r in readers)


def calls_of(gm: fx.GraphModule) -> list[Node]:
    return gm.graph.find_nodes(op="call_function", target=CALL)


def called(gm: fx.GraphModule) -> Iterator[tuple[fx.GraphModule, list[Node]]]:
    """The bodies that this graph alone calls, with their calls."""
    calls: dict[Any, list[Node]] = defaultdict(list)
    for node in calls_of(gm):
        calls[node.all_input_nodes[0].target].append(node)
    others = [child for other in gm.modules() if other is not gm for child in other.children()]
    for name, some in calls.items():
        body = getattr(gm, name)
        if body not in others:
            yield body, some
