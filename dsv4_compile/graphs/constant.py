"""Values that a graph computes from nothing, such as a causal mask: worked out while compiling."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node
from torch.fx.node import map_arg

from .graph import is_tensor, value

LARGEST = 1 << 26  # elements of a tensor that is worked out


Read = TypeVar("Read")


def constant(node: Node, read: Callable[[torch.Tensor], Read]) -> Read | None:
    """`read` of the numbers that `node` holds, on the CPU, if no input of the graph has a part in them; None if one has, or
    if they are too many."""
    needed = _ancestors(node)
    if needed is None:
        return None
    done: dict[Node, torch.Tensor] = {}
    with unset_fake_temporarily(), torch.no_grad():
        for n in node.graph.nodes:
            if n in needed:
                kwargs = {k: torch.device("cpu") if k == "device" else a for k, a in n.kwargs.items()}
                done[n] = n.target(*map_arg(n.args, done.__getitem__), **map_arg(kwargs, done.__getitem__))
        return read(done[node])


def _ancestors(node: Node) -> set[Node] | None:
    found: set[Node] = set()
    todo = [node]
    while todo:
        n = todo.pop()
        if n in found:
            continue
        if n.op != "call_function" or n.is_impure() or not is_tensor(n) or not _small(value(n)):
            return None
        found.add(n)
        todo.extend(n.all_input_nodes)
    return found


def _small(x: torch.Tensor) -> bool:
    return all(isinstance(s, int) for s in x.shape) and x.numel() <= LARGEST
