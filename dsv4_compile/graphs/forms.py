"""Arithmetic, limits, conditions and parts of tensors, written in one way."""

import math
import operator
from typing import Any

import torch
from torch.fx import Node

from .graph import END, RESHAPES, aten, is_tensor, known, same_shape, shape, value
from .writer import Writer, alike, args, both_ways, escapes, floating, form, is_call, number


@form(aten.mul.Tensor)
def square(w: Writer, node: Node) -> Node | None:
    """x x = x^2."""
    a, b = args(node)
    return w.make(node, aten.pow.Tensor_Scalar, a, 2) if a is b else None


@form(aten.mul.Tensor)
def product(w: Writer, node: Node) -> Node | None:
    """1 x = x; -1 x = -x; x (1 / y) = x / y; sum (1 / count) = mean."""
    for a, b in both_ways(node):
        if b == 1 and is_tensor(a):
            return w.make(node, aten.clone.default, a)  # which lies otherwise in memory, or it would be gone
        if is_tensor(a) and number(b) == -1:
            return w.make(node, aten.neg.default, a)
        if is_tensor(a) and is_call(b, aten.reciprocal.default):
            return w.make(node, aten.div.Tensor, a, b.args[0])
        if isinstance(b, float) and b:
            return mean(w, node, a, 1 / b)
    return None


@form(aten.div.Tensor)
def quotient(w: Writer, node: Node) -> Node | None:
    """x / number as a product; x / sqrt(y) = x rsqrt(y); x / (1 + e^-y) = x sigmoid(y)."""
    a, b = args(node)
    if not (is_tensor(a) and floating(a)):
        return None
    if isinstance(b, (int, float)):
        return mean(w, node, a, b) or (w.make(node, aten.mul.Tensor, a, 1 / b) if b else None)
    if is_call(b, aten.sqrt.default):
        return w.make(node, aten.mul.Tensor, a, w.make(node, aten.rsqrt.default, b.args[0]))
    y = logistic(b)
    return None if y is None else w.make(node, aten.mul.Tensor, a, w.make(node, aten.sigmoid.default, y))


def mean(w: Writer, node: Node, total: Any, count: float) -> Node | None:
    """A sum over as many elements as it is divided by."""
    while is_call(total, *RESHAPES):
        total = total.args[0]
    if not is_call(total, aten.sum.dim_IntList) or value(total).dtype != value(node).dtype:
        return None
    x, dims = total.args[:2]
    if not (dims and floating(x) and math.isclose(count, round(count))):
        return None
    if not known(math.prod(shape(x)[d] for d in dims) == round(count)):
        return None
    average = w.make(node, aten.mean.dim, x, dims, *total.args[2:3])
    return w.make(node, aten.view.default, average, list(shape(node)))


@form(aten.reciprocal.default)
def inverse(w: Writer, node: Node) -> Node | None:
    """1 / sqrt(x) = rsqrt(x); 1 / (1 + e^-x) = sigmoid(x)."""
    x = args(node)[0]
    if is_call(x, aten.sqrt.default):
        return w.make(node, aten.rsqrt.default, x.args[0])
    y = logistic(x)
    return None if y is None else w.make(node, aten.sigmoid.default, y)


def logistic(x: Any) -> Node | None:
    """y of 1 + e^-y."""
    for a, b in both_ways(x) if is_call(x, aten.add.Tensor) and len(x.args) == 2 else ():
        if is_call(a, aten.exp.default) and is_call(a.args[0], aten.neg.default) and number(b) == 1:
            return a.args[0].args[0]
    return None


@form(aten.pow.Tensor_Scalar)
def power(w: Writer, node: Node) -> Node | None:
    """Powers that have names; whole exponents as integers."""
    x, exponent = args(node)
    named = {0.5: aten.sqrt.default, -0.5: aten.rsqrt.default, -1: aten.reciprocal.default}
    if exponent in named and floating(x):
        return w.make(node, named[exponent], x)
    if isinstance(exponent, float) and exponent == int(exponent) and floating(x):
        return w.make(node, aten.pow.Tensor_Scalar, x, int(exponent))
    return None


@form(aten.add.Tensor)
def total(w: Writer, node: Node) -> Node | None:
    """x + -y = x - y; x + x = 2 x."""
    if len(args(node)) != 2 or node.kwargs:
        return None
    for a, b in both_ways(node):
        if is_tensor(a) and is_call(b, aten.neg.default):
            return w.make(node, aten.sub.Tensor, a, b.args[0])
    a, b = args(node)
    return w.make(node, aten.mul.Tensor, a, 2) if a is b else None


@form(aten.sub.Tensor)
def difference(w: Writer, node: Node) -> Node | None:
    """0 - x = -x."""
    a, b = args(node)[:2]
    return w.make(node, aten.neg.default, b) if number(a) == 0 and is_tensor(b) and not node.kwargs else None


@form(aten.neg.default)
def twice_negative(w: Writer, node: Node) -> Node | None:
    """--x = x."""
    x = args(node)[0]
    return args(x)[0] if is_call(x, aten.neg.default) and not escapes(node) else None


@form(aten.sum.dim_IntList, aten.mean.dim, aten.amax.default)
def kept(w: Writer, node: Node) -> Node | None:
    """Axes that are summed over stay, with size 1, and a view drops them."""
    x, dims, keep = (*args(node), *[False] * 3)[:3]
    if keep or not dims or node.kwargs:
        return None
    return w.make(node, aten.view.default, w.make(node, node.target, x, dims, True), list(shape(node)))


@form(aten.max.dim)
def maximum_of(w: Writer, node: Node) -> Node | None:
    """A maximum whose place nobody asks for."""
    items = list(node.users)
    if all(i.target is operator.getitem and i.args[1] == 0 for i in items):
        x, dim, keep = (*args(node), False)[:3]
        new = w.make(node, aten.amax.default, x, [dim], keep)
        for item in items:
            item.replace_all_uses_with(new)
            w.drop(item)
    return None


# Limits and conditions


@form(aten.relu.default)
def positive_part(w: Writer, node: Node) -> Node | None:
    return w.make(node, aten.clamp_min.default, args(node)[0], 0)


@form(aten.maximum.default, aten.minimum.default)
def limit(w: Writer, node: Node) -> Node | None:
    """The larger of x and a number."""
    target = aten.clamp_min.default if node.target is aten.maximum.default else aten.clamp_max.default
    for a, b in both_ways(node):
        n = number(b)
        if n is not None and value(a).dtype == value(node).dtype:
            return w.make(node, target, a, n)
    return None


@form(aten.clamp.default, aten.clamp.Tensor, aten.hardtanh.default)
def limits(w: Writer, node: Node) -> Node | None:
    """First from below, then from above."""
    x, low, high = (*args(node), *[None] * 3)[:3]
    low, high = node.kwargs.get("min", low), node.kwargs.get("max", high)
    for target, bound in ((aten.clamp_min.default, low), (aten.clamp_max.default, high)):
        if bound is not None:
            n = number(bound)
            if n is None:
                return None
            x = w.make(node, target, x, n)
    return x


@form(aten.clamp_min.default)
def lower_limit(w: Writer, node: Node) -> Node | None:
    """The lower limit first: the order matters only to limits that cross."""
    inner, low = args(node)
    if not is_call(inner, aten.clamp_max.default):
        return None
    x, high = inner.args
    if not all(isinstance(n, (int, float)) for n in (low, high)) or low > high:
        return None
    return w.make(node, aten.clamp_max.default, w.make(node, aten.clamp_min.default, x, low), high)


NOT = aten.bitwise_not.default, aten.logical_not.default
OPPOSITE = {
    getattr(getattr(aten, a), kind): getattr(getattr(aten, b), kind)
    for a, b in (("lt", "ge"), ("ge", "lt"), ("le", "gt"), ("gt", "le"))
    for kind in ("Tensor", "Scalar")
}


@form(*NOT)
def negated(w: Writer, node: Node) -> Node | None:
    """not not x = x; not (i < j) = (i >= j) of integers, which are never NaN."""
    x = args(node)[0]
    if not is_tensor(x) or value(x).dtype != torch.bool:
        return None
    if is_call(x, *NOT) and value(x.args[0]).dtype == torch.bool and not escapes(node):
        return x.args[0]
    if is_call(x, *OPPOSITE) and not any((is_tensor(a) and floating(a)) or isinstance(a, float) for a in x.args):
        return w.make(node, OPPOSITE[x.target], *x.args)
    return w.make(node, aten.bitwise_not.default, x) if node.target is not aten.bitwise_not.default else None


@form(aten.gt.Tensor, aten.ge.Tensor)
def turned(w: Writer, node: Node) -> Node | None:
    """a > b = b < a."""
    target = aten.lt.Tensor if node.target is aten.gt.Tensor else aten.le.Tensor
    return w.make(node, target, *args(node)[::-1]) if all(map(is_tensor, args(node))) else None


@form(aten.where.self)
def chosen(w: Writer, node: Node) -> Node | None:
    """where(not c, a, b) = where(c, b, a); i <= j of integers is not j < i."""
    c, a, b = args(node)
    if is_call(c, *NOT):
        return w.make(node, aten.where.self, c.args[0], b, a)
    if is_call(c, aten.le.Tensor) and not any(map(floating, c.args)):
        return w.make(node, aten.where.self, w.make(node, aten.lt.Tensor, *c.args[::-1]), b, a)
    return None


# Parts


@form(aten.split_with_sizes.default, aten.split.Tensor, aten.unbind.int)
def parts(w: Writer, node: Node) -> Node | None:
    """Parts as slices and selections, each by itself."""
    x, *rest = args(node)
    lengths, dim = (None, *rest, 0)[:2] if node.target is aten.unbind.int else (*rest, 0)[:2]
    dim = dim % len(shape(x))
    if node.target is aten.split.Tensor:
        lengths = [part.shape[dim] for part in value(node)]
    for item in list(node.users):
        if item.target is not operator.getitem:
            continue
        i = item.args[1]
        if lengths is None:
            new = w.make(item, aten.select.int, x, dim, i)
        else:
            start = sum(lengths[:i])
            new = w.make(item, aten.slice.Tensor, x, dim, start, start + lengths[i])
        if alike(value(new), value(item)):
            item.replace_all_uses_with(new)
            w.drop(item)
    return None


@form(aten.squeeze.dim, aten.squeeze.dims)
def undone_axis(w: Writer, node: Node) -> Node | None:
    """A new axis that is dropped at once: of a list, it would be taken for one token's."""
    x = args(node)[0]
    before = x.args[0] if is_call(x, aten.unsqueeze.default) else None
    return before if before is not None and same_shape(shape(before), shape(node)) else None


@form(aten.select.int)
def only_one(w: Writer, node: Node) -> Node | None:
    """The one element of an axis of size 1; one of each group of an axis cut into groups."""
    x, dim, i = args(node)
    if known(shape(x)[dim] == 1):
        return w.make(node, aten.squeeze.dim, x, dim)
    return every(w, node, x, dim, i)


@form(aten.slice.Tensor)
def one_of_each(w: Writer, node: Node) -> Node | None:
    given = args(node)
    x, dim, start, _, step = given + (0, 0, END, 1)[len(given) - 1 :]
    if step != 1 or not isinstance(start, int) or not known(shape(node)[dim] == 1) or known(shape(x)[dim] == 1):
        return None
    part = every(w, node, x, dim, start)
    return None if part is None else w.make(node, aten.unsqueeze.default, part, dim)


def every(w: Writer, node: Node, x: Any, dim: int, i: int) -> Node | None:
    """x[..., i] of x = y.unflatten(-1, (-1, n)) as y[..., i::n]."""
    if dim % len(shape(x)) != len(shape(x)) - 1 or not is_call(x, aten.view.default):
        return None
    y, n = x.args[0], shape(x)[-1]
    if not isinstance(n, int) or not same_shape(shape(y)[:-1], shape(x)[:-2]):
        return None
    return w.make(node, aten.slice.Tensor, y, len(shape(y)) - 1, i % n, END, n)


@form(aten.cat.default)
def repeated(w: Writer, node: Node) -> Node | None:
    """The same again and again along an axis of size 1."""
    pieces = args(node)[0]
    dim = args(node)[1] if len(args(node)) > 1 else 0
    if len(pieces) < 2 or any(p is not pieces[0] for p in pieces) or not known(shape(pieces[0])[dim] == 1):
        return None
    spread = w.make(node, aten.expand.default, pieces[0], list(shape(node)))
    return w.make(node, aten.clone.default, spread)


@form(aten.repeat.default)
def spread(w: Writer, node: Node) -> Node | None:
    """Repetition along axes of size 1."""
    x, times = args(node)
    if len(times) != len(shape(x)) or not all(n == 1 or known(s == 1) for n, s in zip(times, shape(x), strict=True)):
        return None
    return w.make(node, aten.clone.default, w.make(node, aten.expand.default, x, list(shape(node))))
