"""A graph as text that can be compared: one line a node, with the node's own name, dtype and shape."""

import difflib
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch.fx import Node

SHORT = {
    torch.float64: "f64", torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.int64: "i64",
    torch.int32: "i32", torch.uint8: "u8", torch.bool: "b8", torch.float8_e4m3fn: "f8e4m3",
    torch.float8_e8m0fnu: "f8e8m0",
}  # fmt: skip


def lines(graph: fx.Graph) -> list[str]:
    """`mul_3: f32[2, 19, 96] = aten.mul.Tensor(view_2, 0.5)`, in the order in which the nodes run."""
    return [_line(node) for node in graph.nodes]


def difference(before: Iterable[str], after: Iterable[str], name: str) -> str:
    """What a pass did, as a unified diff; empty if it did nothing."""
    changed = difflib.unified_diff(list(before), list(after), f"before {name}", f"after {name}", n=2, lineterm="")
    return "\n".join(changed)


def _line(node: Node) -> str:
    if node.op == "output":
        return f"return {_text(node.args[0])}"
    kind = _kind(node.meta.get("val"))
    if node.op == "placeholder":
        return f"{node}: {kind}"
    target = node.target if isinstance(node.target, str) else str(node.target).removeprefix("torch.ops.")
    if callable(node.target) and not isinstance(node.target, torch._ops.OperatorBase):
        target = node.target.__name__
    given = [_text(a) for a in node.args] + [f"{k}={_text(a)}" for k, a in node.kwargs.items()]
    return f"{node}: {kind} = {target}({', '.join(given)})"


def _kind(x: Any) -> str:
    if isinstance(x, torch.Tensor):
        return f"{SHORT.get(x.dtype, str(x.dtype))}{[*map(_size, x.shape)]}".replace("'", "")
    if isinstance(x, (list, tuple)):
        return f"({', '.join(map(_kind, x))})"
    return type(x).__name__


def _size(x: Any) -> Any:
    return x if isinstance(x, int) else str(x)


def _text(x: Any) -> str:
    if isinstance(x, (list, tuple)):
        return f"[{', '.join(map(_text, x))}]"
    return str(x)
