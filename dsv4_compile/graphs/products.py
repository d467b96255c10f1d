"""Batched products, written in one way."""

import math
from typing import Any

from torch.fx import Node

from .graph import RESHAPES, VIEWS, aten, is_cast, is_tensor, known, reshaped, same_shape, shape, users, value
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
def outer(w: Writer, node: Node) -> Node | None:
    """Of a column and a row each, elementwise: torch writes them so from 2.13 on."""
    a, b = args(node)
    return w.make(node, aten.mul.Tensor, a, b) if known(shape(a)[2] == 1) else None


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
def composed(w: Writer, node: Node) -> Node | None:
    """Two permutations as one; one that is undone, through whatever views, as none."""
    x, order = args(node)
    if not moves(node):
        return None
    if is_call(x, aten.permute.default):
        if not moves(x):
            return None
        y, both = x.args[0], [x.args[1][d] for d in order]
        calm = still(y, both) == sorted(both)
        return in_shape(w, y, shape(node), node) if calm else w.make(node, aten.permute.default, y, both)
    root, axes = arrangement(node)
    order = [d for group in axes for d in group]
    if root is node or order != sorted(order) or not any(map(moves, way(x, root))):
        return None
    return in_shape(w, root, shape(node), node)


def moves(x: Node) -> bool:
    """Whether this is a permutation that moves an axis longer than 1: the others look alike for one token only."""
    return is_call(x, aten.permute.default) and still(args(x)[0], args(x)[1]) != sorted(args(x)[1])


def way(x: Any, root: Node) -> list[Node]:
    """Views and permutations from x down to `root`."""
    found = []
    while x is not root:
        found.append(x)
        x = x.args[0]
    return found


def arrangement(x: Node) -> tuple[Node, list[list[int]]]:
    """What x is views and permutations of, and which of its axes, those of size 1 left out, each axis of x is."""
    steps: list[Any] = [x]
    while is_call(steps[-1], aten.permute.default, *RESHAPES) and not repeats(steps[-1].args[0]):
        steps.append(steps[-1].args[0])
    root, axes = steps[-1], own_axes(steps[-1])
    for step in reversed(steps[:-1]):
        if is_call(step, aten.permute.default):
            axes = [axes[d] for d in step.args[1]]
        elif (grouped := regrouped(axes, shape(root), shape(step))) is not None:
            axes = grouped
        else:
            root, axes = step, own_axes(step)
    return root, axes


def repeats(x: Any) -> bool:
    """Whether elements of x share memory: a copy of it is another tensor."""
    return any(known(stride == 0) for stride in value(x).stride())


def own_axes(x: Node) -> list[list[int]]:
    return [[] if known(n == 1) else [d] for d, n in enumerate(shape(x))]


def regrouped(axes: list[list[int]], sizes: tuple[Any, ...], wanted: tuple[Any, ...]) -> list[list[int]] | None:
    """The axes of a view of these sizes; None if it parts one."""
    rest, found = [d for group in axes for d in group], []
    for n in wanted:
        group: list[int] = []
        while rest and not known(math.prod(sizes[d] for d in group) == n):
            group.append(rest.pop(0))
        if not known(math.prod(sizes[d] for d in group) == n):
            return None
        found.append(group)
    return None if rest else found


@form(aten.sum.dim_IntList)
def of_turned(w: Writer, node: Node) -> Node | None:
    """A sum over the last axis of products whose sides were both turned for it, over the axis where it was."""
    product, dims = args(node)[:2]
    last = len(shape(product)) - 1
    if not is_call(product, aten.mul.Tensor) or list(dims) not in ([last], [-1]):
        return None
    if not all(is_tensor(x) and same_shape(shape(x), shape(product)) for x in product.args):
        return None
    (x, axes), (y, others) = map(arrangement, product.args)
    (*rest, summed) = axes
    order = [d for group in rest for d in group]
    if axes != others or len(summed) != 1 or order != sorted(order) or not same_shape(shape(x), shape(y)):
        return None
    if order == list(range(len(order))) and summed[0] == len(order):
        return None  # it was there
    total = w.make(node, aten.sum.dim_IntList, w.make(node, aten.mul.Tensor, x, y), [summed[0]], True)
    return in_shape(w, total, shape(node), node)


def across(matrices: Node, along: int, depth: int) -> bool:
    """Whether the elements that are added do not lie side by side where they come from: those of a product with stored
    weights do, however they were copied since."""
    rows, columns = shape(matrices)[1:]
    source: Any = matrices
    while is_call(source, *VIEWS) or is_cast(source):
        source = source.args[0]
        if same_shape(shape(source)[-2:], (rows, columns)):
            matrices = source
    strides = value(matrices).stride()
    return known(strides[along] == 1) and not known(strides[depth] == 1) and not known(shape(matrices)[along] == 1)


def stands_alone(x: Any) -> bool:
    """Whether a batch of rows or columns is one of vectors, with a new axis."""
    many, rows, columns = shape(x)
    if not (known(rows == 1) or known(columns == 1)):
        return False
    added = False
    while is_call(x, *RESHAPES):
        added = added or is_call(x, aten.unsqueeze.default) or len(shape(x)) > len(shape(x.args[0]))
        x = x.args[0]
        if added and known(shape(x)[-1] == rows * columns) and known(math.prod(shape(x)[:-1]) == many):
            return True
    return False


@form(aten.permute.default)
def before_repetition(w: Writer, node: Node) -> Node | None:
    """What is repeated along axes of size 1 and then turned, as turned and then repeated; a view where only those move."""
    x, order = args(node)
    wide: Any = x
    while is_call(wide, *RESHAPES):
        wide = wide.args[0]
    if not is_call(wide, aten.expand.default):
        return None
    groups = regrouped([[d] for d in range(len(shape(wide)))], shape(wide), shape(x))
    if groups is None:
        return None
    y, axes = wide.args[0], [d for i in order for d in groups[i]]
    y = in_shape(w, y, (1,) * (len(axes) - len(shape(y))) + shape(y), node)
    calm = still(y, axes) == sorted(axes)
    y = in_shape(w, y, tuple(sizes(y, axes)), node) if calm else w.make(node, aten.permute.default, y, axes)
    return in_shape(w, w.make(node, aten.expand.default, y, sizes(wide, axes)), shape(node), node)


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


@form(aten.bmm.default)
def weighted_sum(w: Writer, node: Node) -> Node | None:
    """A sum of the rows of a matrix, each times its weight, where the weights were given an axis for the product."""
    a, b = args(node)
    (many, rows, columns), depth = shape(node), shape(a)[2]
    if value(node).dtype.itemsize < 4:
        return None  # products would be rounded
    if known(rows == 1) and known(columns == 1):
        vectors = (in_shape(w, x, (many, depth), node) for x in (a, b))
        total = w.make(node, aten.sum.dim_IntList, w.make(node, aten.mul.Tensor, *vectors), [1], True)
        return in_shape(w, total, (many, 1, 1), node)
    if stands_alone(a) and across(b, -1, -2):
        matrix, weights = b, a
    elif stands_alone(b) and across(a, -2, -1):
        matrix, weights = w.make(node, aten.permute.default, a, [0, 2, 1]), b
    else:
        return None
    column = in_shape(w, weights, (many, depth, 1), node)
    total = w.make(node, aten.sum.dim_IntList, w.make(node, aten.mul.Tensor, column, matrix), [1], True)
    return in_shape(w, total, (many, rows, columns), node)


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
