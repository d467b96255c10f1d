"""Batched products, written in one way."""

import math
from typing import Any

from torch.fx import Node

from .graph import RESHAPES, aten, known, reshaped, same_shape, shape, users
from .writer import Writer, args, form, is_call


@form(aten.permute.default)
def of_new_axis(w: Writer, node: Node) -> Node | None:
    """A new axis as the last step on the way into a product: einsum adds some and permutes twice."""
    x, order = args(node)
    if not (is_call(x, aten.unsqueeze.default) and multiplied(node)):
        return None
    y, new = x.args[0], x.args[1] % len(shape(x))
    rest = [d - (d > new) for d in order if d != new]
    if is_call(y, aten.permute.default):
        y, rest = y.args[0], [y.args[1][d] for d in rest]
    moved = w.make(node, aten.permute.default, y, still(y, rest))
    return w.make(
        node, aten.unsqueeze.default, w.make(node, aten.view.default, moved, sizes(y, rest)), order.index(new)
    )


@form(aten.permute.default)
def dropped_axis(w: Writer, node: Node) -> Node | None:
    """Axes of size 1 stay where they are behind a product if the last is dropped: einsum moves them about."""
    x, order = args(node)
    calm = still(x, order)
    drops = (u.target in RESHAPES and same_shape(shape(u), shape(node)[:-1]) for u in node.users)
    if calm == list(order) or not known(shape(node)[-1] == 1) or not all(drops):
        return None
    return w.make(node, aten.view.default, w.make(node, aten.permute.default, x, calm), sizes(x, order))


def still(x: Node, order: list[int]) -> list[int]:
    """The permutation `order` of the axes of x, but those of size 1 stay."""
    long = [d for d in order if not known(shape(x)[d] == 1)]
    places = dict(zip(sorted(long), long, strict=True))
    return [places.get(d, d) for d in range(len(order))]


def sizes(x: Node, order: list[int]) -> list[Any]:
    return [shape(x)[d] for d in order]


def multiplied(x: Node) -> bool:
    """Whether only batched products read x, through whatever views."""
    return all(multiplied(u) if is_call(u, aten.permute.default) else is_call(u, aten.bmm.default) for u in users(x))


@form(aten.bmm.default)
def one_matrix(w: Writer, node: Node) -> Node | None:
    """A batch of one that comes from two matrices, as einsum makes of a linear layer."""
    a, b = args(node)
    matrix, way = b, []
    while len(shape(matrix)) > 2 and is_call(matrix, aten.permute.default, *RESHAPES - {aten.clone.default}):
        way.append(matrix)
        matrix = matrix.args[0]
    if len(shape(matrix)) != 2:
        return None
    turned, now = False, shape(matrix)
    for step in reversed(way):  # views keep the order of elements; a permutation of two long axes turns the matrix
        if step.target is aten.permute.default:
            x, order = args(step)
            long = [d for d in order if not known(shape(x)[d] == 1)]
            if len(long) != 2 or not same_shape([shape(x)[d] for d in sorted(long)], now):
                return None
            if long[0] > long[1]:
                turned, now = not turned, now[::-1]
    if not same_shape((1, *now), shape(b)):
        return None
    matrix = w.make(node, aten.permute.default, matrix, [1, 0]) if turned else matrix
    rows = w.make(node, aten.view.default, a, list(shape(a)[1:]))
    return w.make(node, aten.unsqueeze.default, w.make(node, aten.mm.default, rows, matrix), 0)


@form(aten.permute.default)
def before_repetition(w: Writer, node: Node) -> Node | None:
    """What is repeated along axes of size 1 and then turned, as turned and then repeated."""
    x, order = args(node)
    if not is_call(x, aten.expand.default):
        return None
    y = x.args[0]
    y = in_shape(w, y, (1,) * (len(order) - len(shape(y))) + shape(y), node)
    return w.make(node, aten.expand.default, w.make(node, aten.permute.default, y, order), list(shape(node)))


@form(aten.bmm.default)
def repeated_side(w: Writer, node: Node) -> Node | None:
    """A product with a side that is the same along some axes of the batch: there the other side has more rows, or columns,
    and nothing is repeated."""
    a, b = args(node)
    for side, is_right in ((b, True), (a, False)):
        found = repetition(side)
        if found is not None:
            return once(w, node, b if side is a else a, *found, is_right)
    return None


def repetition(x: Node) -> tuple[Node, tuple[Any, ...], list[int]] | None:
    """What a batch of matrices is a repetition of, the axes of the batch, and those along which it repeats."""
    wide: Any = x
    while is_call(wide, *RESHAPES):
        wide = wide.args[0]
    if not is_call(wide, aten.expand.default):
        return None
    y, (*batch, rows, columns) = wide.args[0], shape(wide)
    before = (1,) * (len(batch) + 2 - len(shape(y))) + shape(y)
    if not same_shape((math.prod(batch), rows, columns), shape(x)) or not same_shape(before[-2:], (rows, columns)):
        return None
    along = [d for d, n in enumerate(batch) if known(before[d] == 1) and not known(n == 1)]
    return (y, tuple(batch), along) if along else None


def once(
    w: Writer, node: Node, other: Node, y: Node, batch: tuple[Any, ...], along: list[int], is_right: bool
) -> Node | None:
    """The product with y in the place of its repetition."""
    kept = [d for d in range(len(batch)) if d not in along]
    (many, rows, columns), last = shape(node), len(batch)
    depth = shape(other)[2 if is_right else 1]
    sizes_of = lambda axes: tuple(batch[d] for d in axes)  # noqa: E731
    groups, times = math.prod(sizes_of(kept)), math.prod(sizes_of(along))
    parted = in_shape(w, other, (*batch, *shape(other)[1:]), node)
    if is_right:
        order = [*kept, *along, last, last + 1]
        left = in_shape(w, turned(w, parted, order, node), (groups, times * rows, depth), node)
        right = in_shape(w, y, (groups, depth, columns), node)
    else:
        order = [*kept, last, *along, last + 1]
        left = in_shape(w, y, (groups, rows, depth), node)
        right = in_shape(w, turned(w, parted, order, node), (groups, depth, times * columns), node)
    product = w.make(node, aten.bmm.default, left, right)
    whole = (*batch, rows, columns)
    parted = in_shape(w, product, tuple(whole[d] for d in order), node)
    return in_shape(
        w, turned(w, parted, [order.index(d) for d in range(len(order))], node), (many, rows, columns), node
    )


def turned(w: Writer, x: Node, order: list[int], like: Node) -> Node:
    return x if order == sorted(order) else w.make(like, aten.permute.default, x, order)


def in_shape(w: Writer, x: Node, sizes: tuple[Any, ...], like: Node) -> Node:
    """x in another shape, copied where its strides forbid a view."""
    new = reshaped(w.graph, x, sizes, like)
    return new if new is x else w.settle(new)
