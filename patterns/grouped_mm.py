"""One matrix product for each group of rows: torch's own for bf16, and for other dtypes the form in blocks of rows, or the
op that Hugging Face calls."""

from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from dsv4_compile.lowerings.grouped_mm import grouped_mm
from dsv4_compile.match import Found, Int, Match, T, finder, head, known, rule, shape, strip, term, users

PADS = ("aten.constant_pad_nd", "aten.permute")


@finder(grouped_mm, name="raise.grouped_mm", anchor="_grouped_mm", shared=PADS)
def native(product: Node) -> Found | str | None:
    return grouped_product(product)


@finder(grouped_mm, name="raise.grouped_mm", anchor="transformers.grouped_mm_fallback", shared=PADS)
def of_transformers(product: Node) -> Found | str | None:
    return grouped_product(product)


def grouped_product(product: Node) -> Found | str:
    """product(x, w^T, ends), between zero padding and a slice or without."""
    x, w, ends = (*product.args[:3],)
    if ends is None or any(a is not None for a in (*product.args[3:], *product.kwargs.values())):
        return "groups given by where they end, no bias, no other dtype"
    transposed = strip(w)
    if head(transposed) != "aten.permute" or term(transposed).literals["dims"] != (-1, -2):
        return "a transposed weight [X, J, K]"
    (x, x_pads), (w, w_pads) = unpadded(x), unpadded(transposed.args[0])
    if len(shape(x)) != 2 or not known(shape(x)[1] == shape(w)[2]):
        return f"rows of {shape(w)[2]} numbers, zeros at their end only"
    out = product
    inner = [product, transposed, *x_pads, *w_pads]
    if not known(shape(product)[1] == shape(w)[1]):
        readers = list(users(product))
        cut = term(readers[0]).literals if [head(r) for r in readers] == ["aten.slice"] else {}
        if not (
            cut and cut["dim"] == -1 and cut["start"] == 0 and cut["step"] == 1 and known(cut["end"] == shape(w)[1])
        ):
            return f"the padding cut off again, down to {shape(w)[1]} columns"
        out = readers[0]
        inner.append(out)
    return Found({"x": x, "w": w, "ends": ends}, [out], inner)


def unpadded(x: Any) -> tuple[Node, list[Node]]:
    """Below zeros that were put at the ends of axes, and the nodes that put them there."""
    pads = []
    while head(x) == "aten.constant_pad_nd" and not any(x.args[1][::2]) and not any(x.args[2:]):
        pads.append(x)
        x = x.args[0]
    return x, pads


WHERE_ROWS_ARE = "slice constant_pad_nd sub add div cumsum searchsorted clamp_max index mul remainder"


def counted(match: Match) -> bool | str:
    """Sizes that the pattern has as numbers: they are no arguments of the op."""
    block, top, last = (match.arguments.pop(name) for name in ("block", "top", "last"))
    (M, _), X = shape(match.arguments["x"]), shape(match.arguments["w"])[0]
    if not (known(top == X - 1) and known(last == M - 1)):
        return f"blocks clamped to group {X - 1} and row {M - 1}, found {top} and {last}"
    return known(match.sizes[13] == M // block + X) or f"M // {block} + X blocks, found {match.sizes[13]}"


@rule(
    grouped_mm,
    name="raise.grouped_mm",
    anchor="bmm",
    example={"x": T(39, 7), "w": T(11, 5, 7), "ends": T(11, dtype=torch.int64), "block": 17, "top": 10, "last": 38},
    check=counted,
    shared=[f"aten.{name}" for name in WHERE_ROWS_ARE.split()],
)
def in_blocks(x, w, ends, block: Int, top: Int, last: Int):
    """Groups cut into blocks of rows, each block times a copy of its group's matrix."""
    M, X = x.shape[0], w.shape[0]
    starts = F.pad(ends[:-1], (1, 0))
    block_ends = ((ends - starts + block - 1) // block).cumsum(0)
    block_starts = F.pad(block_ends[:-1], (1, 0))
    number = torch.arange(M // block + X, device=x.device)
    group = torch.searchsorted(block_ends, number, right=True).clamp(max=top)
    first = starts[group] + (number - block_starts[group]) * block
    row = first.unsqueeze(1) + torch.arange(block, device=x.device)
    y = x[row.clamp(max=last)] @ w[group].transpose(-1, -2)
    row = torch.arange(M, device=x.device)
    group = torch.searchsorted(ends, row, right=True)
    place = row - starts[group]
    return y[block_starts[group] + place // block, place % block]
