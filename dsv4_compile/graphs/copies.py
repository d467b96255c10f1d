"""A graph put aside, and put back."""

from torch import fx


def copied(graph: fx.Graph) -> fx.Graph:
    """A graph of its own with the same fake values, which nobody changes."""
    new = fx.Graph()
    _copy(graph, new, {})
    return new


def put_back(graph: fx.Graph, saved: fx.Graph) -> None:
    """Make a graph what it was, whatever state it is in; its inputs stay the nodes that they are."""
    for node in graph.nodes:
        node.args, node.kwargs = (), {}
    for node in list(graph.nodes):
        if node.op != "placeholder":
            graph.erase_node(node)
    own = graph.find_nodes(op="placeholder")
    _copy(saved, graph, dict(zip(saved.find_nodes(op="placeholder"), own, strict=True)))


def _copy(graph: fx.Graph, new: fx.Graph, known: dict[fx.Node, fx.Node]) -> None:
    new.output(new.graph_copy(graph, known)).meta = dict(graph.output_node().meta)
