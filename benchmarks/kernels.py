"""GPU kernels against eager PyTorch and Inductor, at the sizes of DeepSeek-V4 Flash.

    python benchmarks/kernels.py [--tokens 1 8 64 512]

Every arm runs inside a CUDA graph that holds many calls, each on its own copy of the inputs, so that what is read comes from
memory and not from the L2 cache; random inputs; arms take turns. The ceiling is what this machine copies, measured in the
same run. `least` is the time that the op's cost and that ceiling allow.
"""

import argparse
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dsv4_compile.lowerings.mhc import mhc_head, mhc_post, mhc_pre
from dsv4_compile.lowerings.norm import rms_norm, unit_norm
from dsv4_compile.lowerings.router import router
from dsv4_compile.op import Op

BEYOND_L2 = 200 << 20  # bytes of inputs that a graph goes through
ROUNDS = 5
D, STREAMS, EXPERTS, CHOSEN, HEADS, HEAD = 4096, 4, 256, 6, 64, 512


def cases(N: int) -> dict[Op, tuple[Any, ...]]:
    """Inputs of each op for N tokens."""

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, device="cuda").to(dtype)

    bf16 = torch.bfloat16
    X, rows = draw(N, STREAMS, D, dtype=bf16), (2 + STREAMS) * STREAMS
    return {
        router: (draw(N, EXPERTS), draw(EXPERTS), CHOSEN, 1.5, 1e-20),
        mhc_pre: (X, draw(rows, STREAMS * D) * D**-0.5, draw(rows), draw(3), 20, 1e-6, 1e-6),
        mhc_head: (X, draw(STREAMS, STREAMS * D) * D**-0.5, draw(STREAMS), draw(1), 1e-6, 1e-6),
        mhc_post: (X, draw(N, D, dtype=bf16), draw(N, STREAMS), draw(N, STREAMS, STREAMS)),
        rms_norm: (draw(N, D, dtype=bf16), draw(D), 1e-6),
        unit_norm: (draw(N, HEADS, HEAD, dtype=bf16), 1e-6),
    }


def captured(f: Callable[..., Any], inputs: list[tuple[Any, ...]]) -> torch.cuda.CUDAGraph:
    """A graph of one call on each of the inputs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for args in inputs[:2]:
            f(*args)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for args in inputs:
            f(*args)
    return graph


def seconds(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def microseconds(arms: dict[str, Callable[..., Any]], inputs: list[tuple[Any, ...]]) -> dict[str, float]:
    """Median time of a call by arm."""
    graphs = {name: captured(f, inputs) for name, f in arms.items()}
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(ROUNDS + 1):
        for name, graph in graphs.items():
            times[name].append(seconds(graph) / len(inputs) * 1e6)
    return {name: median(t[1:]) for name, t in times.items()}


def ceiling() -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    graph = captured(torch.Tensor.copy_, [(torch.empty_like(source), source)])
    return 2 * len(source) / min(seconds(graph) for _ in range(ROUNDS))


def size(x: Any) -> int:
    return x.numel() * x.element_size() if isinstance(x, torch.Tensor) else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 512])
    ask = parser.parse_args()
    bytes_a_second = ceiling()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: copies at {bytes_a_second / 1e12:.2f} TB/s")
    table = Table("op", "tokens", "eager, us", "Inductor, us", "ours, us", "least, us", "Inductor / ours")
    for N in ask.tokens:
        for op, args in cases(N).items():
            many = max(2, min(200, BEYOND_L2 // sum(map(size, args))))
            copies = [tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args) for _ in range(many)]
            torch._dynamo.reset()
            arms = {"eager": op.meaning, "inductor": torch.compile(op.meaning, dynamic=False), "ours": op.target}
            t = microseconds(arms, copies)
            moved = sum(map(size, args)) + sum(map(size, results(op(*args))))
            cells = (t["eager"], t["inductor"], t["ours"], moved / bytes_a_second * 1e6, t["inductor"] / t["ours"])
            table.add_row(op.name, str(N), *(f"{c:.2f}" for c in cells))
    Console(width=120).print(table)


def results(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
