"""Timing on a GPU: replays of captured graphs, inputs that come from memory, and what the machine can do at most."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

from dsv4_compile.autotune import captured, seconds

BEYOND_L2 = 200 << 20  # bytes of inputs that a graph goes through
MOST = 200  # copies of the inputs
ROUNDS = 5

Arm = Callable[..., Any]
Inputs = tuple[Any, ...]


def microseconds(arms: dict[str, Arm], inputs: Sequence[Inputs], rounds: int = ROUNDS) -> dict[str, float]:
    """Median time of a call by arm; the arms take turns."""
    graphs = {name: captured(f, inputs) for name, f in arms.items()}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds + 1):
        for name, graph in graphs.items():
            times[name].append(seconds(graph) / len(inputs) * 1e6)
    return {name: median(t[1:]) for name, t in times.items()}


def size(x: Any) -> int:
    """Bytes of a tensor, or of a tuple of them."""
    if isinstance(x, (tuple, list)):
        return sum(map(size, x))
    return x.numel() * x.element_size() if isinstance(x, torch.Tensor) else 0


def rotated(args: Inputs, shared: int = 64 << 20) -> list[Inputs]:
    """Copies of the inputs, as many as L2 cannot hold; tensors larger than `shared` bytes are in all of them."""
    own = sum(size(a) for a in args if size(a) <= shared)
    many = max(2, min(MOST, BEYOND_L2 // max(1, own)))
    copy = lambda a: a.clone() if isinstance(a, torch.Tensor) and size(a) <= shared else a  # noqa: E731
    return [args, *(tuple(map(copy, args)) for _ in range(many - 1))]


@dataclass(frozen=True)
class Ceilings:
    """Of this machine, measured now. read: bytes a second that a sum reads. copy: bytes a second that a copy reads and
    writes. gemm: bf16 operations a second of a large product. gap: seconds from one smallest kernel to the next one that
    depends on it, in a graph."""

    read: float
    copy: float
    gemm: float
    gap: float

    def __str__(self) -> str:
        memory = f"reads {self.read / 1e12:.2f} TB/s, copies {self.copy / 1e12:.2f} TB/s"
        return f"{memory}, bf16 products {self.gemm / 1e12:.0f} TFLOP/s, kernel to kernel {self.gap * 1e6:.2f} us"

    def least(self, flops: float, moved: float) -> float:
        """Seconds that so many operations on so many bytes take at least."""
        return max(flops / self.gemm, moved / self.read)

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def best(f: Arm, inputs: Sequence[Inputs], rounds: int = 2 * ROUNDS) -> float:
    """Seconds of a call, the least of several replays."""
    graph = captured(f, inputs)
    return min(seconds(graph) for _ in range(rounds)) / len(inputs)


def ceilings() -> Ceilings:
    source = torch.randn(1 << 29, device="cuda")
    target, a, b = torch.empty_like(source), *(torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    small = torch.zeros(32, device="cuda")
    return Ceilings(
        read=size(source) / best(torch.sum, [(source,)]),
        copy=2 * size(source) / best(torch.Tensor.copy_, [(target, source)]),
        gemm=2 * 8192**3 / best(torch.mm, [(a, b)] * 4),
        gap=best(torch.Tensor.add_, [(small, 1.0)] * 200),
    )
