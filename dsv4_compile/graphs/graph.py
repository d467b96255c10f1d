"""The graph, seen as mathematics: which nodes only reshape or cast, what a node computes, and how graphs are edited safely.

Everything here works on functional ATen as it arrives at the joint hook. `Term` is the canonical reading of one node:
overloads, defaults, the sign of dims and bookkeeping arguments (dtype, device, layout) are normalised away.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils import _pytree as pytree
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from ..errors import BrokenGraph

aten, prims = torch.ops.aten, torch.ops.prims

CAST = prims.convert_element_type.default
IOTA = prims.iota.default
RESHAPES = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.clone.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
}
VIEWS = RESHAPES | {aten.expand.default}
END = 2**63 - 1

# Arguments that say how a value is stored or ordered, not what it is.  Every dsv4 op that selects also sorts, and none
# depends on the order of equal values.
BOOKKEEPING = {"dtype", "layout", "device", "pin_memory", "memory_format", "sorted", "stable", "non_blocking"}
BOOKKEEPING |= {"requires_grad"}


def known(condition: Any) -> bool:
    """True if the condition holds for every value of the symbolic sizes in it; never adds a guard."""
    return statically_known_true(condition)


def value(x: Any) -> Any:
    """The fake value of a node (or of whatever else stands in an argument list)."""
    return x.meta["val"] if isinstance(x, Node) else x


def shape(x: Any) -> tuple[Any, ...]:
    return tuple(x.meta["val"].shape)


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(known(i == j) for i, j in zip(a, b, strict=True))


def is_tensor(x: Any) -> bool:
    return isinstance(x, Node) and isinstance(x.meta.get("val"), torch.Tensor)


def is_cast(x: Any) -> bool:
    """A change of precision: float to float, or integer to integer."""
    if not (isinstance(x, Node) and x.target is CAST):
        return False
    source, to = value(x.args[0]).dtype, x.args[1]
    return source.is_floating_point == to.is_floating_point and torch.bool not in (source, to)


def is_view(x: Any) -> bool:
    return isinstance(x, Node) and x.target in VIEWS


def strip(x: Any) -> Node:
    """The node that computes the value, below all casts and views."""
    while is_view(x) or is_cast(x):
        x = x.args[0]
    return x


def unwiden(x: Any) -> Node:
    """Below casts that lose nothing (bf16 to fp32)."""
    while is_cast(x) and value(x.args[0]).dtype.itemsize < x.args[1].itemsize:
        x = x.args[0]
    return x


def unexpanded(x: Any) -> Any:
    """Below `expand`: what is broadcast."""
    while isinstance(x, Node) and x.target is aten.expand.default:
        x = x.args[0]
    return x


def same_elements(a: Any, b: Any) -> bool:
    """Whether two tensors of as many elements hold the same ones in the same order: both are reshaped from one, or from
    repetitions of one along the same axes. Axes of size 1 count for nothing."""
    a, b = _unshaped(a), _unshaped(b)
    if a is b:
        return True
    if not (a.target is b.target is aten.expand.default):
        return False
    (sizes, repeated), (others, too) = _repetition(a), _repetition(b)
    return same_shape(sizes, others) and repeated == too and same_elements(a.args[0], b.args[0])


def _unshaped(x: Any) -> Any:
    """Below casts and views that repeat nothing."""
    while is_cast(x) or (isinstance(x, Node) and x.target in RESHAPES):
        x = x.args[0]
    return x


def _repetition(x: Node) -> tuple[list[Any], list[bool]]:
    """The axes of an expansion that are longer than 1: their sizes, and which of them repeat."""
    wide, narrow = shape(x), shape(x.args[0])
    narrow = (1,) * (len(wide) - len(narrow)) + narrow
    long = [(n, known(m == 1)) for n, m in zip(wide, narrow, strict=True) if not known(n == 1)]
    return [n for n, _ in long], [repeats for _, repeats in long]


def users(x: Node) -> Iterator[Node]:
    """Nodes that compute with x, above casts and views."""
    for user in x.users:
        if is_view(user) or is_cast(user):
            yield from users(user)
        else:
            yield user


# What a node computes


@dataclass(frozen=True)
class Term:
    """`head` as "aten.topk" or "dsv4.softmax"; operands (nodes or scalars) in order; the other arguments by name."""

    head: str
    operands: tuple[Any, ...]
    literals: dict[str, Any]
    commutes: bool = False
    pointwise: bool = False

    def __str__(self) -> str:
        return self.head


COMMUTES = {"aten.add", "aten.mul", "aten.maximum", "aten.minimum", "aten.bitwise_and", "aten.bitwise_or", "aten.eq"}
COMMUTES |= {"aten.logical_and", "aten.logical_or"}


def head(x: Any) -> str:
    """Name of what a node calls, without its overload; other nodes give their kind ("placeholder")."""
    if not isinstance(x, Node):
        return repr(x)
    return _name(x.target) if callable(x.target) else x.op


@cache
def _name(target: Any) -> str:
    return str(target.overloadpacket) if isinstance(target, torch._ops.OpOverload) else target.__name__


@cache
def _parameters(target: torch._ops.OpOverload) -> tuple[tuple[int, str, Any], ...]:
    """Place, name and default of the arguments that say what is computed; reading a schema takes 0.1 ms."""
    arguments = enumerate(target._schema.arguments)
    return tuple((i, a.name, a.default_value) for i, a in arguments if a.name not in BOOKKEEPING)


def literal(x: Any) -> Any:
    """A node that is one constant number, as that number; everything else as it is."""
    if isinstance(x, Node) and x.target in (aten.full.default, aten.scalar_tensor.default):
        number = x.args[-1]
        if isinstance(number, (int, float)) and value(x).dim() == 0:
            return number
    return x


def term(node: Node) -> Term:
    """The canonical reading of a call."""
    name = head(node)
    if not isinstance(node.target, torch._ops.OpOverload):
        operands = [a for a in node.args if isinstance(a, Node)]
        rest = {str(i): a for i, a in enumerate(node.args) if not isinstance(a, Node)}
        return Term(name, tuple(operands), rest)
    operands, literals = [], {}
    for i, key, default in _parameters(node.target):
        given = literal(node.args[i] if i < len(node.args) else node.kwargs.get(key, default))
        if isinstance(given, (list, tuple)) and any(isinstance(g, Node) and is_tensor(g) for g in given):
            operands.extend(given)
            literals[key] = tuple(g is None for g in given)  # which of a list's places are filled
        elif is_tensor(given) or (name in COMMUTES and key != "alpha"):
            operands.append(given)  # x + 1 reads as x + y
        else:
            literals[key] = value(given) if isinstance(given, Node) else given
    operands = [o for o in operands if o is not None]
    _positive_from_the_right(name, operands, literals)
    tags = node.target.tags
    commutes = name in COMMUTES and literals.get("alpha", 1) == 1
    return Term(name, tuple(operands), literals, commutes, torch.Tag.pointwise in tags)


def _positive_from_the_right(name: str, operands: list[Any], literals: dict[str, Any]) -> None:
    """Dims counted from the last axis (-1), so that extra leading axes do not matter; slice bounds from the first."""
    tensors = [o for o in operands if is_tensor(o)]
    if not tensors:
        return
    rank = value(tensors[0]).dim()
    for key in ("dim", "dims"):
        dim = literals.get(key)
        if isinstance(dim, int):
            literals[key] = dim - rank if dim >= 0 else dim
        elif isinstance(dim, (list, tuple)):
            fixed = [d - rank if isinstance(d, int) and d >= 0 else d for d in dim]
            literals[key] = _moved(fixed) if name == "aten.permute" else tuple(sorted(fixed))
    if name == "aten.slice":
        size = shape(tensors[0])[literals["dim"]]
        for key, default in (("start", 0), ("end", size)):
            bound = default if literals[key] is None else literals[key]
            literals[key] = size + bound if known(bound < 0) else size if known(bound >= size) else bound


def _moved(dims: list[int]) -> tuple[int, ...]:
    """The end of a permutation from the first axis on that does not stay where it is."""
    still = next((i for i, d in enumerate(dims) if d != i - len(dims)), len(dims))
    return tuple(dims[still:])


# Model source lines

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)\n\s*([^\n]*)')


def where(node: Node) -> str:
    """The model's own source line behind a node: `file.py:12 code`; torch's own frames are passed over."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    own = [f for f in frames if "/torch/" not in f[0]] or frames
    if not own:
        return "unknown line"
    file, line, _, code = own[-1]
    return f"{file.rsplit('/', 1)[-1]}:{line} {code.strip()}"


# Editing


@contextmanager
def undone_on_error(graph: fx.Graph) -> Iterator[None]:
    """Nodes that were added are taken out again if the block raises. Replace uses only after all that can fail."""
    before = set(graph.nodes)
    try:
        yield
    except BaseException:
        for node in reversed([n for n in graph.nodes if n not in before]):
            graph.erase_node(node)
        raise


def call(graph: fx.Graph, target: Any, args: Sequence[Any], like: Node) -> Node:
    """Add a call with its fake value; the model source line is that of `like`."""
    fake = target(*fx.node.map_arg(tuple(args), value))
    node = graph.call_function(target, tuple(args))
    node.meta["val"] = fake
    inherit(node, like)
    return node


def inherit(node: Node, like: Node) -> None:
    """Take over the model source line and the place of another node."""
    node.meta.update(
        {key: like.meta[key] for key in ("stack_trace", "nn_module_stack", "dsv4_place") if key in like.meta}
    )


def trace_aten(fn: Callable[..., Any], inputs: Sequence[Any]) -> fx.Graph:
    """fn as ATen, traced with Inductor's decompositions as models are: a composite left in a graph is an error there."""
    with torch.no_grad(), enable_python_dispatcher():
        graph = make_fx(lambda *xs: fn(*xs), decomposition_table=select_decomp_table())(*inputs).graph
    graph.eliminate_dead_code()
    return graph


def graft(graph: fx.Graph, piece: fx.Graph, nodes: Sequence[Node], like: Node) -> list[Node]:
    """Copy a traced piece, applied to `nodes`, to the insertion point; returns the nodes of its outputs."""
    copies: dict[Node, Node] = dict(zip(piece.find_nodes(op="placeholder"), nodes, strict=True))
    for node in piece.nodes:
        if node.op == "get_attr":
            raise BrokenGraph("tracing", "a meaning makes a constant tensor: build it with torch.full or torch.arange")
        if node.op == "call_function":
            copies[node] = graph.node_copy(node, copies.__getitem__)
            inherit(copies[node], like)
    return [copies[n] for n in pytree.tree_leaves(piece.output_node().args[0]) if n is not None]


def reshaped(graph: fx.Graph, x: Node, sizes: Sequence[Any], like: Node) -> Node:
    """x in another shape of as many elements; a copy where its strides forbid a view."""
    if same_shape(shape(x), sizes):
        return x
    if not view_fits(value(x), sizes):
        x = contiguous(graph, x, like)
    node = graph.call_function(aten.view.default, (x, [size_node(graph, s) for s in sizes]))
    node.meta["val"] = value(x).view(sizes)
    inherit(node, like)
    return node


def view_fits(x: torch.Tensor, sizes: Sequence[Any]) -> bool:
    try:
        x.view(sizes)
    except (RuntimeError, ValueError):
        return False
    return True


def contiguous(graph: fx.Graph, x: Node, like: Node) -> Node:
    """x itself if it is contiguous, else a copy that is."""
    if value(x).is_contiguous():
        return x
    node = graph.call_function(aten.clone.default, (x,), {"memory_format": torch.contiguous_format})
    node.meta["val"] = aten.clone.default(value(x), memory_format=torch.contiguous_format)
    inherit(node, like)
    return node


def size_node(graph: fx.Graph, size: Any) -> Any:
    """A size as it may stand in an argument list: an int, or nodes that compute it from the graph's inputs."""
    if not isinstance(size, torch.SymInt):
        return size
    symbols = {s: fx.Proxy(_symbol_node(graph, s)) for s in size.node.expr.free_symbols}
    result = sympy_interp(PythonReferenceAnalysis, symbols, size.node.expr)
    return _valued(result.node)


def _valued(node: Node) -> Node:
    """Give an arithmetic node, and those that it is computed from, their sizes."""
    if "val" not in node.meta:
        arithmetic: Any = node.target
        node.meta["val"] = arithmetic(*fx.node.map_arg(node.args, lambda n: value(_valued(n))))
    return node


def sizes_from_inputs(graph: fx.Graph) -> None:
    """Compute symbolic sizes from the graph's inputs instead of asking values in between, which may be fused away."""
    done: dict[Any, Any] = {}
    for node in graph.find_nodes(op="call_function", target=aten.sym_size.int):
        size = node.meta["val"]
        if node.args[0].op == "placeholder" or not isinstance(size, torch.SymInt):
            continue
        key = size.node.expr
        if key not in done:
            try:
                with graph.inserting_before(node):
                    done[key] = size_node(graph, size)
            except BrokenGraph:  # a size that depends on data
                continue
        node.replace_all_uses_with(done[key])
        graph.erase_node(node)


def _symbol_node(graph: fx.Graph, symbol: Any) -> Node:
    """An input that is the symbol, or the size of one."""
    for node in graph.find_nodes(op="placeholder"):
        val = node.meta.get("val")
        if isinstance(val, torch.SymInt) and val.node.expr == symbol:
            return node
    for node in graph.find_nodes(op="placeholder"):
        if is_tensor(node):
            for dim, s in enumerate(shape(node)):
                if isinstance(s, torch.SymInt) and s.node.expr == symbol:
                    return call(graph, aten.sym_size.int, (node, dim), node)
    raise BrokenGraph("a rewrite", f"no input of the graph holds the size {symbol}")


def depends_on(nodes: Iterable[Node], targets: set[Node], order: dict[Node, int]) -> bool:
    """Whether any of `nodes` is computed from any of `targets`."""
    if not targets:
        return False
    first = min(order[t] for t in targets)
    todo, seen = list(nodes), set()
    while todo:
        node = todo.pop()
        if node in targets:
            return True
        if node not in seen and order.get(node, first) >= first:
            seen.add(node)
            todo.extend(node.all_input_nodes)
    return False


def sort(graph: fx.Graph) -> None:
    """Put nodes after their inputs again, moving as few as possible and keeping the order of the others."""
    placed: set[Node] = set()
    waiting: dict[Node, list[Node]] = {}
    cursor = graph._root
    todo = list(reversed(list(graph.nodes)))
    while todo:
        node = todo.pop()
        missing = next((i for i in node.all_input_nodes if i not in placed), None)
        if missing is not None:
            waiting.setdefault(missing, []).append(node)
            continue
        placed.add(node)
        cursor.append(node)
        cursor = node
        todo.extend(reversed(waiting.pop(node, [])))


# Invariants


def contract(graph: fx.Graph) -> list[tuple[torch.dtype, tuple[Any, ...], torch.device]]:
    """What a graph promises to whoever runs it: dtype, shape and device of every output tensor, in order."""
    outputs = map(value, pytree.tree_leaves(graph.output_node().args[0]))
    return [(v.dtype, tuple(v.shape), v.device) for v in outputs if isinstance(v, torch.Tensor)]


def keeps(new: Sequence[tuple[Any, ...]], old: Sequence[tuple[Any, ...]]) -> bool:
    """Whether a contract still says the same."""
    return len(new) == len(old) and all(
        a[0] == b[0] and same_shape(a[1], b[1]) and a[2] == b[2] for a, b in zip(new, old, strict=True)
    )


def verify(graph: fx.Graph, stage: str) -> None:
    """Lint, and every call that returns something has its fake value."""
    try:
        graph.lint()
    except RuntimeError as error:
        raise BrokenGraph(stage, str(error)) from error
    for node in graph.nodes:
        silent = isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.returns
        if node.op == "call_function" and "val" not in node.meta and not silent:
            raise BrokenGraph(stage, f"node {node} ({head(node)}) has no fake value")
