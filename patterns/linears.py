"""Linear layers that read the same few vectors, on a GPU: one launch reads all of their weights."""

from typing import Any

from torch.fx import Node

from dsv4_compile.lowerings.linear import linear, linear_wide
from dsv4_compile.lowerings.linears import LINEARS, MOST
from dsv4_compile.match import Found, Rule, finder, head, known, shape, value
from dsv4_compile.patterns.linear import RESHAPES, few_on_gpu

ANCHORS = {"dsv4.linear": linear, "dsv4.linear_wide": linear_wide}


def below(x: Any) -> Node:
    """Below views."""
    while head(x) in RESHAPES:
        x = x.args[0]
    return x


def readers(x: Any) -> list[Node]:
    """All linear layers of these vectors, through whatever view of them, in the order of the graph."""
    found, open_ = [], [below(x)]
    while open_:
        for user in open_.pop().users:
            if head(user) in RESHAPES:
                open_.append(user)
            elif head(user) in ANCHORS and same_vectors(user.args[0], x):
                found.append(user)
    order = {node: i for i, node in enumerate(x.graph.nodes)}
    return sorted(set(found), key=order.__getitem__)


def same_vectors(a: Any, b: Any) -> bool:
    (M, K), (N, L) = shape(a), shape(b)
    return known(M == N) and known(K == L)


def stored(node: Node) -> tuple[Node, Node | None, Node | None]:
    """Weight, scale and second scale."""
    args = node.args if head(node) == "dsv4.linear_wide" else linear.arguments(*node.args).values()
    _, weight, *scales = args
    return weight, *(scales or (None, None))


def kind(node: Node) -> tuple:
    """What is alike in matrices that one launch reads."""
    return tuple(None if s is None else value(s).dtype for s in stored(node))


def of_count(count: int, anchor: str) -> Rule:
    def several(node: Node) -> Found | str | None:
        x = node.args[0]
        if not few_on_gpu(x, 0) or stored(node)[2] is not None:
            return None
        alike = [r for r in readers(x) if kind(r) == kind(node)][:MOST]
        if len(alike) != count or node is not next(r for r in alike if head(r) == anchor):
            return None
        wide = sum(1 << i for i, r in enumerate(alike) if head(r) == "dsv4.linear_wide")
        weights = {f"w{i}": stored(r)[0] for i, r in enumerate(alike)}
        scales = {f"s{i}": stored(r)[1] for i, r in enumerate(alike)}
        return Found({"x": x, **weights, "wide": wide, **scales}, alike, alike)

    several.__name__ = f"{anchor.removeprefix('dsv4.')}_of_{count}"
    return finder(LINEARS[count], name="fuse.linears", anchor=ANCHORS[anchor])(several)


# Largest first: what is left over of more than MOST is found by the rules behind it.
ALL = tuple(of_count(count, anchor) for count in range(MOST, 1, -1) for anchor in ANCHORS)
