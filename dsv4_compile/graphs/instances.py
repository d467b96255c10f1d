"""Which layer a node belongs to, and region bodies written out call by call so that every node belongs to one."""

import re
from collections import Counter
from typing import Any

import torch
from torch import fx
from torch.fx import Node

_ROOT = re.compile(r"^L\['[^']*'\]\.?")
_SPECIAL = re.compile(r"[\[\]'\"*?,.\s]+")  # what has a meaning in the option `sites`
PLACE = "dsv4_place"  # (module path, number of the node in that module), in node.meta


def module_path(node: Node) -> str:
    """The module whose code made the node, such as `layers.3.ffn`; "root" for the outermost one or an unknown one."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    path = _ROOT.sub("", paths[-1]) if paths else ""
    return _SPECIAL.sub(".", path).strip(".") or "root"


def number(graph: fx.Graph) -> None:
    """Give every call its place: its module, and how many calls of that module come before it. Two compiles of one model
    number alike, whatever is rewritten afterwards."""
    before: Counter[str] = Counter()
    for node in graph.nodes:
        if node.op == "call_function":
            path = module_path(node)
            node.meta[PLACE] = path, before[path]
            before[path] += 1


def site_id(rule: str, anchor: Node) -> str:
    """Name of a rewrite: `fuse.moe/grouped@layers.3.ffn.experts#41`, rule, module and the anchor's number in it."""
    path, place = anchor.meta.get(PLACE, ("root", -1))
    return f"{rule}@{path}#{place}"


def inline_regions(gm: fx.GraphModule) -> None:
    """Replace each call of a region body in Dynamo's graph by a copy of the body, in place."""
    first: dict[str, str] = {}  # body -> path of the module that it was traced in
    for call in list(gm.graph.nodes):
        if call.target is not torch.ops.higher_order.invoke_subgraph:
            continue
        holder, _, *operands = call.args
        body = getattr(gm, holder.target)
        inline_regions(body)
        traced_in = first.setdefault(holder.target, _path(call))
        with gm.graph.inserting_before(call):
            outputs = _copied(gm, body, operands, call, traced_in)
        for item in list(call.users):
            item.replace_all_uses_with(outputs[item.args[1]])
            gm.graph.erase_node(item)
        gm.graph.erase_node(call)
        if not holder.users:
            gm.graph.erase_node(holder)
    for name in first:
        delattr(gm, name)
    if first:
        gm.recompile()


def _path(node: Node) -> str:
    """The innermost module path as Dynamo writes it."""
    return next((entry[0] for entry in reversed((node.meta.get("nn_module_stack") or {}).values())), "")


def _copied(gm: fx.GraphModule, body: fx.GraphModule, operands: Any, call: Node, traced_in: str) -> Any:
    """The nodes of the body, applied to the operands of one call; returns what it returns."""
    copies: dict[Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), operands, strict=True))
    here = _path(call)
    for node in body.graph.nodes:
        if node.op == "output":
            return fx.node.map_arg(node.args[0], copies.__getitem__)
        if node.op == "placeholder":
            continue
        copies[node] = copy = gm.graph.node_copy(node, copies.__getitem__)
        if node.op == "get_attr":
            copy.target = f"{node.target}_of_{call.name}".replace(".", "_")
            setattr(gm, copy.target, _attribute(body, node.target))
        copy.meta["nn_module_stack"] = {
            f"{key} {here}": (here + path.removeprefix(traced_in) if path.startswith(traced_in) else path, kind)
            for key, (path, kind) in (node.meta.get("nn_module_stack") or {}).items()
        }
    raise AssertionError("a graph without an output")


def _attribute(module: Any, path: Any) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module
