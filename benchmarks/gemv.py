"""Products of few rows at the sizes of DeepSeek-V4 Flash and Pro: how near the kernels come to the speed of memory.

    python -m benchmarks.gemv [--rows 1 2 4 8] [--formats bf16 fp8 mxfp4 nvfp4] [--layers GLOB ...] [--json FILE]

A call's time is that of a graph with many calls, each on weights of its own, more than the L2 cache holds; random inputs; arms
take turns. `share`: bytes that must be read over time, over what this machine reads, measured first; `over`: time beyond that.
`cuBLAS`: torch's product with the weight in bf16, whatever the format. `eager`: the op's meaning, which dequantises in front of
the product. `MoE`: a whole layer of experts, from the router's product to the sum with the shared expert. Kernels that the
cache lacks are built first, in all processors.
"""

import argparse
import fnmatch
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter

from benchmarks import once
from benchmarks.cases import repeated
from benchmarks.timing import ceilings, microseconds, size
from dsv4_compile.kernel import collecting
from dsv4_compile.lowerings.linear import grouped_linear, linear, linear_wide
from dsv4_compile.lowerings.moe import moe
from dsv4_compile.lowerings.pointwise import swiglu
from dsv4_compile.lowerings.router import router
from dsv4_compile.op import Op
from dsv4_compile.reference_model.quant import dequantize, quantize

STREAMED = 256 << 20  # bytes that a graph goes through at least
CALLS = 32  # of a graph, at least
EXPERTS, CHOSEN, D, INNER = 256, 6, 4096, 2048
LAYERS = {  # groups, rows of each, columns
    "q_a": (1, 1024, 4096),
    "q_b": (1, 32768, 1024),
    "wo_a": (8, 1024, 4096),
    "wo_b": (1, 4096, 8192),
    "shared gate": (1, 2048, 4096),
    "shared down": (1, 4096, 2048),
    "head": (1, 129280, 4096),
    "Pro q_a": (1, 1536, 7168),
    "Pro q_b": (1, 65536, 1536),
    "Pro wo_a": (16, 1024, 4096),
    "Pro wo_b": (1, 7168, 16384),
}
bf16 = torch.bfloat16
Stored = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def weight(format: str, *shape: int) -> Stored:
    w = torch.randn(*shape, device="cuda") * shape[-1] ** -0.5
    stored = (w.to(bf16), None, None) if format == "bf16" else quantize(w, format)
    return tuple(None if t is None else Parameter(t, requires_grad=False) for t in stored)  # type: ignore[return-value]


def repeated_calls(inputs: list[Any]) -> list[Any]:
    return inputs * max(1, -(-CALLS // len(inputs)))


def drawn(formats: list[str], layers: list[str]) -> Iterator[tuple[str, str, int, Stored]]:
    """A layer, its format, groups and weight."""
    for what, (G, R, K) in LAYERS.items():
        if any(fnmatch.fnmatch(what, glob) for glob in layers):
            for format in ("bf16",) if what == "head" else formats:
                yield what, format, G, weight(format, G * R, K)


def product(G: int, M: int, K: int) -> tuple[Op, torch.Tensor]:
    """The op, and M vectors for it."""
    op, lead = (linear, (M,)) if G == 1 else (grouped_linear, (G, M))
    return op, torch.randn(*lead, K, device="cuda").to(bf16)


def products(rows: list[int], formats: list[str], layers: list[str]) -> Iterator[dict[str, Any]]:
    """Linear layers: a row of the table for each."""
    for what, format, G, one in drawn(formats, layers):
        many = max(2, -(-STREAMED // size(one)))
        weights = [one, *(tuple(map(copied, one)) for _ in range(many - 1))]
        dense = [dequantize(*w, "none" if format == "bf16" else format).to(bf16) for w in weights[: max(2, many // 2)]]
        for M in rows:
            op, x = product(G, M, LAYERS[what][-1])
            inputs = repeated_calls([(x, *w) for w in weights])
            multiply: Callable[..., Any] = F.linear if G == 1 else batched
            us = microseconds({"ours": op.target}, inputs)
            us |= {"cuBLAS": microseconds({"": multiply}, repeated_calls([(x, w) for w in dense]))[""]}
            us |= {"ours again": microseconds({"": op.target}, inputs)[""]}
            got, want = op(*inputs[0]).double(), multiply(x.double(), dense[0].double())
            yield dict(what=what, format=format, rows=M, bytes=size(one), us=us, error=wrong(got, want))
        del weights, dense


def copied(t: torch.Tensor | None) -> Parameter | None:
    return None if t is None else Parameter(t.clone(), requires_grad=False)


def batched(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.bmm(x, w.unflatten(0, (x.shape[0], -1)).mT)


def all_experts(format: str) -> tuple[Stored, ...]:
    """Weights, scales and second scales of a layer's three matrices, those of all experts stacked."""
    few = [weight(format, 8, *s) for s in ((INNER, D), (INNER, D), (D, INNER))]
    stacked = [tuple(None if t is None else repeated(t, EXPERTS // len(t)) for t in stored) for stored in few]
    return tuple(zip(*stacked, strict=True))  # type: ignore[arg-type]


def chosen(N: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Vectors of N tokens, their experts, and how much of each."""
    expert = torch.rand(N, EXPERTS, device="cuda").topk(CHOSEN, -1).indices
    return torch.randn(N, D, device="cuda").to(bf16), expert, torch.rand(N, CHOSEN, device="cuda")


def experts(rows: list[int], formats: list[str]) -> Iterator[dict[str, Any]]:
    """All routed experts of a layer; each call chooses others. Then the whole layer, its shared expert in FP8, or bf16."""
    for format in formats:
        matrices, scales, scales_2 = all_experts(format)
        stored, one = (*matrices, 10.0, *scales, *scales_2), size((*matrices, *scales, *scales_2)) / EXPERTS
        for N in rows:
            inputs = [(*chosen(N), *stored) for _ in range(max(8, int(-(-STREAMED // (N * CHOSEN * one)))))]
            hit = sum(len(expert.unique()) for _, expert, *_ in inputs)
            us = microseconds({"ours": moe.target, "eager": moe.meaning}, inputs)
            us |= {"ours again": microseconds({"": moe.target}, inputs)[""]}
            wide = [a.double() if torch.is_tensor(a) and a.dtype in (bf16, torch.float32) else a for a in inputs[0][:3]]
            error = wrong(moe(*inputs[0]).double(), moe.meaning(*wide, *stored))
            yield dict(what="experts", format=format, rows=N, bytes=one * hit / len(inputs), us=us, error=error)
            yield layer(format, N, stored, one)
        del matrices, scales, scales_2, stored, inputs


def layer(format: str, N: int, stored: tuple[Any, ...], one: float) -> dict[str, Any]:
    """From the router's product to the sum of the routed experts and the shared one."""
    whole, choose, dense = of_layer(format, stored)
    inputs = [(torch.randn(N, D, device="cuda").to(bf16),) for _ in range(CALLS)]
    hit = sum(len(choose(x)[0].unique()) for (x,) in inputs) / CALLS
    us = microseconds({"ours": whole, "ours again": whole}, inputs, sweep=torch.empty(0, device="cuda"))
    return dict(what="MoE", format=format, rows=N, bytes=one * hit + dense, us=us, error=0.0)


def of_layer(format: str, stored: tuple[Any, ...]) -> tuple[Callable[..., Any], Callable[..., Any], int]:
    """It, its choice of experts, and the bytes of what all tokens read."""
    wide = "bf16" if format == "bf16" else "fp8"
    gate, (w1, w3, w2) = weight("bf16", EXPERTS, D), (weight(wide, *s) for s in ((INNER, D), (INNER, D), (D, INNER)))
    bias = torch.rand(EXPERTS, device="cuda")

    def choose(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return router(linear_wide(x, gate[0]), bias, CHOSEN, 1.5, 1e-20)

    def whole(x: torch.Tensor) -> torch.Tensor:
        expert, share = choose(x)
        h = swiglu(linear(x, *w1), linear(x, *w3), 10.0)
        return (moe(x, expert, share, *stored) + linear(h, *w2)).to(bf16)

    return whole, choose, sum(map(size, (gate, w1, w3, w2)))


def prepare(rows: list[int], formats: list[str], layers: list[str], several: list[int]) -> None:
    """Build all kernels."""
    with FakeTensorMode(), collecting() as found:
        for what, _, G, one in drawn(formats, layers):
            for M in rows:
                op, x = product(G, M, LAYERS[what][-1])
                op.run(x, *one)
        for format in formats if several else ():
            matrices, scales, scales_2 = all_experts(format)
            stored = (*matrices, 10.0, *scales, *scales_2)
            whole, _, _ = of_layer(format, stored)
            for N in several:
                x, *choice = chosen(N)
                moe.run(x, *choice, *stored)
                whole(x)
    if failed := once.build(list(dict.fromkeys(found))):
        raise SystemExit(f"not built: {failed}")


def wrong(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--formats", nargs="+", default=["bf16", "fp8", "mxfp4", "nvfp4"])
    parser.add_argument("--layers", nargs="+", default=["*"], metavar="GLOB")
    parser.add_argument("--json", type=Path)
    ask = parser.parse_args()
    several = [n for n in ask.rows if n in (1, 8)] if any(fnmatch.fnmatch("experts", g) for g in ask.layers) else []
    prepare(ask.rows, ask.formats, ask.layers, several)
    limits = ceilings()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {limits}", flush=True)
    table = Table(
        "layer",
        "format",
        "rows",
        "MB",
        "ours, us",
        "again",
        "TB/s",
        "share",
        "over, us",
        "cuBLAS or eager, us",
        "error",
    )
    found = []
    rows = products(ask.rows, ask.formats, ask.layers)
    for r in (*rows, *(experts(several, ask.formats) if several else ())):
        us, speed = r["us"], r["bytes"] / r["us"]["ours"] / 1e6
        other = us.get("cuBLAS", us.get("eager", 0.0))
        share = speed * 1e12 / limits.read
        found.append(r | {"share": share})
        numbers = (
            f"{r['bytes'] / 1e6:.1f}",
            f"{us['ours']:.2f}",
            f"{us['ours again']:.2f}",
            f"{speed:.2f}",
            f"{share:.2f}",
            f"{us['ours'] - r['bytes'] / limits.read * 1e6:.2f}",
        )
        table.add_row(r["what"], r["format"], str(r["rows"]), *numbers, f"{other:.2f}", f"{r['error']:.1e}")
    Console(width=120).print(table)
    if ask.json:
        ask.json.write_text(json.dumps({"ceilings": limits.as_dict(), "rows": found}, indent=1))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
