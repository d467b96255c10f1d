"""Every op at the sizes of DeepSeek-V4: eager PyTorch, Inductor, our kernels, and other libraries' where there are any.

    python -m benchmarks [--model flash pro] [--tokens 1 8 64] [--prefill 512 4096] [--ops GLOB ...] [--arms NAME ...]
                         [--budget SECONDS] [--json FILE] [--picture FILE]
    dsv4 bench ...

Each request has one token (decode), or there is one request of many (prefill). Every arm is a CUDA graph of many calls, each on
its own copy of the same inputs, which come from memory; arms take turns. Other libraries (`--arms torch flash_mla deep_gemm
quack`) get them as they want them, before the clock runs (benchmarks/peers.py). An op that nobody implements as a whole, but in
parts, or that a compiled model leaves to Inductor, is compiled with dsv4 for "ours"; one of which no part has a kernel has no
such arm. In brackets: what a call launches. `least` is the time that the op's cost and the ceilings of this machine, measured
first, allow; `share` is that over ours.
Errors are against the op's meaning in fp64: norm of the difference over norm of the result; of integers, the share of a row's
that another has not. An arm that runs out of memory has none of these. Without a GPU the same runs at nano's sizes on the CPU.
"""

import argparse
import fnmatch
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.cases import Case, Cases, Inputs, bf16
from benchmarks.ops import plain
from benchmarks.peers import ABSENT, PEERS
from benchmarks.timing import Ceilings, ceilings, launches, microseconds, on_gpu, rotated, size
from dsv4_compile.op import Implementation, Op
from dsv4_compile.reference_model import DSV4Config

Call = Callable[..., Any]
ARMS = ("eager", "inductor", "ours", *PEERS)
CONFIGS: dict[str, Callable[[], DSV4Config]] = {
    "flash": DSV4Config.flash,
    "pro": DSV4Config.pro,
    "nano": DSV4Config.nano,
}
NOISE = 1.02  # times of two arms that are nearer than this are equal
LARGEST = 8 << 30  # bytes of inputs; `--prepare` leaves larger ones out


# Arms


def arms_of(case: Case, args: Inputs, names: list[str]) -> dict[str, Call]:
    """Those of the asked ones that there are for this call. Of another library one that refuses it is left out, and told."""
    found: dict[str, Call] = {}
    for name in names:
        call = PEERS[name](case.op, args) if name in PEERS else arm(name, case.op, args)
        if call is not None and name in PEERS:
            try:
                call(*args)
            except Exception as error:
                print(f"{name} does not run {case.what}: {type(error).__name__}: {error}", flush=True)
                continue
        if call is not None:
            found[name] = call
    return found


def arm(name: str, op: Op, args: Inputs) -> Call | None:
    if name == "inductor":
        return compiled(op, {"lowerings": "none"})
    if name == "eager":

        def eager(*given: Any) -> Any:
            with plain():
                return op.meaning(*given)

        return eager
    if claimed(op, args) is not None:
        return op.target
    return compiled(op, {}) if parts_run(op, args) else None


def claimed(op: Op, args: Inputs) -> Implementation | None:
    """Who runs an op in a compiled model, where what a kernel does slower is left to Inductor."""
    return op.claim(op.arguments(*args), if_worth=True)[0]


def compiled(op: Op, options: dict[str, Any]) -> Call:
    return torch.compile(lambda *given: op.target(*given), backend="dsv4", options=options, dynamic=False)


def parts_run(op: Op, args: Inputs) -> bool:
    """Whether kernels of ours run somewhere inside the meaning of an op that has none."""
    if not on_gpu():
        return False
    from dsv4_compile.kernel import trying

    with trying() as trial:
        try:
            op.target(*args)
        except torch.OutOfMemoryError:  # compiled, it may need less
            return True
    return bool(trial.seen)


# Errors


def errors(case: Case, arms: dict[str, Call], args: Inputs) -> dict[str, float]:
    """By arm: the largest error among the outputs, on all rows or the first ones; none of those that run out of memory."""
    small, rows = case.sample(args) if case.sample is not None else (args, None)
    wide = [a.double() if isinstance(a, torch.Tensor) and a.dtype in (bf16, torch.float32) else a for a in small]
    want, found = results(case.op.meaning(*wide)), {}
    for name, run in arms.items():
        try:
            got = [g if rows is None else g[:rows] for g in results(run(*args))]
        except torch.OutOfMemoryError:
            continue
        found[name] = max(wrong(g, w) for g, w in zip(got, want, strict=True))
    return found


def wrong(got: torch.Tensor, want: torch.Tensor) -> float:
    if got.is_floating_point():
        got, want = got.double(), want.double()
        return ((got - want).norm() / want.norm().clamp(min=1e-300)).item()
    there = want.sort(-1).values
    place = torch.searchsorted(there, got.contiguous()).clamp(max=there.shape[-1] - 1)
    return (there.gather(-1, place) != got).float().mean().item()


def results(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


# Rows of the table


def inputs_of(case: Case) -> Inputs:
    """All arguments, defaults filled in."""
    return tuple(case.op.arguments(*case.make()).values())


def measured(case: Case, names: list[str], limits: Ceilings) -> dict[str, Any]:
    torch._dynamo.reset()
    op, args = case.op, inputs_of(case)
    arms = arms_of(case, args, names)
    wrongs = errors(case, arms, args)
    fitting = {name: f for name, f in arms.items() if name in wrongs}
    counts = {name: launches(f, args) for name, f in fitting.items()}
    full = op.arguments(*args)
    cost = op.symbolic_cost().at(**(op.bound_sizes(full) or {}))
    flops, moved = float(cost.flops), float(cost.read + cost.write)
    copies, sweep = rotated(args)
    us = microseconds(fitting, copies, sweep=sweep)
    by = claimed(op, args)
    return dict(
        op=op.name,
        what=case.what,
        by="parts" if by is None and "ours" in arms else "nobody" if by is None else by.name,
        us=us,
        launches=counts,
        error=wrongs,
        lost=[name for name in arms if name not in us],
        flops=flops,
        bytes=moved,
        least_us=limits.least(flops, moved) * 1e6,
    )


def loses(row: dict[str, Any]) -> bool:
    """Whether another arm is faster than ours."""
    us = row["us"]
    return "ours" in us and us["ours"] > NOISE * min(t for name, t in us.items() if name != "ours" or len(us) == 1)


def table(rows: list[dict[str, Any]], arms: list[str]) -> Table:
    columns = [f"{a}, us" for a in arms], [f"error of {a}" for a in arms]
    made = Table("model", "op", "tokens", *columns[0], "least", "share", *columns[1])
    for r in rows:
        times = (
            f"{r['us'][a]:.2f}" + (f" ({n})" if (n := r["launches"][a]) else "")
            if a in r["us"]
            else "no memory" * (a in r["lost"])
            for a in arms
        )
        share = f"{r['least_us'] / r['us']['ours']:.2f}" if r["us"].get("ours") else ""
        off = (f"{r['error'][a]:.1e}" if a in r["error"] else "" for a in arms)
        style = "bold red" if loses(r) else None
        least = f"{r['least_us']:.2f}"
        made.add_row(r["model"], r["what"], f"{r['B']}x{r['T']}", *times, least, share, *off, style=style)
    return made


def cells(ask: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, int, int, Case]]:
    """Model, requests, tokens of each and the call, in the order in which they are measured."""
    for model in ask.model:
        for B, T in (*((n, 1) for n in ask.tokens), *((1, n) for n in ask.prefill)):
            for case in Cases(CONFIGS[model](), B, T, device):
                if any(fnmatch.fnmatchcase(case.op.name, glob) for glob in ask.ops):
                    yield model, B, T, case


def compile_share(ask: argparse.Namespace, device: torch.device) -> None:
    """`--prepare K/N`: compile what every N-th cell needs, so that measuring finds it in the caches."""
    k, n = map(int, ask.prepare.split("/"))
    for i, (_, _, _, case) in enumerate(cells(ask, device)):
        if i % n != k:
            continue
        try:
            compile_arms(case, [a for a in ask.arms if a in ("inductor", "ours")])
        except torch.OutOfMemoryError as error:  # others compile beside this process; it is measured alone
            print(f"{case.what} is not compiled ahead: {error}", flush=True)
        if on_gpu():
            torch.cuda.empty_cache()


def compile_arms(case: Case, names: list[str]) -> None:
    torch._dynamo.reset()
    args = inputs_of(case)
    if size(args) <= LARGEST:
        for call in arms_of(case, args, names).values():
            call(*args)


def commit() -> str:
    here = Path(__file__).parent
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
    return done.stdout.strip() or "no checkout"


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = (["flash", "pro"], [1, 2, 4, 8, 16, 32, 64], [512, 4096]) if on_gpu() else (["nano"], [1, 8], [64])
    parser.add_argument("--model", nargs="+", choices=CONFIGS, default=sizes[0])
    parser.add_argument("--tokens", type=int, nargs="*", default=sizes[1], help="requests of one token each")
    parser.add_argument("--prefill", type=int, nargs="*", default=sizes[2], help="tokens of one request")
    parser.add_argument("--ops", nargs="+", default=["*"], metavar="GLOB")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds; what is left over is named")
    parser.add_argument("--prepare", metavar="K/N", help="only compile every N-th cell's arms, from the K-th on")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path, help="a roofline, as matplotlib draws it")
    return parser.parse_args(arguments)


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> int:
    start, ask = perf_counter(), parsed(arguments)
    device = torch.device("cuda" if on_gpu() else "cpu")
    torch.manual_seed(0)
    if ask.prepare:
        compile_share(ask, device)
        return 0
    limits = ceilings()
    machine = f"{torch.cuda.get_device_name() if on_gpu() else 'CPU'}, torch {torch.__version__}, {commit()}"
    print(f"{machine}: {limits}", flush=True)
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    left: list[str] = []
    absent = [f"{name}: {why}" for name, why in ABSENT.items()]

    def slower() -> list[str]:
        return [f"{r['model']}, {r['what']}, {r['B']}x{r['T']}" for r in rows if loses(r)]

    def write() -> None:  # after each call, as a run may be stopped
        if ask.json:
            about = dict(machine=machine, ceilings=limits.as_dict(), rows=rows, slower=slower())
            about |= dict(failed=failed, left=left, absent=absent)
            ask.json.write_text(json.dumps(about, indent=1) + "\n")

    for model, B, T, case in cells(ask, device):
        name = f"{model}, {case.what}, {B}x{T}"
        if perf_counter() - start > ask.budget:
            left.append(name)
            continue
        try:
            rows.append(dict(model=model, B=B, T=T) | measured(case, ask.arms, limits))
        except Exception as error:  # no memory, or an arm that does not compile, is a finding; so is a refusal
            failed.append(f"{name}: {type(error).__name__}: {error}")
            continue
        finally:
            if on_gpu():
                torch.cuda.empty_cache()
        lost = "".join(f"; {a} runs out of memory" for a in rows[-1]["lost"])
        print(name, {a: round(t, 2) for a, t in rows[-1]["us"].items()}, lost, flush=True)
        write()
    there = [a for a in ask.arms if a not in PEERS or any(a in r["us"] for r in rows)]
    Console(width=200).print(table(rows, there))
    for what, names in (("ours loses", slower()), ("failed", failed), ("no time was left", left), ("not here", absent)):
        print(f"{what}: {len(names)}", *names, sep="\n  ")
    write()
    if ask.picture:
        from benchmarks.picture import roofline

        roofline(rows, limits, machine, ask.picture)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
