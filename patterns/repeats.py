"""How a chain of views repeats a tensor. The matcher looks through views; where a repetition matters, rules ask here."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from dsv4_compile.match import is_cast, is_view, known, shape

EXPAND = torch.ops.aten.expand.default


def repeats(node: Any, source: Node) -> list[tuple[Any, Any, Any]] | None:
    """Every repetition on the way from `source` to `node`, as (pre, times, post): an array [pre, post] in memory order
    became [pre, times, post]. None if something else than views and casts lies between.

    `x.repeat_interleave(k, 0)` of x [N, D] is (N, k, D); `x.repeat(k, 1)` is (1, k, N D).
    """
    found = []
    while node is not source:
        if not (is_view(node) or is_cast(node)):
            return None
        below = node.args[0]
        if node.target is EXPAND:
            found.extend(reversed(_grown(shape(below), shape(node))))
        node = below
    return found[::-1]


def _grown(before: tuple[Any, ...], after: tuple[Any, ...]) -> list[tuple[Any, Any, Any]]:
    before = (1,) * (len(after) - len(before)) + tuple(before)
    return [
        (math.prod(after[:i]), after[i], math.prod(before[i + 1 :]))
        for i in range(len(after))
        if not known(before[i] == after[i])
    ]


def same_repeats(found: list[tuple[Any, Any, Any]] | None, wanted: list[tuple[Any, Any, Any]]) -> bool:
    """Whether two lists say the same; repetitions of 1 times count for nothing."""
    if found is None:
        return False
    wanted = [w for w in wanted if not known(w[1] == 1)]
    return len(found) == len(wanted) and all(
        known(i == j) for f, w in zip(found, wanted, strict=True) for i, j in zip(f, w, strict=True)
    )


def once(twice: Node) -> Node | None:
    """The table below one that gives each of its columns twice, side by side."""
    *lead, dr = shape(twice)
    node: Any = twice
    while is_view(node) or is_cast(node):
        node = node.args[0]
        if same_sizes(shape(node), (*lead, dr // 2)):
            return node if same_repeats(repeats(twice, node), [(math.prod(shape(node)), 2, 1)]) else None
    return None


def same_sizes(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(known(i == j) for i, j in zip(a, b, strict=True))
