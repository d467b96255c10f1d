"""Is a rewrite right?  The match as it stands and the op as it would run, on the same inputs, in several precisions.

Inputs are drawn as the op's numerics contract describes them (lowerings/numerics.py), or were recorded. In the graph's own
dtypes the implementation is held against the plain graph within the contract's tolerance; in fp64, where rounding hides
nothing, every other constant, bound or formula shows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._guards import tracing
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node

from ..graphs.graph import is_tensor, strip, value, where
from ..graphs.instances import module_path
from ..lowerings import Contract, Draw, InBytes, contract_of
from ..match import Match
from ..op import Implementation, Op
from .cut import PLAIN, Cut, by_meaning, cut, evaluate, hint, widened

LIMIT = 1 << 31  # bytes of inputs; larger rewrites are not tried
TRIES = 2  # draws that must differ: a near tie that falls the other way does so once

Claim = Callable[[Op, dict[str, Any]], Implementation | None]
Values = dict[Node, Any]


@dataclass(frozen=True)
class Check:
    """One rewrite, tried out. error: the largest difference over the largest number of the output; NaN where only one side
    has it counts as infinite. allowed: by the contract. precision: the dtype that showed the error. reason: what is
    wrong, or with `checked` False why nothing could be said."""

    site: str
    rule: str
    op: str
    where: str
    layer: str
    error: float = 0.0
    allowed: float = 0.0
    precision: str = ""
    reason: str = ""
    checked: bool = True

    @property
    def failed(self) -> bool:
        return self.checked and bool(self.reason)

    def __str__(self) -> str:
        place = f"{self.rule} at {self.where} ({self.layer})"
        if not self.checked:
            return f"{place}: not tried, {self.reason}"
        return f"{place}: {self.reason or f'error {self.error:.1e}, allowed {self.allowed:.1e}'}"


class Unchecked(Exception):
    """Nothing can be said about this rewrite; the message says why."""


class Verifier:
    """Checks the rewrites of one compile. Equal rewrites are run once."""

    precisions: Sequence[torch.dtype] = (torch.float32, torch.float64)  # to try besides the graph's own

    def __init__(self, ops: Mapping[Any, Op], claim: Claim):
        self.ops, self.claim = dict(ops), claim
        self.known: dict[str, Check] = {}

    def check(self, match: Match, pairs: Sequence[tuple[Node, Node]], is_new: Callable[[Node], bool]) -> Check:
        """Try one rewrite, both sides of which stand in the graph."""
        part = cut(match, pairs, is_new)
        names = match.site, match.rule.qualified, match.rule.op.name, where(match.anchor), module_path(match.anchor)
        blank = Check(*names)
        with unset_fake_temporarily(), tracing(None), torch.no_grad():
            try:
                found = self.verdict(part, match.rule.op, blank)
            except Unchecked as why:
                return replace(blank, checked=False, reason=str(why))
        site, rule, _, line, layer = names
        return replace(found, site=site, rule=rule, where=line, layer=layer)

    def verdict(self, part: Cut, op: Op, blank: Check) -> Check:
        key = f"{op.name}\n{part.signature()}"
        if key not in self.known:
            self.known[key] = self.tried(part, op, blank)
        return self.known[key]

    def tried(self, part: Cut, op: Op, blank: Check) -> Check:
        contract = contract_of(op.name)
        worst = blank
        for attempt in range(TRIES):
            env = drawn(part, op, contract.draws, attempt)
            worst = self.compared(part, op, env, blank)
            if not worst.reason and contract.ties_draws:
                env = drawn(part, op, {**contract.draws, **contract.ties_draws}, attempt)
                worst = self.compared_to_meaning(part, env, worst)
            if not worst.reason:
                break
        return worst

    def compared(self, part: Cut, op: Op, env: Values, blank: Check) -> Check:
        """The match against the op, in the graph's dtypes and then in higher precision."""
        contract, sizes = contract_of(op.name), sizes_in(op.arguments(*part.call.args, **part.call.kwargs))
        low = min(part.dtypes() or {torch.float32}, key=lambda d: (d.itemsize, d != torch.bfloat16))
        worst = blank
        for wide in [None, *(d for d in self.precisions if d.itemsize > low.itemsize)]:
            allowed = contract.allowed(wide or low)
            precision = str(wide or low).removeprefix("torch.")
            try:
                news = self.run(part.new, env, wide)
            except Exception as error:
                if wide is torch.float64:
                    continue  # an implementation need not have it
                reason = f"{type(error).__name__}: {error}"
                return replace(
                    blank, error=float("inf"), precision=precision, reason=f"in {precision} it raises {reason}"
                )
            try:
                olds = self.run(part.old, env, wide, by_meaning)
            except Exception as error:
                if wide is not None:
                    continue  # some of torch's own calls know few dtypes
                raise Unchecked(f"the match alone cannot be run: {type(error).__name__}: {error}") from error
            off = max(distance(contract, sizes, news[new], olds[old]) for old, new in part.pairs)
            reason = "" if wide else form(part, news)
            if off > allowed:
                reason = f"in {precision} it is off by {off:.1e} of the largest number, {allowed:.1e} are allowed"
            if reason or off / allowed >= worst.error / (worst.allowed or 1.0):
                worst = replace(blank, error=off, allowed=allowed, precision=precision, reason=reason)
            if reason:
                break
        return worst

    def compared_to_meaning(self, part: Cut, env: Values, so_far: Check) -> Check:
        """Where equal candidates compete the plain graph takes any, the op those that its contract names."""
        news, means = (self.run(part.new, env, None, how) for how in (None, by_meaning))
        if max(difference(news[new], means[new]) for _, new in part.pairs) <= so_far.allowed:
            return so_far
        return replace(so_far, error=float("inf"), reason="ties are broken otherwise than its meaning does")

    def run(self, nodes: Sequence[Node], env: Values, wide: torch.dtype | None, how: Any = None) -> Values:
        env = {n: widened(x, wide) for n, x in env.items()}
        evaluate(nodes, env, self.ops, how or self.as_claimed, wide)
        return env

    def as_claimed(self, op: Op, arguments: dict[str, Any]) -> Any:
        """The op by the implementation that would run it, else by its meaning."""
        implementation = self.claim(op, arguments)
        return by_meaning(op, arguments) if implementation is None else implementation.run(*arguments.values())


def form(part: Cut, values: Values) -> str:
    """What is wrong with the op's results besides their numbers: shape, dtype, layout."""
    said, got = part.call.meta["val"], values[part.call]
    pairs = zip(said, got, strict=True) if isinstance(said, (tuple, list)) else [(said, got)]
    for fake, real in pairs:
        shape = [hint(s) for s in fake.shape]
        if list(real.shape) != shape or real.dtype != fake.dtype:
            return f"it returns {real.dtype} {list(real.shape)}, its meaning {fake.dtype} {shape}"
        if not real.is_contiguous():
            return f"it returns strides {real.stride()}, not contiguous ones"
    return ""


def distance(contract: Contract, sizes: Mapping[str, tuple[int, ...]], new: Tensor, old: Tensor) -> float:
    """`difference`, by an op's contract. Of rows in bytes that of the numbers they stand for, none where these are but rounded
    apart."""
    if contract.in_bytes is None or not new.dtype == old.dtype == torch.uint8:
        return difference(new, old, contract.sets)
    read = zip(contract.in_bytes.read(new, sizes), contract.in_bytes.read(old, sizes), strict=True)
    return max(found if (found := difference(a, b)) > step else 0.0 for (a, step), (b, _) in read)


def sizes_in(arguments: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors among an op's arguments, or of their fakes; of a number, itself."""
    values = {name: value(a) for name, a in arguments.items()}
    shapes = {name: tuple(hint(s) for s in a.shape) for name, a in values.items() if isinstance(a, Tensor)}
    return shapes | {name: (hint(a),) for name, a in values.items() if isinstance(a, (int, torch.SymInt))}


def difference(new: Tensor, old: Tensor, sets: bool = False) -> float:
    """Largest difference over the largest finite number of `old`; for integers the share that differs, with `sets` in
    whatever order the last axis is."""
    if new.shape != old.shape:
        return float("inf")
    if not (new.dtype.is_floating_point and old.dtype.is_floating_point):
        if sets:
            new, old = new.sort(-1).values, old.sort(-1).values
        return float((new != old).double().mean()) if new.numel() else 0.0
    a, b = new.double(), old.double()
    fine = a.isfinite() & b.isfinite()
    if not torch.equal(a.masked_fill(fine, 0), b.masked_fill(fine, 0)):
        both_nan = a.isnan() & b.isnan()
        if not bool((fine | both_nan | (a == b)).all()):
            return float("inf")
    if not bool(fine.any()):
        return 0.0
    scale = b[fine].abs().max().clamp(min=1e-300)
    return float((a[fine] - b[fine]).abs().max() / scale)


# Inputs


def drawn(part: Cut, op: Op, draws: Mapping[str, Draw], attempt: int) -> Values:
    """Random values for the inputs of a cut: the op's arguments by their contract, anything else by its dtype."""
    size = sum(value(n).numel() * value(n).element_size() for n in part.inputs)
    if not isinstance(size, int):
        size = hint(size)
    if size > LIMIT:
        raise Unchecked(f"its inputs take {size / 2**30:.1f} GiB")
    g = torch.Generator().manual_seed(attempt)
    arguments = op.arguments(*part.call.args, **part.call.kwargs)
    sizes = sizes_in(arguments)
    env: Values = {}
    for name, argument in arguments.items():
        if is_tensor(argument) and (root := strip(argument)) in part.inputs and root not in env:
            shape = sizes[name]
            if value(argument).numel() != value(root).numel():
                shape = sizes_of(root)
            env[root] = real(root, draws.get(name), shape, g, sizes)
    for node in part.inputs:
        if node not in env:
            env[node] = real(node, None, sizes_of(node), g, sizes)
    return env


def sizes_of(node: Any) -> tuple[int, ...]:
    return tuple(hint(s) for s in value(node).shape)


def real(node: Node, draw: Draw | None, shape: tuple[int, ...], g: torch.Generator, sizes: Any) -> Tensor:
    """A tensor of the dtype, shape, strides and device of a node's fake value."""
    fake = value(node)
    if fake.dtype == torch.uint8 and not isinstance(draw, InBytes):
        x = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
    elif fake.dtype == torch.bool:
        x = torch.rand(shape, generator=g) < 0.5
    elif draw is not None:
        x = draw.draw(shape, g, sizes)
    elif fake.dtype.is_floating_point:
        x = torch.randn(shape, generator=g, dtype=torch.float64)
    else:
        x = torch.zeros(shape, dtype=torch.int64)
    if fake.dtype.is_floating_point and fake.dtype not in PLAIN:
        x = x.float()
    x = x.to(fake.dtype).reshape(sizes_of(node))
    strides = [hint(s) for s in fake.stride()]
    if 0 in strides or x.numel() == 0:
        return x.to(fake.device)
    out = torch.empty_strided(x.shape, strides, dtype=x.dtype, device=fake.device)
    return out.copy_(x)
