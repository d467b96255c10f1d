"""What no rewrite takes, and why it is left to Inductor: one table of reasons. What has none may be a pattern that is missing.

A node is judged by what it computes and from what, never by its name or line, so the table holds for any model.
"""

import operator
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx import Node

from ..graphs.graph import CAST, aten, head, is_cast, is_tensor, is_view, term, users, value, where
from ..graphs.instances import module_path

REASONS = {
    "product": "a product of plain matrices: on a CPU, and on a GPU for many tokens, the vendor's library is the fast one",
    "lookup": "rows read by number (embedding, hash table, places in a window): one gather, without arithmetic",
    "cache": "rows put beside or over those of a cache: memory is moved, nothing is computed",
    "positions": "integers and masks from positions: a few numbers a token, made once and shared by the layers",
    "angles": "RoPE's angles of the positions: made once and shared by the layers",
    "constant": "made from nothing",
    "join": "one addition to a result, of another, a row or a bias: Inductor puts it into what stands beside it",
    "factor": "a result times a number: Inductor puts it into what stands beside it",
    "codes": "rows of a cache in fewer bits: their scales, and they divided by these; one loop of Inductor's",
    "layout": "another look at the same memory, or a cast or copy that goes into what reads it",
    "": "no reason is known: a pattern may be missing",
}

LAYOUT = {aten.permute.default, aten.slice.Tensor, aten.select.int, aten.split.Tensor, operator.getitem}
LAYOUT |= {aten.split_with_sizes.default, aten.transpose.int, aten.t.default}
PRODUCTS = {"aten.mm"}
LOOKUPS = {"aten.embedding", "aten.index", "aten.gather", "aten.index_select"}
MOVES = {"aten.cat", "aten.copy", "aten.copy_", "aten.index_put", "aten.index_put_", "aten.slice_scatter"}
MOVES |= {"aten.select_scatter"}
MADE = {"aten.full", "aten.scalar_tensor", "prims.iota", "aten.empty"}
ANGLES = {"aten.cos", "aten.sin"}
QUANTIZES = {"aten.abs", "aten.amax", "aten.mul", "aten.clamp_min", "aten.view", "aten.div"}


@dataclass(frozen=True)
class Left:
    """`times` nodes of one ATen op that no rewrite took, at one line of one module."""

    op: str
    reason: str
    layer: str
    where: str
    times: int = 1


def unclaimed(graph: fx.Graph) -> list[Left]:
    """Everything in a rewritten graph that computes a tensor and is no op of ours, in the order in which it runs."""
    found: Counter[tuple[str, str, str, str]] = Counter()
    for node in graph.nodes:
        if node.op == "call_function" and is_tensor(node) and not head(node).startswith("dsv4."):
            found[head(node), reason(node), module_path(node), where(node)] += 1
    return [Left(*key, times) for key, times in found.items()]


def reason(node: Node) -> str:
    """A key of REASONS."""
    if node.target in LAYOUT or is_view(node) or is_cast(node):
        return "layout"
    name = head(node)
    if name in MADE:
        return "constant"
    if name in MOVES or writes_rows(node):
        return "cache"
    if name in LOOKUPS:
        return "lookup"
    if not value(node).dtype.is_floating_point:
        return "positions"
    if name in PRODUCTS:
        return "product"
    if is_angle(node):
        return "angles"
    if name == "aten.add" and all(is_result(x) or is_given(x) for x in term(node).operands):
        return "join"
    if is_factor(node):
        return "factor"
    return "codes" if of_codes(node) else ""


def is_result(x: Any) -> bool:
    """Whether a value comes out of an op of ours, a product or a lookup, times numbers perhaps."""
    if not is_tensor(x):
        return False
    root = origin(x)
    return head(root).startswith("dsv4.") or head(root) in PRODUCTS | LOOKUPS or is_factor(root)


def is_factor(node: Node) -> bool:
    """A result times a number."""
    if head(node) != "aten.mul":
        return False
    tensors = [x for x in term(node).operands if is_tensor(x)]
    return len(tensors) == 1 and is_result(tensors[0])


def is_given(x: Any) -> bool:
    """Whether a value is an input of the graph, such as a bias."""
    return is_tensor(x) and origin(x).op == "placeholder"


def origin(x: Node) -> Node:
    """The node that computed the value, or its first part, before it was moved, cut and cast."""
    while is_view(x) or is_cast(x) or x.target in LAYOUT or head(x) in MOVES:
        x = x.all_input_nodes[0]
    return x


def is_angle(node: Node) -> bool:
    """Cosine, sine, and what is computed for them alone."""
    if head(node) in ANGLES:
        return True
    made_of = node.target is CAST or head(node) == "aten.mul"
    return made_of and any(True for _ in users(node)) and all(is_angle(u) for u in users(node))


def of_codes(node: Node) -> bool:
    """Scales of rows that a cache gets, and the rows over them."""
    if head(node) in MOVES or head(node) == "dsv4.append":
        return True
    if not is_tensor(node) or (head(node) not in QUANTIZES and value(node).dtype != torch.int32):
        return False
    return any(True for _ in users(node)) and all(of_codes(u) for u in users(node))


def writes_rows(node: Node) -> bool:
    """Rows chosen between old and new ones, for a cache."""
    return head(node) == "aten.where" and any(True for _ in users(node)) and all(head(u) in MOVES for u in users(node))


def summed(left: Iterable[Left]) -> list[tuple[str, dict[str, int], list[str]]]:
    """By reason, in the table's order: how many of each op, and the model's lines."""
    found: dict[str, tuple[Counter[str], dict[str, None]]] = {}
    for part in left:
        ops, lines = found.setdefault(part.reason, (Counter(), {}))
        ops[part.op] += part.times
        lines[part.where.split(" ")[0]] = None
    return [(name, dict(found[name][0].most_common()), list(found[name][1])) for name in REASONS if name in found]
