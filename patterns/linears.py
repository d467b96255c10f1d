"""Linear layers that read the same few vectors, on a GPU: one launch reads all of their weights. An RMSNorm that nobody else
reads is made on the way."""

from typing import Any

from torch.fx import Node

from dsv4_compile.lowerings.linear import linear, linear_wide
from dsv4_compile.lowerings.linears import LINEARS, MOST, NORMED
from dsv4_compile.lowerings.norm import rms_norm
from dsv4_compile.match import Found, Made, Rule, finder, head, known, shape, value
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


def together(node: Node, formats: int) -> list[Node]:
    """What reads the vectors that this one reads, and one launch takes: those of its kind, and of the first other kinds."""
    found = [r for r in readers(node.args[0]) if stored(r)[2] is None]
    kinds = list(dict.fromkeys(kind(r) for r in (found if formats > 1 else [node])))[:formats]
    return [r for r in found if kind(r) in kinds]


def normed(x: Any, alike: list[Node]) -> tuple[dict[str, Any], list[Node]] | None:
    """The arguments of an RMSNorm that is x, and all between it and its readers, if there are no others."""
    norm, inner = below(x), []
    if head(norm) != "dsv4.rms_norm":
        return None
    a = rms_norm.arguments(*norm.args)
    open_, sizes = [norm], shape(x)
    while open_:
        node = open_.pop()
        inner.append(node)
        if any(user not in alike and head(user) not in RESHAPES for user in node.users):
            return None
        open_.extend(user for user in node.users if user not in alike)
    columns = known(shape(norm)[-1] == sizes[-1])
    return (
        ({"x": Made(lambda x: x.reshape(sizes), (a["x"],)), "norm": a["weight"], "eps": a["eps"]}, inner)
        if columns
        else None
    )


def of_count(count: int, anchor: str, with_norm: bool) -> Rule:
    def several(node: Node) -> Found | str | None:
        x = node.args[0]
        if not few_on_gpu(x, 0) or stored(node)[2] is not None:
            return None
        alike = together(node, formats=1 if with_norm else 2)[:MOST]
        if len(alike) != count or node is not next((r for r in alike if head(r) == anchor), None):
            return None
        wide = sum(1 << i for i, r in enumerate(alike) if head(r) == "dsv4.linear_wide")
        vectors, inner = {"x": x}, alike
        if with_norm:
            found = normed(x, alike)
            if found is None:
                return None
            vectors, inner = found[0], [*found[1], *alike]
        weights = {f"w{i}": stored(r)[0] for i, r in enumerate(alike)}
        scales = {f"s{i}": stored(r)[1] for i, r in enumerate(alike)}
        return Found({**vectors, **weights, "wide": wide, **scales}, alike, inner)

    several.__name__ = f"{'normed_' * with_norm}{anchor.removeprefix('dsv4.')}_of_{count}"
    return finder((NORMED if with_norm else LINEARS)[count], name="fuse.linears", anchor=ANCHORS[anchor])(several)


# Largest first: what is left over of more than MOST is found by the rules behind it.
ALL = tuple(
    of_count(count, anchor, with_norm)
    for with_norm, counts in ((True, NORMED), (False, LINEARS))
    for count in sorted(counts, reverse=True)
    for anchor in ANCHORS
)
