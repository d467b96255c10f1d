"""One generated case of an op, tried in full: guards around every buffer, poisoned outputs, three runs in a row, and on a GPU a
captured run with other numbers at replay. This file holds no tests.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dsv4_compile.accuracy.verify import difference, distance, sizes_in
from dsv4_compile.lowerings import OPS, contract_of
from dsv4_compile.lowerings.numerics import ONE_STEP
from dsv4_compile.op import Op

GUARD, PATTERN = 256, 0xA5  # bytes on either side, and what is in them
NAN, LARGE = 0xFF, 0x7F  # a byte of poison: NaN in floats, no place of anything in integers
PLAIN = torch.bfloat16, torch.float32
EMPTY = {"empty", "empty_like", "empty_strided", "new_empty"}
TARGETS: dict[Any, Op] = {op.target: op for op in OPS}
Arguments = dict[str, Any]


class Buffer:
    """Memory of a tensor between guards."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: Any, parameter: bool = False):
        self.bytes = torch.Size(shape).numel() * dtype.itemsize
        self.whole = torch.full((2 * GUARD + self.bytes,), PATTERN, dtype=torch.uint8, device=device)
        self.whole[GUARD : GUARD + self.bytes] = NAN if dtype.is_floating_point else LARGE
        typed, first = self.whole.view(dtype), GUARD // dtype.itemsize
        typed = nn.Parameter(typed, requires_grad=False) if parameter else typed
        self.tensor = typed[first : first + torch.Size(shape).numel()].view(shape)

    @property
    def guards(self) -> Tensor:
        return torch.cat([self.whole[:GUARD], self.whole[GUARD + self.bytes :]])


class Guarded(TorchFunctionMode):
    """Inside, what an implementation allocates lies between guards and is poisoned."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[Buffer] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in TARGETS and not kwargs:  # an op of which another is made
            with self:
                return TARGETS[func].run(*args)
        made = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") not in EMPTY or not made.is_contiguous():
            return made
        self.buffers.append(Buffer(made.shape, made.dtype, made.device))
        return self.buffers[-1].tensor


class Given:
    """Arguments, tensors between guards; parameters: as those of a model, which nobody writes to."""

    def __init__(self, arguments: Arguments, device: str, parameters: bool):
        self.buffers: dict[str, Buffer] = {}
        self.values = dict(arguments)
        for name, a in arguments.items():
            if isinstance(a, Tensor):
                self.buffers[name] = Buffer(a.shape, a.dtype, device, parameters and a.is_floating_point())
                self.values[name] = self.buffers[name].tensor
        self.fill(arguments)

    def fill(self, arguments: Arguments) -> None:
        for name, buffer in self.buffers.items():
            buffer.tensor.copy_(arguments[name])

    def changed(self, arguments: Arguments, besides: Sequence[str] = ()) -> list[str]:
        """Names of what is no longer as given."""
        own = {n: as_bytes(b.tensor) for n, b in self.buffers.items() if n not in besides}
        return [n for n, held in own.items() if not torch.equal(held, as_bytes(arguments[n].to(held.device)))]


def as_bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


def several(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


def intact(buffers: Sequence[Buffer]) -> bool:
    return not buffers or bool((torch.cat([b.guards for b in buffers]) == PATTERN).all())


def check(
    op: Op,
    right: Callable[[Arguments], Any],
    first: Arguments,
    other: Arguments,
    device: str,
    seed: int,
    terms: int = 0,
) -> float:
    """The largest error over what is allowed: the contract's, and for each of so many terms that are added up one by one in
    fp32, half a place. Raises AssertionError, with what is wrong."""
    trial = Trial(op, right, device, bool(seed % 2), terms)
    trial.in_a_row(first)
    if op.in_place and trial.implementation is not None and trial.implementation.write is not None:
        trial.where_they_lie(first)
    if device == "cuda":
        trial.replayed(first, other)
    return trial.worst


class Trial:
    def __init__(self, op: Op, right: Callable[[Arguments], Any], device: str, parameters: bool, terms: int = 0):
        self.op, self.right, self.device, self.parameters, self.terms = op, right, device, parameters, terms
        self.contract, self.worst, self.implementation = contract_of(op.name), 0.0, None
        self.bits: list[Tensor] = []  # of the first run
        self.wanted: dict[int, tuple[Any, ...]] = {}

    def in_a_row(self, arguments: Arguments) -> None:
        given = self.given(arguments)
        self.implementation, reasons = self.op.claim(given.values)
        if self.device == "cuda":
            claimed = self.implementation is not None and self.implementation.device == "cuda"
            assert claimed, f"no kernel: {'; '.join(reasons)}"
        runs = [self.run(given) for _ in range(3)]
        self.untouched(given, arguments, [b for _, buffers in runs for b in buffers])
        self.compare(runs[0][0], arguments, "the first run")
        self.bits = [as_bytes(o).clone() for o in runs[0][0]]
        for outs, _ in runs[1:]:
            self.equal(outs, "runs in a row")

    def where_they_lie(self, arguments: Arguments) -> None:
        """In place, several times."""
        given = self.given(arguments)
        for _ in range(3):
            given.fill(arguments)  # twice the norm of a row is not its norm
            with Guarded() as guarded:
                self.op.write(*given.values.values())
            self.compare([given.values[n] for n in self.op.in_place], arguments, "in place")
            self.untouched(given, arguments, guarded.buffers, self.op.in_place)

    def replayed(self, first: Arguments, other: Arguments) -> None:
        given = self.given(first)
        graph, (outs, buffers) = captured(lambda: self.run(given))
        for arguments in (other, first):
            given.fill(arguments)
            graph.replay()
            self.compare(outs, arguments, "at replay")
            self.untouched(given, arguments, buffers)
        self.equal(outs, "a replay")

    def given(self, arguments: Arguments) -> Given:
        return Given(arguments, self.device, self.parameters)

    def run(self, given: Given) -> tuple[Sequence[Tensor], list[Buffer]]:
        with Guarded() as guarded:
            outs = self.op.run(*given.values.values())
        return several(outs), guarded.buffers

    def compare(self, outs: Sequence[Tensor], arguments: Arguments, when: str) -> None:
        wants, dtypes = self.wants(arguments), self.contract.output_dtypes(arguments)
        plain = [a.dtype for a in arguments.values() if isinstance(a, Tensor) and a.dtype in PLAIN]
        allowed = self.contract.allowed(min(plain, key=lambda d: d.itemsize)) + self.terms * 2.0**-24
        for i, (got, want, dtype) in enumerate(zip(outs, wants, dtypes, strict=True)):
            name = f"output {self.op.outputs[i]}, {when}"
            assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
            assert got.dtype == dtype, f"{name}: {got.dtype}, expected {dtype}"
            assert got.is_contiguous(), f"{name}: strides {got.stride()}"
            rows, sizes = self.contract.in_bytes, sizes_in(arguments)
            if rows is not None and got.dtype == torch.uint8:
                assert torch.equal(rows.filling(got, sizes), rows.filling(want, sizes)), f"{name}: the end of a row"
                off = distance(self.contract, sizes, got, want)
            else:
                off = difference(got, want, self.contract.sets and self.device == "cpu")
            limit = allowed if got.is_floating_point() else 0.0
            limit = max(limit, ONE_STEP) if got.dtype == torch.float8_e4m3fn else limit
            assert off <= limit, f"{name}: off by {off:.2e} of the largest number, {limit:.1e} are allowed"
            self.worst = max(self.worst, off / limit if limit else 0.0)

    def wants(self, arguments: Arguments) -> tuple[Any, ...]:
        """What is right, worked out once for each set of arguments."""
        if id(arguments) not in self.wanted:
            moved = {n: a.to(self.device) if isinstance(a, Tensor) else a for n, a in arguments.items()}
            self.wanted[id(arguments)] = several(self.right(moved))
        return self.wanted[id(arguments)]

    def equal(self, outs: Sequence[Tensor], what: str) -> None:
        same = all(torch.equal(as_bytes(o), bits) for o, bits in zip(outs, self.bits, strict=True))
        assert same, f"{what}: other bits than the first time"

    def untouched(
        self, given: Given, arguments: Arguments, buffers: Sequence[Buffer], besides: Sequence[str] = ()
    ) -> None:
        assert intact(buffers), "written outside of what was allocated"
        assert intact([*given.buffers.values()]), "written outside of the inputs"
        changed = given.changed(arguments, besides)
        assert not changed, f"inputs were changed: {', '.join(changed)}"


POOL: list[Any] = []  # one for all graphs, and a graph that keeps it


def captured(run: Callable[[], Any]) -> tuple[Any, Any]:
    """A graph of one call, and what it returns. As torch.cuda.graph does, without emptying the caches each time."""
    if not POOL:
        POOL.append(torch.cuda.graph_pool_handle())
        POOL.append(captured(lambda: torch.zeros(1, device="cuda")))
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=POOL[0])
        try:
            made = run()
        finally:
            graph.capture_end()
    torch.cuda.synchronize()
    return graph, made
