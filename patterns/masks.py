"""Dense additive masks, read as index lists: which rows does a query see?  Hugging Face's attention has them."""

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from dsv4_compile.match import Made, constant, head, known, shape, strip, term, value

Lists = dict[str, Any]


def parts(rows: Node, mask: Node) -> list[tuple[Node, Node]]:
    """rows [B, 1, S, d] with their mask [.., T, S]; where both were put together from two pieces, the pieces."""
    m = strip(mask)
    if not head(rows) == head(m) == "aten.cat":
        return [(rows, mask)]
    r, b = term(rows), term(m)
    pieces = list(zip(r.operands, b.operands, strict=False))
    along = (r.literals["dim"], b.literals["dim"]) == (-2, -1) and len(r.operands) == len(b.operands) == 2
    return pieces if along and all(known(shape(x)[-2] == shape(y)[-1]) for x, y in pieces) else [(rows, mask)]


def index_lists(q: Node, rows: Node, mask: Node) -> Lists | str:
    """Arguments keys, window, entries and index of an attention whose queries q [B, h, T, d] see what the mask says; or
    why they cannot be told."""
    pieces = parts(rows, mask)
    window = one_position(q, pieces[0][1]) or band(q, pieces[0][1])
    if window is None:
        return "a window that is known while compiling (no padding mask, no symbolic length) or a single query"
    found: Lists = {"keys": Made(without_head, (pieces[0][0],)), "window": window, "entries": None, "index": None}
    if len(pieces) == 2:
        index = chosen(q, pieces[1][1]) or permitted(q, pieces[1][1])
        if index is None:
            return "entries chosen by index, or masked where a condition holds"
        found |= {"entries": Made(without_head, (pieces[1][0],)), "index": index}
    return found


def without_head(x):
    return x.squeeze(1)


def one_position(q: Node, mask: Node) -> Made | None:
    """A single query: a list of all rows costs no more than the mask."""
    return permitted(q, mask) if known(shape(q)[2] == 1) else None


def permitted(q: Node, mask: Node) -> Made | None:
    """where(condition, 0, -inf), or the other way round, as a list of all columns with those left out that are masked."""
    m, columns = uncut(strip(mask)), shape(mask)[-1]
    if head(m) != "aten.where":
        return None
    condition, yes, no = operands(m)
    if is_number(no, 0) and forbids(yes, mask):
        keep: Callable[..., Any] = torch.logical_not
    elif is_number(yes, 0) and forbids(no, mask):
        keep = torch.clone
    else:
        return None
    if len(shape(condition)) != 4 or not (known(shape(condition)[1] == 1) and known(shape(condition)[3] == columns)):
        return None

    def columns_seen(condition, q):
        B, _, T, _ = q.shape
        column = torch.arange(condition.shape[-1], device=q.device)
        return torch.where(keep(condition[:, 0]).expand(B, T, -1), column, -1)

    return Made(columns_seen, (condition, q))


def uncut(m: Node) -> Node:
    """Below a cut that takes away what a padding has put behind."""
    if head(m) == "aten.slice":
        cut, padded = term(m).literals, strip(m.args[0])
        if head(padded) == "aten.constant_pad_nd" and (cut["dim"], cut["start"], cut["step"]) == (-1, 0, 1):
            below, widths, *_ = operands(padded)
            if list(widths)[::2] == [0] and known(shape(below)[-1] == cut["end"]):
                return strip(below)
    return m


def band(q: Node, mask: Node) -> Made | None:
    """A mask computed from nothing, in which each query sees the same number of rows before and with its own."""
    width = window_of(mask) if known(shape(mask)[-2] == shape(q)[2]) else None
    if width is None:
        return None
    ahead = shape(mask)[-1] - shape(mask)[-2]  # rows that were there before the first query

    def last_rows(q):
        B, _, T, _ = q.shape
        last = torch.arange(T, device=q.device).view(1, T, 1) + ahead
        return (last + torch.arange(1 - width, 1, device=q.device)).clamp(min=-1).expand(B, T, width)

    return Made(last_rows, (q,))


def window_of(mask: Node) -> int | None:
    """Width of a constant sliding mask [.., T, S]; None if it is none."""
    if "window" not in mask.meta:  # layers share masks, and large ones take a while
        mask.meta["window"] = constant(mask, _width)
    return mask.meta["window"]


def _width(m: torch.Tensor) -> int | None:
    seen = m == 0
    width = int(seen.sum(-1).max())
    T, S = m.shape[-2:]
    row, column = torch.arange(T).unsqueeze(1) + S - T, torch.arange(S)
    sliding = (column <= row) & (column > row - width)
    masked = m.masked_fill(seen, float("-inf")) <= torch.finfo(m.dtype).min
    return width if width and bool((seen == sliding).all() and masked.all()) else None


def chosen(q: Node, mask: Node) -> Made | None:
    """-inf everywhere, 0 scattered to the chosen columns; what is not chosen goes to one more column, cut off after."""
    cut, columns = strip(mask), shape(mask)[-1]
    if head(cut) != "aten.slice" or head(strip(cut.args[0])) != "aten.scatter":
        return None
    bounds, scatter = term(cut).literals, strip(cut.args[0])
    whole, dim, place, zero = operands(scatter)
    if not ((bounds["dim"], bounds["start"], bounds["step"]) == (-1, 0, 1) and known(bounds["end"] == columns)):
        return None
    if not (is_number(zero, 0) and dim in (-1, 3) and forbids(whole, mask) and head(strip(place)) == "aten.where"):
        return None
    present, index, elsewhere = operands(strip(place))
    test = strip(present)
    same = head(test) == "aten.ge" and strip(test.args[0]) is strip(index) and is_number(test.args[1], 0)
    if not (same and is_number(elsewhere, columns)):
        return None

    def as_list(index, q):
        return index.reshape(q.shape[0], q.shape[2], index.shape[-1])

    return Made(as_list, (index, q))


def operands(call: Node) -> tuple[Any, ...]:
    return call.args


def is_number(x: Any, number: Any) -> bool:
    n = number_of(x)
    return n is not None and known(n == number)


def forbids(x: Any, mask: Node) -> bool:
    """A constant that leaves nothing of a probability."""
    n = number_of(x)
    return isinstance(n, (int, float)) and n <= torch.finfo(value(mask).dtype).min


def number_of(x: Any) -> Any:
    """The number that a tensor is full of."""
    x = strip(x)
    full = isinstance(x, Node) and head(x) in ("aten.full", "aten.scalar_tensor")
    number = x.args[1 if head(x) == "aten.full" else 0] if full else x
    if isinstance(number, Node):
        return None if isinstance(value(number), torch.Tensor) else value(number)
    return number
