"""Attention, and the rotation of its output back: the values that it sums up are keys, which carry a position."""

from typing import Any

from torch.fx import Node

from dsv4_compile.lowerings.attention import attention, dense_attention
from dsv4_compile.lowerings.rope import rope
from dsv4_compile.match import Found, finder, head, shape, strip
from dsv4_compile.patterns.repeats import same_sizes


def turned_back(op: Any, turn: Node) -> Found | str | None:
    o, cos, sin, inverse = turn.args
    core = strip(o)
    if head(core) != f"dsv4.{op.name}":
        return None
    if not (inverse and same_sizes(shape(o), shape(core))):
        return f"an output of shape {list(shape(core))} that is turned back"
    return Found(op.arguments(*core.args) | {"cos": cos, "sin": sin}, [turn], [core, turn])


@finder(attention, name="fuse.epilogue", anchor=rope)
def of_lists(turn: Node) -> Found | str | None:
    return turned_back(attention, turn)


@finder(dense_attention, name="fuse.epilogue", anchor=rope)
def of_a_mask(turn: Node) -> Found | str | None:
    return turned_back(dense_attention, turn)
