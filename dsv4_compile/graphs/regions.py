"""Calls of region bodies, in a form that Inductor takes."""

from typing import Any

import torch
from torch import fx
from torch.fx import Node
from torch.utils._pytree import tree_map

from .graph import is_tensor, value

E8M0, AS = torch.float8_e8m0fnu, torch.ops.aten.view.dtype


def scales_as_bytes(graph: fx.Graph) -> None:
    """Hand float8_e8m0fnu tensors to region bodies as uint8, viewed back inside.

    Inductor treats any node with an e8m0 input as one that it cannot generate code for, calls of bodies included: one that
    writes to its arguments then dies with "auto_functionalized_v2 was not removed". Views of e8m0 it allows.
    """
    seen: set[fx.Graph] = set()
    for call in list(graph.nodes):
        found = body_of(call)
        if found is None:
            continue
        body, arguments = found
        places = body.find_nodes(op="placeholder")
        taken = [(i, x) for i, x in arguments.items() if is_tensor(x) and value(x).dtype == E8M0]
        for _, x in taken:
            with graph.inserting_before(call):
                call.replace_input_with(x, viewed(graph, x, torch.uint8))
        if "eager_input_vals" in call.meta:  # where Inductor looks up what the body takes
            call.meta["eager_input_vals"] = tree_map(as_bytes, call.meta["eager_input_vals"])
        if body not in seen:
            seen.add(body)
            for i, _ in taken:
                restore(body, places[i], places[-1])
            body.owning_module.recompile()  # Inductor traces the module again, by its code


def body_of(call: Node) -> tuple[fx.Graph, dict[int, Node]] | None:
    """The body that a node calls and what it hands over, by the body's input; tensors that it writes to left out."""
    higher = torch.ops.higher_order
    if call.target is higher.invoke_subgraph:
        subgraph, arguments = call.args[0], dict(enumerate(call.args[2:]))
    elif call.target is higher.auto_functionalized_v2 and call.args[0] is higher.invoke_subgraph:
        subgraph = call.kwargs["subgraph"]
        named = {k.removeprefix("arg"): v for k, v in call.kwargs.items()}
        arguments = {int(k): v for k, v in named.items() if k.isdigit()}
    else:
        return None
    assert isinstance(subgraph, Node) and isinstance(subgraph.target, str)
    body = getattr(call.graph.owning_module, subgraph.target).graph
    return body, {i: x for i, x in arguments.items() if isinstance(x, Node)}


def as_bytes(x: Any) -> Any:
    return x.view(torch.uint8) if isinstance(x, torch.Tensor) and x.dtype == E8M0 else x


def viewed(graph: fx.Graph, x: Node, dtype: torch.dtype) -> Node:
    node = graph.call_function(AS, (x, dtype))
    node.meta["val"] = value(x).view(dtype)
    return node


def restore(body: fx.Graph, place: Node, last: Node) -> None:
    """Make an input of the body bytes, and give its users the scale again."""
    place.meta["val"] = value(place).view(torch.uint8)
    with body.inserting_after(last):
        scale = viewed(body, place, E8M0)
    place.replace_all_uses_with(scale, delete_user_cb=lambda user: user is not scale)
