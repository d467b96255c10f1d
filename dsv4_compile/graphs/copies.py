"""A graph copied, or put aside and put back."""

from typing import Any

from torch import fx
from torch.fx.node import map_arg

Aside = list[tuple[fx.Node, tuple[Any, ...], dict[str, Any]]]  # each node, how to make it again, and its meta


def copied(graph: fx.Graph) -> fx.Graph:
    """A graph of its own with the same fake values, which nobody changes."""
    new = fx.Graph()
    new.output(new.graph_copy(graph, {})).meta = dict(graph.output_node().meta)
    return new


def aside(graph: fx.Graph) -> Aside:
    """What `put_back` needs to make a graph what it is now; a copy would take a hundred times as long."""
    return [(n, (n.op, n.target, n.args, n.kwargs, n.name, n.type), dict(n.meta)) for n in graph.nodes]


def put_back(graph: fx.Graph, nodes: Aside) -> None:
    """Make a graph what it was, whatever state it is in; its inputs stay the nodes that they are."""
    for node in graph.nodes:
        node.args, node.kwargs = (), {}
    for node in list(graph.nodes):
        if node.op != "placeholder":
            graph.erase_node(node)
    now: dict[fx.Node, fx.Node] = {}
    for old, (op, target, args, kwargs, *told), meta in nodes:
        if op == "placeholder":
            now[old] = old
        else:
            args, kwargs = map_arg((args, kwargs), now.__getitem__)
            now[old] = graph.create_node(op, target, args, kwargs, *told)
            now[old].meta = meta
