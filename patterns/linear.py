"""Linear layers over stored weights: a matrix product one side of which is dequantised."""

import torch
import torch.nn.functional as F
from torch.fx import Node

from dsv4_compile.lowerings.dequantize import dequantize
from dsv4_compile.lowerings.linear import grouped_linear, linear
from dsv4_compile.match import Found, T, finder, head, is_cast, known, rule, shape, value

VIEWS = ("aten.view", "aten.unsqueeze", "aten.squeeze", "aten.permute", "aten.alias")


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
