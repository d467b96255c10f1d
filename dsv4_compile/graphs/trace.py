"""A rule's function as a graph, by the front end that the model goes through."""

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from ..errors import BadRule
from .canonical import canonicalise
from .copies import copied
from .graph import is_tensor, literal, shape, strip, trace_aten
from .unify import Pattern


def sentinel(index: int) -> float:
    """A number that no formula holds, to stand for the index-th Scalar."""
    return 0.0137 + 0.00211 * index


def trace(fn: Callable[..., Any], example: dict[str, Any], scalars: tuple[str, ...], device: str) -> Pattern:
    """Trace fn on fake tensors of the example's shapes; raises BadRule if PyTorch cannot run it."""
    numbers = {name: sentinel(i) for i, name in enumerate(scalars)}
    tensors = {name: e for name, e in example.items() if not isinstance(e, int)}
    integers = {name: e for name, e in example.items() if isinstance(e, int)}
    with FakeTensorMode():
        inputs = [torch.empty(t.shape, dtype=t.dtype, device=device) for t in tensors.values()]
        try:
            graph = trace_aten(lambda *xs: fn(**dict(zip(tensors, xs, strict=True)), **integers, **numbers), inputs)
        except Exception as error:
            raise BadRule(f"{fn.__module__}.{fn.__name__} cannot be traced with {example}: {error}") from error
    canonicalise(graph)
    names = dict(zip(graph.find_nodes(op="placeholder"), tensors, strict=True))
    return pattern_of(graph, names, {v: k for k, v in numbers.items()}, integers)


def pattern_of(
    graph: torch.fx.Graph, inputs: dict[Any, str], scalars: dict[float, str], integers: dict[str, int]
) -> Pattern:
    """Read a traced graph as a pattern; read it again after it was rewritten."""
    outputs = tuple(n for n in pytree.tree_leaves(graph.output_node().args[0]) if n is not None)
    calls = [n for n in graph.nodes if n.op == "call_function"]
    sizes = {s for n in graph.nodes if is_tensor(n) for s in shape(n)}
    computing = tuple(n for n in calls if strip(n) is n and not _constant(n))
    return Pattern(graph, inputs, scalars, integers, outputs, computing, frozenset(sizes))


def again(pattern: Pattern) -> Pattern:
    """A pattern that was traced, copied."""
    graph = copied(pattern.graph)
    names = dict(zip(graph.find_nodes(op="placeholder"), pattern.inputs.values(), strict=True))
    return pattern_of(graph, names, pattern.scalars, pattern.integers)


def _constant(node: Any) -> bool:
    """A 0-d number, which is read as a literal."""
    return literal(node) is not node
