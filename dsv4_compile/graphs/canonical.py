"""One way to write what models write in many: graph and patterns are both put into this form before they are compared."""

from torch import fx

from . import choices, complex, forms, products  # noqa: F401  they declare what is written in other words
from .graph import aten, is_view, sizes_from_inputs
from .writer import Writer, is_call


def canonicalise(graph: fx.Graph) -> None:
    """Drop what computes nothing, merge equal nodes, write the rest in one way, and take sizes from the graph's inputs."""
    sizes_from_inputs(graph)
    without_writes(graph)
    writer = Writer(graph)
    for node in list(graph.nodes):
        if not node._erased:
            writer.settle(node)


def without_writes(graph: fx.Graph) -> None:
    """Sums that torch's decomposition of rms_norm writes over their first term, which nobody else reads, as plain sums: two
    such terms must not become one."""
    for node in list(graph.nodes):
        if is_call(node, aten.add_.Scalar, aten.add_.Tensor) and not is_view(node.args[0]):
            x = node.args[0]
            if x.op == "call_function" and list(x.users) == [node]:
                node.target = aten.add.Scalar if node.target is aten.add_.Scalar else aten.add.Tensor
