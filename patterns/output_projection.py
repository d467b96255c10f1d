"""A grouped linear layer, its groups put side by side, and a linear layer; weights plain or stored. Views are told by strides:
einsum permutes as it likes."""

from typing import Any

from torch.fx import Node

from dsv4_compile.lowerings.linear import grouped_linear, linear
from dsv4_compile.lowerings.output_projection import output_projection
from dsv4_compile.match import Found, finder, head, is_view, known, shape, strip, value


@finder(output_projection, name="fuse.output_projection", anchor="mm")
def onto_plain(product: Node) -> Found | str | None:
    u, w = operands(product)
    return projected(product, u, [w.args[0], None, None], [w]) if head(w) == "aten.permute" else None


@finder(output_projection, name="fuse.output_projection", anchor=linear)
def onto_stored(product: Node) -> Found | str | None:
    u, *b = operands(product)
    return projected(product, u, b, [])


def operands(call: Node) -> tuple[Any, ...]:
    return call.args


def projected(product: Node, u: Any, b: list[Any], inner: list[Node]) -> Found | str | None:
    beside = strip(u)
    groups = strip(beside.args[0]) if head(beside) == "aten.permute" else beside
    if head(groups) == f"dsv4.{grouped_linear.name}":
        x, *a = operands(groups)
    elif head(groups) == "aten.bmm":
        x, turned = operands(groups)
        *views, weight = rows_of_groups(turned)
        if weight is None:
            return None
        a, inner = [weight, None, None], [*inner, *views]
    else:
        return None
    if not group_after_group(beside, shape(groups)) or not known(value(u).numel() == value(groups).numel()):
        return f"the channels of {shape(groups)[0]} groups, one group after the other"
    names = ("a", "a_scale", "a_scale_2", "b", "b_scale", "b_scale_2")
    arguments = {"x": x, **dict(zip(names, [*a, *b], strict=True))}
    return Found(arguments, [product], [*inner, beside, groups, product])


def rows_of_groups(turned: Node) -> list[Any]:
    """The views from [G, K, R] down to a weight [G R, K] whose rows are those of the groups, and the weight; else None."""
    (G, K, R), views = shape(turned), []
    straight = all(known(a == b) for a, b in zip(value(turned).stride(), (R * K, 1, K), strict=True))
    node: Any = turned
    while straight and (is_view(node) or head(node) == "aten.permute"):
        views.append(node)
        node = node.args[0]
        if len(shape(node)) == 2 and known(shape(node)[0] == G * R) and known(shape(node)[1] == K):
            return [*views, node]
    return [None]


def group_after_group(u: Node, sizes: tuple[Any, ...]) -> bool:
    """Whether u, a view of [G, M, R] in order, reads tokens [M], G and R from the outermost axis on; M may be several axes."""
    G, M, R = sizes
    axes = [(n, stride) for n, stride in zip(shape(u), value(u).stride(), strict=True) if not known(n == 1)]
    channels = [(n, stride) for n, stride in ((G, M * R), (R, 1)) if not known(n == 1)]
    tokens, last = axes[: len(axes) - len(channels)], axes[len(axes) - len(channels) :]
    inner = [*(n * stride for n, stride in tokens[1:]), R]  # what each axis of tokens steps over
    return same(last, channels) and same([stride for _, stride in tokens], inner[: len(tokens)] if tokens else [])


def same(a: list[Any], b: list[Any]) -> bool:
    flat_a, flat_b = ([i for x in xs for i in (x if isinstance(x, tuple) else (x,))] for xs in (a, b))
    return len(flat_a) == len(flat_b) and all(known(i == j) for i, j in zip(flat_a, flat_b, strict=True))
