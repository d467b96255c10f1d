"""Sinkhorn normalisation: a chain of any length, walked from its last division."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from dsv4_compile.lowerings.pointwise import softmax
from dsv4_compile.lowerings.sinkhorn import sinkhorn
from dsv4_compile.match import Found, Made, finder, head, known, shape, strip, term, users

ROWS, COLUMNS = -1, -2
NAMES = {ROWS: "rows", COLUMNS: "columns"}
SOFTMAX = f"dsv4.{softmax.name}"


@dataclass
class HalfStep:
    """c / (c.sum(dim, keepdim=True) + eps); `eps` is 0 where there is none."""

    c: Node
    dim: int
    eps: float
    nodes: tuple[Node, ...]


def half_step(division: Node) -> HalfStep | None:
    """Read a division as a normalisation of its own numerator."""
    operands = term(division).operands
    if len(operands) != 2 or not all(isinstance(o, Node) for o in operands):
        return None
    c, divisor = map(strip, operands)
    total, eps = _and_number(divisor) if head(divisor) == "aten.add" else (divisor, 0.0)
    if total is None or head(total) != "aten.sum":
        return None
    summed, dims = term(total).operands[0], term(total).literals.get("dim")
    if strip(summed) is not c or dims not in ((ROWS,), (COLUMNS,)):
        return None
    whole = list(shape(division))
    kept = whole.copy()
    kept[dims[0]] = 1  # how the sums must lie beside c: views are stripped, and matrices are square
    if not (_same(shape(c), whole) and _same(shape(summed), whole) and _same(shape(operands[1]), kept)):
        return None
    return HalfStep(c, dims[0], eps, (division, divisor, total))


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(known(i == j) for i, j in zip(a, b, strict=True))


def _and_number(addition: Node) -> tuple[Node | None, float]:
    """x + number: both of them."""
    a, b = term(addition).operands
    if isinstance(a, Node) and isinstance(b, (int, float)):
        return strip(a), float(b)
    if isinstance(b, Node) and isinstance(a, (int, float)):
        return strip(b), float(a)
    return None, 0.0


def _as_matrices(x: Node, sizes: Sequence[Any]) -> Node | Made | None:
    """What the softmax of rows was taken of, as matrices: rows may have been put one below the other, or be numbers."""
    n = sizes[-1]
    if _same(shape(x), sizes):
        return x
    return Made(lambda x: x.reshape(-1, n, n), (x,)) if isinstance(n, int) and known(shape(x)[-1] == n) else None


def back(division: Node) -> Iterator[HalfStep]:
    """The half steps that end in `division`, last one first."""
    node = division
    while head(node) == "aten.div" and (step := half_step(node)) is not None:
        yield step
        node = step.c


def goes_on(division: Node) -> bool:
    """Whether another half step follows: then its end is where to look from."""
    followers = (half_step(u) for u in users(division) if head(u) == "aten.div")
    return any(step is not None and step.c is division for step in followers)


@finder(sinkhorn, name="raise.sinkhorn", anchor="div")
def chain(end: Node) -> Found | str | None:
    if half_step(end) is None or goes_on(end):
        return None
    steps = list(back(end))
    start = steps[-1].c
    logits, inner, eps = None, [start], 0.0
    if head(start) == "aten.add":
        p, eps = _and_number(start)
        if p is not None and head(p) == SOFTMAX and term(p).literals.get("dim") == ROWS:
            logits = _as_matrices(term(p).operands[0], shape(end))
            inner.append(p)
    if len(steps) < 2 and (logits is None or steps[0].dim == ROWS):
        return None  # any division by a sum
    if logits is None:
        return f"softmax of the rows plus eps before the first division (it is {head(start)})"
    for i, step in enumerate(reversed(steps)):
        wanted = COLUMNS if i % 2 == 0 else ROWS
        if step.dim != wanted:
            return f"division {i + 1} of {len(steps)} over {NAMES[wanted]} (it is over {NAMES[step.dim]})"
        if step.eps != eps:
            return f"eps {eps} in division {i + 1} of {len(steps)} (it is {step.eps})"
    if len(steps) % 2 == 0:
        return f"columns divided last (division {len(steps)} is over rows)"
    inner += [node for step in steps for node in dict.fromkeys(step.nodes)]
    return Found({"logits": logits, "iters": (len(steps) + 1) // 2, "eps": eps}, [end], inner)
