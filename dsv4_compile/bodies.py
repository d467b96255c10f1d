"""Layers that share a body: the body is compiled once, as a callable of its own, and the graph becomes a list of calls.

AOT and Inductor go through every call of a region, so that 61 layers of 5 kinds cost as 61. Taken apart, each kind costs
once; what lies between the calls is compiled piece by piece. Order is kept: Dynamo's graph writes to its inputs.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx import Node


@dataclass
class Piece:
    """A graph to be compiled on its own: consecutive nodes of the whole, or a body that several calls share."""

    gm: fx.GraphModule
    inputs: list[Any]  # examples
    calls: list[Node] = field(default_factory=list)  # of a body
    run: Callable[..., Any] | None = None  # once it is compiled


@dataclass
class Apart:
    """A graph taken apart: `driver` calls the pieces."""

    driver: fx.GraphModule
    pieces: dict[str, Piece]

    def compile(self, how: Callable[[Piece], Callable[..., Any]]) -> Callable[..., Any]:
        """The whole as a callable, each piece compiled by `how`."""
        for piece in self.pieces.values():
            piece.run = how(piece)
        return self.driver.forward


def caller(piece: Piece, name: str) -> Callable[..., Any]:
    """A function that fx can call: a module would cost as much as a small kernel."""

    def call(*args: Any) -> Any:
        assert piece.run is not None, f"{name} is not compiled"
        return piece.run(*args)

    call.__name__ = name
    return call


def taken_apart(gm: fx.GraphModule, inputs: Sequence[Any], calls: int = 2) -> Apart | None:
    """Dynamo's graph in pieces, or None if no body is called twice (or `calls` times) in the same way, or more pieces lie
    between the calls than taking them apart would save."""
    own = shared(gm, calls)
    runs = list(between(gm, own))
    if not own or (calls > 1 and len(runs) > len(set(own.values())) + 2):
        return None
    examples: dict[Node, Any] = dict(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True))
    sizes = [n for n in examples if isinstance(example(n, examples), torch.SymInt)]
    starts = {run[0]: run for run in runs}
    driver, value, pieces = fx.Graph(), dict[Node, Node](), dict[str, Piece]()
    callers: dict[str, Callable[..., Any]] = {}

    def call(name: str, taken: list[Node]) -> Node:
        callers[name] = target = callers.get(name) or caller(pieces[name], name)
        return driver.call_function(target, tuple(value[n] for n in taken))

    for node in gm.graph.nodes:
        if node.op == "placeholder":
            value[node] = driver.placeholder(node.name)
        elif node.op == "output":
            driver.output(fx.node.map_arg(node.args[0], value.__getitem__))
        elif node in own:
            name, operands = own[node], operands_of(node)
            if name not in pieces:
                pieces[name] = body_piece(gm, node, [example(n, examples) for n in operands])
            pieces[name].calls.append(node)
            value[node] = call(name, operands)
        elif is_item(node, own):
            value[node] = driver.call_function(operator.getitem, (value[node.args[0]], node.args[1]))
        elif run := starts.get(node):
            name = f"piece_{len(pieces)}"
            inside = set(run)
            taken = list(dict.fromkeys([*(x for n in run for x in n.all_input_nodes if x not in inside), *sizes]))
            given = [n for n in run if any(user not in inside for user in n.users)]
            pieces[name] = Piece(piece_of(gm, run, taken, given), [example(n, examples) for n in taken])
            result = call(name, taken)
            value.update({n: driver.call_function(operator.getitem, (result, i)) for i, n in enumerate(given)})
    return Apart(fx.GraphModule(torch.nn.Module(), driver), pieces)


def shared(gm: fx.GraphModule, times: int = 2) -> dict[Node, str]:
    """Calls of bodies that are called so many times or more, with the name of the body's piece: calls whose operands alias
    each other in the same way share one."""
    groups: dict[tuple[str, tuple[tuple[int, Any], ...]], list[Node]] = {}
    for node in gm.graph.nodes:
        if node.target is not torch.ops.higher_order.invoke_subgraph:
            continue
        plain = all(isinstance(x, Node) for x in node.args[2:]) and all(
            u.target is operator.getitem for u in node.users
        )
        if plain:
            groups.setdefault((holder_of(node).target, aliases(operands_of(node))), []).append(node)
    several = [calls for calls in groups.values() if len(calls) >= times]
    return {call: f"body_{i}" for i, calls in enumerate(several) for call in calls}


def aliases(operands: Sequence[Node]) -> tuple[tuple[int, Any], ...]:
    """For each operand the first one that lives in the same storage, and how far behind that it starts."""
    first: dict[int, tuple[int, Any]] = {}
    found: list[tuple[int, Any]] = []
    for i, x in enumerate(example(n, {}) for n in operands):
        if isinstance(x, torch.Tensor):
            place, start = first.setdefault(x.untyped_storage()._cdata, (i, x.storage_offset()))
            found.append((place, x.storage_offset() - start))
        else:
            found.append((i, 0))
    return tuple(found)


def holder_of(call: Node) -> Any:
    """The node that names the body."""
    return call.args[0]


def operands_of(call: Node) -> list[Any]:
    return list(call.args[2:])


def example(node: Node, given: dict[Node, Any]) -> Any:
    """What the node holds while tracing."""
    return given[node] if node in given else node.meta["example_value"]


def is_item(node: Node, own: dict[Node, str]) -> bool:
    return node.target is operator.getitem and node.args[0] in own


def between(gm: fx.GraphModule, own: dict[Node, str]) -> Iterator[list[Node]]:
    """The nodes before, between and after the calls, in runs that compute something."""
    holders = {holder_of(call) for call in own if all(user in own for user in holder_of(call).users)}
    run: list[Node] = []
    for node in gm.graph.nodes:
        if node in own or node.op == "output":
            if any(n.op != "get_attr" for n in run):
                yield run
            run = []
        elif node.op != "placeholder" and node not in holders and not is_item(node, own):
            run.append(node)


def body_piece(gm: fx.GraphModule, call: Node, inputs: list[Any]) -> Piece:
    body = getattr(gm, holder_of(call).target)
    for place, operand in zip(body.graph.find_nodes(op="placeholder"), operands_of(call), strict=True):
        known_to_dynamo(place, operand)
    known_as_dynamos(body, gm)
    return Piece(body, inputs)


def piece_of(gm: fx.GraphModule, run: list[Node], taken: list[Node], given: list[Node]) -> fx.GraphModule:
    """A graph of the nodes `run`, which reads `taken` and returns `given`."""
    graph, copies, root = fx.Graph(), dict[Node, Node](), torch.nn.Module()
    for node in taken:
        copies[node] = place = graph.placeholder(node.name)
        place.meta = dict(node.meta)
        known_to_dynamo(place, node)
    for node in run:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if node.op in ("get_attr", "call_module"):
            setattr(root, str(node.target), getattr(gm, str(node.target)))
    graph.output(tuple(copies[n] for n in given))
    piece = fx.GraphModule(root, graph)
    known_as_dynamos(piece, gm)
    return piece


# AOT looks for what Dynamo notes on its graphs: where inputs come from, and which of them never move.


def known_to_dynamo(place: Node, operand: Node) -> None:
    source: Any = getattr(operand, "_dynamo_source", None)
    place._dynamo_source = source  # type: ignore[attr-defined]
    if "tensor_dict" in operand.meta:
        place.meta["tensor_dict"] = operand.meta["tensor_dict"]


def known_as_dynamos(piece: fx.GraphModule, gm: fx.GraphModule) -> None:
    piece.meta = {**gm.meta, **piece.meta}
    if hasattr(gm, "_param_name_to_source"):
        piece._param_name_to_source = gm._param_name_to_source
