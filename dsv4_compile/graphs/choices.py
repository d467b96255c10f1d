"""Chosen elements, rows by index, and counts, written in one way."""

import operator
from typing import Any

import torch
from torch import fx
from torch.fx import Node

from .forms import NOT
from .graph import (
    CAST,
    END,
    IOTA,
    RESHAPES,
    aten,
    head,
    inherit,
    is_tensor,
    known,
    same_shape,
    shape,
    size_node,
    strip,
    value,
)
from .writer import Writer, args, escapes, form, is_call, number

SORTS = aten.sort.default, aten.sort.stable


@form(aten.slice.Tensor)
def best(w: Writer, node: Node) -> Node | None:
    """The first k of a descending order, in which equals may stand as they like, as topk."""
    given = args(node)
    x, dim, start, end, step = given + (0, 0, END, 1)[len(given) - 1 :]
    if not (is_call(x, operator.getitem) and is_call(x.args[0], *SORTS)) or step != 1 or start not in (0, None):
        return None
    order, part = x.args
    rank = len(shape(x))
    settings: dict[str, Any] = {"stable": None, "dim": -1, "descending": False} | dict(order.kwargs)
    names = ("dim", "descending") if order.target is aten.sort.default else ("stable", "dim", "descending")
    settings |= dict(zip(names, order.args[1:], strict=False))
    along = settings["dim"] % rank
    if settings["stable"] or not settings["descending"] or dim % rank != along or not isinstance(end, int):
        return None
    if not (end > 0 and known(end <= shape(x)[along])):
        return None
    new = w.make(node, operator.getitem, w.make(node, aten.topk.default, order.args[0], end, along), part)
    return new if w.laid_out(node, value(new)) else None


# Rows


@form(aten.gather.default)
def places(w: Writer, node: Node) -> Node | None:
    """take_along_dim counts negative places from the end; topk gives none, and a lower limit leaves none."""
    x, dim, index = args(node)
    if not (is_call(index, aten.remainder.Scalar) and known(index.args[1] == shape(x)[dim])):
        return None
    source = strip(index.args[0])
    topk = source.target is operator.getitem and is_call(source.args[0], aten.topk.default)
    limited = is_call(source, aten.clamp_min.default) and isinstance(source.args[1], int) and source.args[1] >= 0
    return w.make(node, aten.gather.default, x, dim, index.args[0]) if topk or limited else None


@form(aten.gather.default)
def whole_rows(w: Writer, node: Node) -> Node | None:
    """x[b, index[b, i], :] for one index a row."""
    x, dim, wide = args(node)
    index = row_numbers(w, node, x, wide) if len(shape(x)) == 3 and dim % 3 == 1 else None
    if index is None:
        return None
    return w.make(node, aten.index.Tensor, x, [counted(w, node, shape(x)[0], (shape(x)[0], 1)), index])


@form(aten.scatter.src)
def written_rows(w: Writer, node: Node) -> Node | None:
    """Whole rows written at one index each."""
    x, dim, wide, rows = args(node)
    if len(shape(x)) != 3 or dim % 3 != 1 or not same_shape(shape(rows), shape(wide)):
        return None
    index = row_numbers(w, node, x, wide)
    if index is None:
        return None
    return w.make(node, aten.index_put.default, x, [counted(w, node, shape(x)[0], (shape(x)[0], 1)), index], rows)


def row_numbers(w: Writer, node: Node, x: Node, wide: Any) -> Node | None:
    """The index [B, n] that all columns of x [B, S, C] share."""
    while is_call(wide, aten.clone.default):
        wide = wide.args[0]
    if not is_call(wide, aten.expand.default):
        return None
    (B, _, C), one, (batch, count, columns) = shape(x), wide.args[0], shape(wide)
    if not (known(batch == B) and known(columns == C) and len(shape(one)) == 3):
        return None
    if not (same_shape(shape(one)[1:], (count, 1)) and (known(shape(one)[0] == 1) or known(shape(one)[0] == batch))):
        return None
    index = w.make(node, aten.view.default, one, list(shape(one)[:2]))
    return w.make(node, aten.expand.default, index, [batch, count])


def counted(w: Writer, like: Node, n: Any, sizes: tuple[Any, ...]) -> Node:
    """0 to n - 1 in a shape."""
    settings = dict(start=0, step=1, dtype=torch.int64, device=value(like).device, requires_grad=False)
    number = w.graph.call_function(IOTA, (size_node(w.graph, n),), settings)
    number.meta["val"] = IOTA(n, **settings)
    inherit(number, like)
    return w.make(like, aten.view.default, w.settle(number), list(sizes))


@form(aten.view.default, aten._unsafe_view.default)
def rows_of_lists(w: Writer, node: Node) -> Node | None:
    """Rows chosen by lists that were put end to end, and parted again, by the lists as they are."""
    rows = args(node)[0]
    if not is_call(rows, aten.index.Tensor) or len(rows.args[1]) != 2 or None in rows.args[1]:
        return None
    x, (batch, index) = rows.args
    lead = shape(node)[:-1]
    if not is_call(strip(batch), IOTA) or len(shape(x)) != 3 or not same_shape(shape(batch), (shape(x)[0], 1)):
        return None
    if len(lead) < 3 or not known(lead[0] == shape(x)[0]) or not known(shape(node)[-1] == shape(x)[-1]):
        return None
    parted = before_flattening(w, index, lead)
    if parted is None:
        return None
    batch = w.make(node, aten.view.default, batch, [lead[0], *[1] * (len(lead) - 1)])
    return w.make(node, aten.index.Tensor, x, [batch, parted])


def before_flattening(w: Writer, x: Any, sizes: tuple[Any, ...]) -> Node | None:
    """What has these sizes below views of x, and below a limit."""
    while is_call(x, *RESHAPES):
        x = x.args[0]
        if same_shape(shape(x), sizes):
            return x
    if is_call(x, aten.clamp_min.default):
        inner = before_flattening(w, x.args[0], sizes)
        return None if inner is None else w.make(x, x.target, inner, x.args[1])
    return None


@form(aten.copy.default)
def written(w: Writer, node: Node) -> Node | None:
    """What is written over all of a tensor."""
    old, new = args(node)[:2]
    fits = is_tensor(new) and value(new).dtype == value(old).dtype and same_shape(shape(new), shape(old))
    return new if fits and not escapes(node) and w.laid_out(node, value(new)) else None


@form(aten.slice_scatter.default)
def last_columns(w: Writer, node: Node) -> Node | None:
    """The last columns of what was computed, written over."""
    given = args(node)
    x, rows, dim, start, _, step = given + (0, 0, END, 1)[len(given) - 2 :]
    last = len(shape(x)) - 1
    if dim % len(shape(x)) != last or step != 1 or not isinstance(start, int) or x.op == "placeholder":
        return None
    if not known(shape(rows)[last] + start % shape(x)[last] == shape(x)[last]) or start == 0:
        return None
    return w.make(node, aten.cat.default, [w.make(node, aten.slice.Tensor, x, last, 0, start), rows], last)


# Counts


@form(aten.cumsum.default)
def ends(w: Writer, node: Node) -> Node | None:
    """How often each number is among x, added up, as the place in the sorted x where the number ends."""
    counts, dim = args(node)[:2]
    if len(shape(counts)) != 1 or dim not in (0, -1) or node.kwargs:
        return None
    x = histogrammed(counts)
    if x is None:
        return None
    order = fx.Proxy(w.graph.call_function(aten.sort.stable, (x,), {"stable": True}))
    order.node.meta["val"] = aten.sort.stable(value(x), stable=True)
    inherit(order.node, node)
    place = w.make(node, operator.getitem, w.settle(order.node), 1)
    numbers = counted(w, node, shape(counts)[0], shape(counts))
    new = w.graph.call_function(
        aten.searchsorted.Tensor, (w.make(node, aten.index.Tensor, x, [place]), numbers), {"right": True}
    )
    new.meta["val"] = aten.searchsorted.Tensor(*map(value, new.args), right=True)
    inherit(new, node)
    return w.settle(new)


def histogrammed(counts: Any) -> Node | None:
    """x of the numbers [n] of elements of x that are 0, 1 ... n - 1, if none is below."""
    source = strip(counts)
    counted = source
    if is_call(source, aten.slice.Tensor) and args(source)[2:3] in ((), (0,)) and args(source)[4:] in ((), (1,)):
        counted = strip(args(source)[0])  # how many there are is known of a part only
    if is_call(counted, aten.bincount.default):  # which refuses what is below
        return args(counted)[0] if args(counted)[1:2] in ((), (None,)) else None
    if is_call(source, aten.scatter_add.default):
        zeros, _, x, ones = args(source)
        return x if number(zeros) == 0 and number(ones) == 1 and len(shape(x)) == 1 else None
    if not is_call(source, aten.sum.dim_IntList) or args(source)[1] != [0]:
        return None
    same = args(source)[0]
    while is_call(same, CAST):
        same = args(same)[0]
    if not is_call(same, aten.eq.Tensor) or not all(map(is_tensor, args(same))) or len(shape(same)) != 2:
        return None
    column, row = args(same) if is_call(strip(args(same)[1]), IOTA) else args(same)[::-1]
    numbers = strip(row)
    if not is_call(numbers, IOTA) or (numbers.kwargs["start"], numbers.kwargs["step"]) != (0, 1):
        return None
    x = column
    while is_call(x, *RESHAPES) and len(shape(x)) != 1:
        x = x.args[0]
    across = len(shape(row)) == 1 or known(shape(row)[0] == 1)
    fits = across and len(shape(x)) == 1 and same_shape(shape(column), (*shape(x), 1))
    return x if fits and never_negative(x) else None


def never_negative(x: Node) -> bool:
    """Places that topk gave, or numbers of which the graph asserts it, as one_hot does."""
    source = strip(x)
    if source.target is operator.getitem and is_call(source.args[0], aten.topk.default):
        return True
    tests = [u for u in x.users if is_call(u, aten.lt.Scalar) and u.args[1] == 0]
    none = [n for test in tests for some in test.users if head(some) == "aten.any" for n in some.users]
    return any(is_call(n, *NOT) and any(head(u) == "aten._assert_async" for u in n.users) for n in none)
