"""Every op that has a GPU kernel, against eager PyTorch and Inductor, at the sizes of DeepSeek-V4.

    python -m benchmarks [--model flash pro] [--tokens 1 2 4 8 16 32 64] [--ops GLOB ...] [--arms eager inductor ours]
                         [--json FILE]

Every arm runs inside a CUDA graph that holds many calls, each on its own copy of the inputs; random inputs; arms take
turns. `least` is the time that the op's cost and the ceilings of this machine, measured first, allow. Errors are against
the op's meaning in fp64: norm of the difference over norm of the result.
"""

import argparse
import fnmatch
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.ops import plain
from benchmarks.timing import Ceilings, ceilings, microseconds, rotated
from dsv4_compile.lowerings.attention import attention
from dsv4_compile.lowerings.mhc import mhc_head, mhc_post, mhc_pre
from dsv4_compile.lowerings.norm import rms_norm, unit_norm
from dsv4_compile.lowerings.rope import norm_rope
from dsv4_compile.lowerings.router import router
from dsv4_compile.op import Op
from dsv4_compile.reference_model import DSV4Config

ARMS = ("eager", "inductor", "ours")
POOL = 1 << 16  # compressed entries that lists choose from
CONTEXT = 32768  # tokens behind a list of all HCA entries
EPS = 1e-6
bf16 = torch.bfloat16


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def cases(c: DSV4Config, N: int) -> Iterator[tuple[str, Op, tuple[Any, ...]]]:
    """Inputs of each op for N tokens, one of each of N requests."""
    D, n, h, d, dr = c.hidden_size, c.hc_mult, c.num_attention_heads, c.head_dim, c.qk_rope_head_dim
    rows, X = (2 + n) * n, draw(N, n, D, dtype=bf16)
    angle = draw(N, 1, 1, dr // 2)
    tables = angle.cos(), angle.sin()
    yield "norm", rms_norm, (draw(N, D, dtype=bf16), draw(D), EPS)
    yield "norm of queries' rank", rms_norm, (draw(N, c.q_lora_rank, dtype=bf16), draw(c.q_lora_rank), EPS)
    yield "norm of heads", unit_norm, (draw(N, 1, h, d, dtype=bf16), EPS)
    yield "norm and RoPE of queries", norm_rope, (draw(N, 1, h, d, dtype=bf16), None, EPS, *tables)
    kv = tuple(t.squeeze(2) for t in tables)
    yield "norm and RoPE of keys", norm_rope, (draw(N, 1, d, dtype=bf16), draw(d), EPS, *kv)
    yield "router", router, (draw(N, c.n_routed_experts), draw(c.n_routed_experts), c.num_experts_per_tok, 1.5, 1e-20)
    yield "mHC before a block", mhc_pre, (X, draw(rows, n * D) * D**-0.5, draw(rows), draw(3), 20, EPS, EPS)
    yield "mHC head", mhc_head, (X, draw(n, n * D) * D**-0.5, draw(n), draw(1), EPS, EPS)
    yield "mHC behind a block", mhc_post, (X, draw(N, D, dtype=bf16), draw(N, n), draw(N, n, n))
    q, ring, sink = draw(N, 1, h, d, dtype=bf16), draw(N, c.sliding_window, d, dtype=bf16), draw(h)
    window = torch.arange(c.sliding_window, device="cuda").expand(N, 1, -1).contiguous()
    near = (q, ring, window, sink)
    yield "attention, window", attention, (*near, None, None, d**-0.5, False)
    entries = draw(N, max(1024, POOL // N), d, dtype=bf16)
    chosen = torch.randint(0, entries.shape[1], (N, 1, c.index_topk), device="cuda")
    yield f"attention, window + {c.index_topk}", attention, (*near, entries, chosen, d**-0.5, False)
    all_ = CONTEXT // 128
    everything = torch.arange(all_, device="cuda").expand(N, 1, -1).contiguous()
    yield f"attention, window + all {all_}", attention, (*near, entries, everything, d**-0.5, False)


def errors(arms: dict[str, Any], op: Op, args: tuple[Any, ...]) -> dict[str, float]:
    """By arm: the largest error among the outputs that are numbers."""
    wide = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
    want = results(op.meaning(*wide))
    found = {}
    for name, run in arms.items():
        pairs = [(g, w) for g, w in zip(results(run(*args)), want, strict=True) if g.is_floating_point()]
        found[name] = max(((g.double() - w).norm() / w.norm()).item() for g, w in pairs)
    return found


def results(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


def arm(name: str, op: Op) -> Callable[..., Any]:
    """A way to run an op. Meanings may call other ops, which then are their meanings too."""
    if name == "ours":
        return op.target
    if name == "inductor":
        return torch.compile(
            lambda *args: op.target(*args), backend="dsv4", options={"lowerings": "none"}, dynamic=False
        )

    def eager(*args: Any) -> Any:
        with plain():
            return op.meaning(*args)

    return eager


def measured(what: str, op: Op, args: tuple[Any, ...], names: list[str], limits: Ceilings) -> dict[str, Any]:
    """One row of the table."""
    torch._dynamo.reset()
    arms = {name: arm(name, op) for name in names}
    full = tuple(op.arguments(*args).values())
    cost = op.symbolic_cost().at(**(op.bound_sizes(op.arguments(*args)) or {}))
    least = limits.least(float(cost.flops), float(cost.read + cost.write)) * 1e6
    implementation, _ = op.claim(op.arguments(*args))
    by = "meaning" if implementation is None else implementation.name
    return dict(
        op=op.name, what=what, by=by, us=microseconds(arms, rotated(full)), least_us=least, error=errors(arms, op, full)
    )


def table(rows: list[dict[str, Any]], arms: list[str]) -> Table:
    made = Table("model", "op", "tokens", *(f"{a}, us" for a in arms), "least, us", *(f"error of {a}" for a in arms))
    for r in rows:
        times, wrong = (f"{r['us'][a]:.2f}" for a in arms), (f"{r['error'][a]:.1e}" for a in arms)
        made.add_row(r["model"], r["what"], str(r["tokens"]), *times, f"{r['least_us']:.2f}", *wrong)
    return made


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "no checkout"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=("flash", "pro"), default=["flash", "pro"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--ops", nargs="+", default=["*"], metavar="GLOB")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--json", type=Path)
    ask = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device; benchmarks/ops.py times ops on the CPU")
    limits = ceilings()
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {commit()}"
    print(f"{machine}: {limits}", flush=True)
    rows = []
    for model in ask.model:
        config = DSV4Config.flash() if model == "flash" else DSV4Config.pro()
        for N in ask.tokens:
            for what, op, args in cases(config, N):
                if any(fnmatch.fnmatchcase(op.name, glob) for glob in ask.ops):
                    rows.append(dict(model=model, tokens=N) | measured(what, op, args, ask.arms, limits))
                    r = rows[-1]
                    print(model, what, N, {a: round(t, 2) for a, t in r["us"].items()}, flush=True)
    Console(width=160).print(table(rows, ask.arms))
    if ask.json:
        ask.json.write_text(json.dumps(dict(machine=machine, ceilings=limits.as_dict(), rows=rows), indent=1) + "\n")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
