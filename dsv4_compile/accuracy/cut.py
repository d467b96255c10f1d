"""A rewrite cut out of its graph: what the match computed, what the op computes, and the values that both read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx import Node

from ..graphs.graph import CAST, aten, is_cast, is_tensor, is_view, strip, value
from ..match import Match
from ..op import Op, own

PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Cut:
    """`pairs` are (value of the match, value that takes its place). `old` and `new` compute them, each node after its
    inputs, from `inputs`: the arguments of the op below all casts and views, and what only the match reads."""

    pairs: Sequence[tuple[Node, Node]]
    inputs: tuple[Node, ...]
    old: tuple[Node, ...]
    new: tuple[Node, ...]
    call: Node  # of the op, in `new`

    def dtypes(self) -> set[torch.dtype]:
        """Plain float dtypes that the match reads, passes through and returns. An op may skip a rounding in between."""
        return {value(n).dtype for n in (*self.inputs, *self.old) if is_tensor(n)} & set(PLAIN)

    def signature(self) -> str:
        """Equal for two cuts that compute the same from inputs of the same shapes and dtypes."""
        names = {n: f"i{i}" for i, n in enumerate(self.inputs)}
        lines = [f"{name} {_described(value(n))}" for n, name in names.items()]
        for node in (*self.old, *self.new):
            if node not in names:
                names[node] = f"n{len(names)}"
                lines.append(f"{names[node]} {node.target} {_text((node.args, node.kwargs), names)}")
        return "\n".join([*lines, *(f"{names[a]} {names[b]}" for a, b in self.pairs)])


def _text(x: Any, names: dict[Node, str]) -> str:
    """Arguments with nodes by name; those that are no part of the cut are sizes."""
    if isinstance(x, Node):
        return names.get(x) or str(value(x))
    if isinstance(x, (tuple, list)):
        return f"[{', '.join(_text(i, names) for i in x)}]"
    if isinstance(x, dict):
        return f"[{', '.join(f'{k}={_text(v, names)}' for k, v in x.items())}]"
    return repr(x)


def _described(x: Any) -> str:
    return f"{x.dtype} {tuple(x.shape)} {x.stride()} {x.device}" if isinstance(x, torch.Tensor) else str(x)


def cut(match: Match, pairs: Sequence[tuple[Node, Node]], is_new: Callable[[Node], bool]) -> Cut:
    """Cut a rewrite out while both sides stand in the graph."""
    olds, news = [old for old, _ in pairs], [new for _, new in pairs]
    borders: dict[Node, None] = {}

    def below(node: Node) -> list[Node]:
        """What the new side reads: its own nodes down to the op's arguments, then casts and views down to the inputs."""
        if is_new(node):
            return _values(node)
        if strip(node) is node:
            borders[node] = None
            return []
        return node.all_input_nodes[:1]

    new = _ordered(news, below)
    inside = set(match.inner)

    def behind(node: Node) -> list[Node]:
        """What the old side reads, down to the same inputs; constants are its own."""
        tensors = [a for a in node.all_input_nodes if is_tensor(a)]
        own_business = node in inside or node in olds or is_view(node) or is_cast(node) or not is_tensor(node)
        if node in borders or node.op != "call_function" or not (own_business or not tensors):
            borders[node] = None
            return []
        return _values(node)

    old = _ordered(olds, behind)
    call = next(n for n in reversed(new) if n.target is match.rule.op.target)
    old, new = ([n for n in side if n not in borders] for side in (old, new))
    return Cut(pairs, tuple(borders), tuple(old), tuple(new), call)


def _values(node: Node) -> list[Node]:
    """Inputs that are tensors or several; others are sizes."""
    return [a for a in node.all_input_nodes if is_tensor(a) or isinstance(a.meta.get("val"), (tuple, list))]


def _ordered(outputs: Sequence[Node], below: Callable[[Node], list[Node]]) -> list[Node]:
    """Everything that the outputs are computed from, inputs first."""
    done: dict[Node, None] = {}
    todo: list[tuple[Node, bool]] = [(n, False) for n in reversed(outputs)]
    while todo:
        node, finished = todo.pop()
        if finished:
            done[node] = None
        elif node not in done:
            todo.append((node, True))
            todo.extend((n, False) for n in below(node) if n not in done)
    return list(done)


Run = Callable[[Op, dict[str, Any]], Any]


def evaluate(
    nodes: Sequence[Node],
    env: dict[Node, Any],
    ops: dict[Any, Op],
    run: Run,
    wide: torch.dtype | None = None,
) -> None:
    """Run the nodes on real tensors, adding their values to `env`. `run` runs our ops. With `wide`, every plain float is of
    that dtype, whatever the graph says."""

    def read(x: Any) -> Any:
        if isinstance(x, Node):
            return widened(env[x], wide) if x in env else hint(value(x))
        return wide if wide is not None and isinstance(x, torch.dtype) and x in PLAIN else x

    for node in nodes:
        target: Any = node.target
        given: Any = (node.args, node.kwargs)
        if target is aten.view.dtype:  # of the bits that the graph says
            source: Any = node.args[0]
            x = env[source]
            args, kwargs = (x.to(value(source).dtype) if x.dtype in PLAIN else x, node.args[1]), {}
        else:
            args, kwargs = fx.node.map_aggregate(given, read)
        if target in ops:
            env[node] = run(ops[target], ops[target].arguments(*args, **kwargs))
        else:
            env[node] = args[0].to(args[1]) if target is CAST else target(*args, **kwargs)


def widened(x: Any, wide: torch.dtype | None) -> Any:
    """x, or a plain float tensor in another precision."""
    plain = wide is not None and isinstance(x, torch.Tensor) and x.dtype in PLAIN
    return x.to(wide) if plain else x


def hint(x: Any) -> Any:
    """A symbolic size as the number that it was when the graph was captured."""
    return int(x.node.hint) if isinstance(x, torch.SymInt) else x


def by_meaning(op: Op, arguments: dict[str, Any]) -> Any:
    """The op as its meaning says."""
    args = tuple(arguments.values())
    return op._each(op.meaning(*args), lambda x: own(x, args))
