"""Dense additive masks, read as index lists: which rows does a query see?  Hugging Face's attention has them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from dsv4_compile.match import Made, constant, head, known, shape, strip, term, value

Lists = dict[str, Any]


@dataclass(frozen=True)
class Columns:
    """Columns start to end of a mask [.., T, S], where they are computed."""

    node: Node
    start: Any
    end: Any

    def all(self) -> bool:
        return known(self.start == 0) and known(self.end == shape(self.node)[-1])


def columns(mask: Node, start: Any, end: Any) -> Columns:
    """Some columns of a mask, below slices, concatenations and padding of the last axis."""
    while True:
        m = strip(mask)
        if not broadcast(shape(m), shape(mask)):
            return Columns(mask, start, end)
        mask, below = m, _below(m, start, end)
        if below is None:
            return Columns(mask, start, end)
        mask, shift = below
        start, end = start + shift, end + shift


def broadcast(small: Sequence[Any], large: Sequence[Any]) -> bool:
    """Whether `small` has the axes of `large`, some of them 1, but never the last."""
    same = len(small) == len(large) and known(small[-1] == large[-1])
    return same and all(known(i == j) or known(i == 1) for i, j in zip(small, large, strict=True))


def _below(m: Node, start: Any, end: Any) -> tuple[Node, Any] | None:
    """Where these columns of m come from, and how far their numbers move."""
    literals = term(m).literals if m.op == "call_function" else {}
    if head(m) == "aten.slice" and (literals["dim"], literals["step"]) == (-1, 1):
        return operands(m)[0], literals["start"]
    if head(m) == "aten.cat" and literals["dim"] == -1:
        first = 0
        for piece in term(m).operands:
            if known(start >= first) and known(end <= first + shape(piece)[-1]):
                return piece, -first
            first = first + shape(piece)[-1]
    if head(m) == "aten.constant_pad_nd":
        piece, (front, _, *others), *_ = operands(m)
        if front == 0 and not any(others) and known(end <= shape(piece)[-1]):
            return piece, 0
    return None


def index_lists(q: Node, rows: Node, mask: Node) -> Lists | str:
    """Arguments keys, window, entries and index of an attention whose queries q [B, h, T, d] see of rows [B, 1, S, d], or
    [B, S, d], what the mask [.., T, S] says; or why they cannot be told."""
    found: Lists | None = None
    if head(rows) == "aten.cat" and term(rows).literals["dim"] == -2 and len(term(rows).operands) == 2:
        near, far = term(rows).operands
        S, W = shape(rows)[-2], shape(near)[-2]
        found = _lists(q, (near, columns(mask, 0, W)), (far, columns(mask, W, S)))
    found = found or _lists(q, (rows, columns(mask, 0, shape(rows)[-2])))
    return found or "a mask that is known while compiling, or made of one condition or of chosen entries"


def _lists(q: Node, near: tuple[Node, Columns], far: tuple[Node, Columns] | None = None) -> Lists | None:
    keys, window = near[0], one_position(q, near[1]) or band(q, near[1])
    found: Lists = {"keys": Made(without_head, (keys,)), "window": window, "entries": None, "index": None}
    if far is None:
        return found if window else None
    index = chosen(q, far[1]) or permitted(q, far[1])
    return found | {"entries": Made(without_head, (far[0],)), "index": index} if window and index else None


def between(nodes: Sequence[Node], lists: Lists) -> list[Node]:
    """What `nodes` are computed by, down to what the lists are made of."""
    made_of = {n for a in lists.values() if isinstance(a, Made) for i in a.inputs for n in (i, strip(i))}
    found: dict[Node, None] = {}
    todo = list(nodes)
    while todo:
        n = todo.pop()
        if n.op == "call_function" and n not in made_of and n not in found:
            found[n] = None
            todo.extend(n.all_input_nodes)
    return list(found)


def without_head(x):
    return x.squeeze(1) if x.dim() == 4 else x


def one_position(q: Node, c: Columns) -> Made | None:
    """A single query: a list of all rows costs no more than the mask."""
    return permitted(q, c) if known(shape(q)[2] == 1) else None


def permitted(q: Node, c: Columns) -> Made | None:
    """where(condition, 0, -inf), or the other way round, as a list of all columns with those left out that are masked."""
    if head(c.node) != "aten.where":
        return None
    condition, yes, no = operands(c.node)
    if is_number(no, 0) and forbids(yes, c.node):
        keep: Callable[..., Any] = torch.logical_not
    elif is_number(yes, 0) and forbids(no, c.node):
        keep = torch.clone
    else:
        return None
    ones, width = shape(condition)[1:-2], shape(condition)[-1]
    if len(ones) != 1 or not (known(ones[0] == 1) and known(width == shape(c.node)[-1])):
        return None
    start, length = c.start, c.end - c.start

    def columns_seen(condition, q):
        B, _, T, _ = q.shape
        seen = keep(condition[:, 0, :, start : start + length]).expand(B, T, -1)
        return torch.where(seen, torch.arange(length, device=q.device), -1)

    return Made(columns_seen, (condition, q)) if isinstance(start, int) and isinstance(length, int) else None


def band(q: Node, c: Columns) -> Made | None:
    """A mask computed from nothing, in which each query sees the same number of rows before and with its own."""
    T, S = shape(q)[2], c.end - c.start
    width = window_of(c) if known(shape(c.node)[-2] == T) else None
    if width is None:
        return None
    ahead = S - T  # rows that were there before the first query

    def last_rows(q):
        B, _, T, _ = q.shape
        last = torch.arange(T, device=q.device).view(1, T, 1) + ahead
        return (last + torch.arange(1 - width, 1, device=q.device)).clamp(min=-1).expand(B, T, width)

    return Made(last_rows, (q,))


def window_of(c: Columns) -> int | None:
    """Width of a constant sliding mask; None if it is none."""
    if "window" not in c.node.meta:  # layers share masks, and large ones take a while
        c.node.meta["window"] = constant(c.node, _width)
    return c.node.meta["window"] if c.all() else None


def _width(m: torch.Tensor) -> int | None:
    seen = m == 0
    width = int(seen.sum(-1).max())
    T, S = m.shape[-2:]
    row, column = torch.arange(T).unsqueeze(1) + S - T, torch.arange(S)
    sliding = (column <= row) & (column > row - width)
    masked = m.masked_fill(seen, float("-inf")) <= torch.finfo(m.dtype).min
    return width if width and bool((seen == sliding).all() and masked.all()) else None


def chosen(q: Node, c: Columns) -> Made | None:
    """-inf everywhere, 0 scattered to the chosen columns; what is not chosen goes to one more column, cut off after."""
    if head(c.node) != "aten.scatter":
        return None
    whole, dim, place, zero = operands(c.node)
    if not (is_number(zero, 0) and dim in (-1, 3) and forbids(whole, c.node) and head(strip(place)) == "aten.where"):
        return None
    present, index, elsewhere = operands(strip(place))
    test = strip(present)
    same = head(test) == "aten.ge" and strip(test.args[0]) is strip(index) and is_number(test.args[1], 0)
    B, _, T, _ = shape(q)
    if not distinct(index):
        return None
    fits = broadcast(shape(index), (B, T, shape(place)[-1])) and broadcast((B, 1, T, shape(index)[-1]), shape(place))
    if not (same and fits and known(c.start == 0) and is_number(elsewhere, c.end)):
        return None

    def as_list(index, q):
        return index.expand(q.shape[0], q.shape[2], -1)

    return Made(as_list, (index, q))


def distinct(index: Node) -> bool:
    """Places that a topk chose, some of them put out by -1: a mask says once what a list may say twice."""
    n = strip(index)
    if head(n) == "aten.where":
        _, yes, no = operands(n)
        n = strip(no if is_number(yes, -1) else yes if is_number(no, -1) else n)
    return head(n) == "getitem" and operands(n)[1] == 1 and head(operands(n)[0]) == "aten.topk"


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
