"""Linear layers: a matrix product one side of which is a weight, dequantised or, on a GPU, plain."""

from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from dsv4_compile.lowerings.dequantize import dequantize
from dsv4_compile.lowerings.gemv import most_rows, takes_fp32, times
from dsv4_compile.lowerings.linear import grouped_linear, linear, linear_wide
from dsv4_compile.match import Found, Made, T, finder, head, is_cast, known, rule, shape, value

RESHAPES = ("aten.view", "aten.unsqueeze", "aten.squeeze", "aten.alias")
VIEWS = (*RESHAPES, "aten.permute")


@rule(
    linear,
    name="fuse.linear",
    anchor=dequantize,
    example=[
        {"x": T(11, 35), "weight": T(21, 35, dtype=torch.float8_e4m3fn), "scale": T(4, 6)},
        {"x": T(11, 70), "weight": T(21, 35, dtype=torch.uint8), "scale": T(21, 5)},
    ],
)
def product(x, weight, scale):
    return F.linear(x, dequantize(weight, scale, None))


@rule(
    linear,
    name="fuse.linear",
    anchor=dequantize,
    example={"x": T(11, 70), "weight": T(21, 35, dtype=torch.uint8), "scale": T(21, 5), "scale_2": T()},
)
def product_of_two_scales(x, weight, scale, scale_2):
    return F.linear(x, dequantize(weight, scale, scale_2))


@finder(grouped_linear, name="fuse.linear", anchor=dequantize)
def grouped(stored: Node) -> Found | str | None:
    """A batched product with blocks of rows [G, R, K], transposed. Views are told by strides: einsum permutes as it likes."""
    weight, inner = stored, [stored]
    while len(weight.users) == 1 and (is_cast(reader := next(iter(weight.users))) or head(reader) in VIEWS):
        weight = reader
        inner.append(weight)
    if len(weight.users) != 1 or head(bmm := next(iter(weight.users))) != "aten.bmm" or bmm.args[1] is not weight:
        return None
    G, K, R = shape(weight)
    blocks = len(shape(stored)) == 2 and known(shape(stored)[1] == K)
    if not blocks or not all(known(a == b) for a, b in zip(value(weight).stride(), (R * K, 1, K), strict=True)):
        return f"rows of {list(shape(stored))} in {G} groups, each transposed"
    w, scale, scale_2 = stored.args
    return Found({"x": bmm.args[0], "weight": w, "scale": scale, "scale_2": scale_2}, [bmm], [*inner, bmm])


# Plain weights. Only on a GPU, and only few rows: what lies beyond is done as well by the products that PyTorch has, but for
# wide results, for which compilers make wide copies of both sides. A weight is an input of the graph.


@finder(linear_wide, name="fuse.linear", anchor="mm")
def wide(mm: Node) -> Found | str | None:
    """Both sides are copies in fp32 of narrower numbers."""
    found = plain_sides(mm, wide=True)
    if found is None:
        return None
    x, weight = found
    narrow = narrower(x)
    if not all(value(n).dtype.itemsize < value(mm).dtype.itemsize for n in (narrow, weight)):
        return None
    sizes = tuple(shape(x))
    return Found({"x": Made(lambda x: x.reshape(sizes), (narrow,)), "weight": weight}, [mm], [mm])


@finder(linear, name="fuse.linear", anchor="mm")
def plain(mm: Node) -> Found | str | None:
    """x W^T."""
    found = plain_sides(mm)
    return None if found is None else Found(dict(zip(("x", "weight"), found, strict=True)), [mm], [mm])


@finder(grouped_linear, name="fuse.linear", anchor="bmm")
def grouped_plain(bmm: Node) -> Found | str | None:
    """x[g] W[g]^T for blocks of rows [G, R, K] of one weight."""
    x, w = bmm.args
    if not few_on_gpu(x, 1):
        return None
    weight = source(w)
    if weight is None or len(shape(weight)) != 2:
        return None
    G, K, R = shape(w)
    rows, columns = shape(weight)
    blocks = known(rows == G * R) and known(columns == K)
    straight = all(known(a == b) for a, b in zip(value(w).stride(), (R * K, 1, K), strict=True))
    return Found({"x": x, "weight": weight}, [bmm], [bmm]) if blocks and straight else None


def plain_sides(mm: Node, wide: bool = False) -> tuple[Any, Node] | None:
    """x and weight [N, K], if this is a product of few rows with a weight. wide: of whose numbers others make fp32 first; any
    number of rows then, if nobody has to."""
    x, w = mm.args
    weight = source(w) if on_gpu(x) else None
    if weight is None or len(shape(weight)) != 2:
        return None
    any_number = wide and not takes_fp32(value(narrower(x)), value(weight))
    if not any_number and not few_on_gpu(x, 0, times((value(weight), None, True)) if wide else 1):
        return None
    (K, N), (rows, columns) = shape(w), shape(weight)
    if value(weight).dtype.itemsize > value(narrower(x)).dtype.itemsize:
        return None  # the op would round it
    turned = known(rows == N) and known(columns == K) and known(value(w).stride()[0] == 1)
    return (x, weight) if turned else None


def few_on_gpu(x: Any, axis: int, again: int = 1) -> bool:
    """again: see `gemv.most_rows`."""
    return on_gpu(x) and known(shape(x)[axis] <= most_rows(again))


def on_gpu(x: Any) -> bool:
    """On meta tensors, as it would be on a GPU."""
    return value(x).device.type != "cpu"


def source(w: Any) -> Node | None:
    """The input of the graph below views and widening casts."""
    while head(w) in VIEWS or (is_cast(w) and value(w.args[0]).dtype.itemsize < value(w).dtype.itemsize):
        w = w.args[0]
    return w if w.op == "placeholder" and value(w).is_contiguous() else None


def narrower(x: Any) -> Node:
    """Below widening casts and reshapes."""
    while head(x) in RESHAPES or (is_cast(x) and value(x.args[0]).dtype.itemsize < value(x).dtype.itemsize):
        x = x.args[0]
    return x
