"""A decode step of a few layers at a model's real sizes, layer by layer and launch by launch, each arm on the same weights.

    python -m benchmarks.layer [--model flash|pro|nano|DIR] [--formats bf16,fp4] [--context 8192,131072] [--batch 1,8]
                               [--arms hf-eager,hf-inductor,eager,inductor,ours] [--layers SWA,SWA,CSA,HCA,CSA]
                               [--index-keys bf16|fp8] [--launches] [--json FILE] [--picture FILE]
    dsv4 bench --layer ...

The layers are SWA, CSA, HCA and CSA, without SWA HCA and two CSA, or `--layers`; the first, and SWA behind it, with hash
routing; both mHC sites included. What a step computes once, as tables of angles, stands where the first layer of a kind needs
it. Weights are random, and so is what the state remembers of `--context` tokens. "inductor" and "ours" are one CUDA graph a
step; launches and times of a layer are read off a profile of its replays, marks between the layers telling them apart, and
the times are scaled so that they add up to the time of a step outside the profiler. The floor of a layer is what it must read
at the read bandwidth measured in the same run. "hf-": Hugging Face's model on the same weights, in bf16, with a static
cache; errors of those arms are against "hf-eager", as their caches remember other numbers. "tuned": ours, with
configurations by timings. "invariant": ours, with results that do not depend on the number of requests.

At the end a table of what can be read off the layers of these three; Flash's cells with their bars, and in a column of its own
what "invariant" takes beside "ours". `--launches`
prints each launch with its op, when it ran, what it adds and its byte floor (benchmarks/waterfall.py), `--picture` draws it,
one file for each format, context, number of requests and arm; the JSON file has all of it. `--model nano` runs on a CPU too.
"""

import argparse
import gc
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import bars, layer_model, waterfall
from benchmarks.attribution import Notes, recording
from benchmarks.clock import Clock
from benchmarks.layer_model import CSA, FORMATS, INDEX_KEYS, ROOM
from dsv4_compile.commands.inputs import InputError
from dsv4_compile.reference_model import DSV4, Loop
from dsv4_compile.tuning import SETTINGS

HF = "hf-"
ARMS: dict[str, dict[str, Any] | None] = {
    "eager": None,
    "inductor": {"mode": "decode", "passes": "none"},
    "ours": {"mode": "decode"},
    "tuned": {"mode": "decode", "autotune": "full"},
    "invariant": {"mode": "decode", "batch_invariant": True},
}
ARMS |= {f"{HF}{name}": how for name, how in ARMS.items()}
OURS = ("ours", "tuned", "invariant")
STEPS = 12  # compared; the last ones are timed


def contender(name: str, ours: DSV4, batch: int, context: int, keys: str) -> tuple[Callable[..., Tensor], Any, Any]:
    """A step, its model, and where it begins."""
    if not name.startswith(HF):
        return layer_model.step, ours, Loop.start(layer_model.state_of(ours, batch, context, keys), 1)
    from benchmarks import layer_hf

    model = layer_hf.model_of(ours, [marked.layer for marked in ours.layers], torch.ops.dsv4_benchmark.mark)
    context = layer_model.with_room(ours.config, context)
    return layer_hf.step, model, layer_hf.HFLoop.start(model, batch, context, ROOM)


def run_arm(
    name: str, ours: DSV4, batch: int, context: int, keys: str, clock: Clock, bandwidth: float, inner: dict[str, Any]
) -> dict[str, Any]:
    """Logits of the first steps, time of a step, and its parts: launches and times."""
    torch._dynamo.reset()
    gc.collect()  # the last arm's model
    if clock.on_gpu:
        torch.cuda.empty_cache()
    how = ARMS[name]
    SETTINGS.batch_invariant = False  # what one arm asked for would stay for the process
    call, model, loop = contender(name, ours, batch, context, keys)
    if how is not None:
        call = torch.compile(call, backend="dsv4", options=how | inner, dynamic=False, fullgraph=True)
    start, logits = perf_counter(), []
    with recording() as recorder:
        for n in range(STEPS):
            loop.token.fill_(n + 1)
            recorder.begin()
            logits.append(call(model, loop).float().clone())
            clock.wait()
            if n == 0:
                compile_s = perf_counter() - start
        notes = recorder.notes if how is not None else Notes()
    us = clock.us(lambda: call(model, loop), *((9, 10) if clock.on_gpu else (1, 1)))
    calls = clock.spans(lambda: call(model, loop))
    parts: list[waterfall.Part] = []
    if calls:
        seen = median(max(s.end for s in c) - c[0].start for c in calls)
        scale = us / seen if how is not None else 1.0  # eager is not one graph: the profiler slows the host
        names = layer_model.names_of(ours.config)
        parts = waterfall.parts_of(waterfall.typical(calls), names, notes, bandwidth, scale)
    return {
        "arm": name,
        "compile_s": compile_s,
        "step_us": us,
        "launches": len(calls[0]) if calls else None,
        "parts": parts,
        "logits": torch.cat(logits),
    }


def floors_of(model: DSV4, batch: int, context: int, keys: str, bandwidth: float) -> list[dict[str, Any]]:
    """Of each layer its name, what it and its experts must read, in us, and what its attention and its indexer are called."""
    c, found = model.config, []
    state, seen = layer_model.state_of(model, batch, context, keys), context // model.config.rate(CSA)
    for name, marked, memory in zip(layer_model.names_of(c), model.layers, state.layers, strict=True):
        row: dict[str, Any] = {"layer": name}
        row["floor_us"] = layer_model.must_read(marked, c, memory, batch, context) / bandwidth * 1e6
        row["experts_floor_us"] = layer_model.weights_read(marked.layer.ffn, c, batch) / bandwidth * 1e6
        row["rows"] = f"attention, {c.sliding_window} + {min(c.index_topk, seen)} rows, turned back"
        row["entries"] = f"indexer, {seen} entries"
        found.append(row)
    return found


def told(part: waterfall.Part) -> dict[str, Any]:
    return {"launches": len(part.launches), "us": part.us, "busy_us": part.busy}


def error(logits: Tensor, want: Tensor) -> float:
    """Median over steps of the mean difference, in standard deviations of the logits: a near tie among experts that falls
    the other way changes single steps."""
    steps = (logits - want).abs().mean(-1) / want.std(-1)
    return steps.median().item()


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.layer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def numbers(text: str) -> list[int]:
        return [int(n) for n in text.split(",")]

    def names(among: Any) -> Callable[[str], list[str]]:
        def split(text: str) -> list[str]:
            if wrong := [n for n in text.split(",") if n not in among]:
                raise argparse.ArgumentTypeError(f"{wrong[0]!r}: one of {', '.join(among)}")
            return text.split(",")

        return split

    usual = "flash" if torch.cuda.is_available() else "nano"
    parser.add_argument("--model", default=usual, help="flash, pro, nano, tiny, or a folder or file with a config.json")
    parser.add_argument("--formats", type=names(FORMATS), default=["bf16", "fp4"])
    parser.add_argument("--arms", type=names(ARMS), default=["eager", "inductor", "ours"])
    parser.add_argument("--context", type=numbers, default=[8192], help="tokens that the state remembers")
    parser.add_argument("--batch", type=numbers, default=[1], help="requests, each of one token")
    kinds = {short: kind for kind, short in layer_model.SHORT.items()}
    parser.add_argument("--layers", type=names(kinds), default=[], help="kinds of layer, of SWA, CSA and HCA")
    keys = "of the indexer, as the state holds them; fp8: e4m3 with a scale each"
    parser.add_argument("--index-keys", choices=[*INDEX_KEYS], default="bf16", help=keys)
    parser.add_argument("--inner", help="eager: no generated code")
    parser.add_argument("--launches", action="store_true", help="print every launch of ours")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path, help="draw every launch of ours, as matplotlib does")
    ask = parser.parse_args(arguments)
    try:
        ask.configs = {
            format: layer_model.config_of(ask.model, format, [kinds[k] for k in ask.layers]) for format in ask.formats
        }
    except (InputError, ValueError) as error:  # ValueError: a format that the sizes do not divide into
        parser.error(str(error))
    return ask


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> int:
    ask = parsed(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock, console = Clock(device), Console(width=170)
    bandwidth = clock.read_bandwidth()
    machine = torch.cuda.get_device_name() if clock.on_gpu else "CPU"
    console.print(f"{machine}: reads {bandwidth / 1e12:.2f} TB/s")
    results: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []

    def write() -> None:  # after each arm, as a run may be stopped
        if ask.json:
            about = dict(machine=machine, bandwidth=bandwidth, results=results, cells=found)
            ask.json.write_text(json.dumps(about, indent=1) + "\n")

    for format, config in ask.configs.items():
        model = layer_model.model_of(config, device)
        for batch, context in ((b, c) for b in ask.batch for c in ask.context):
            title = f"{ask.model}, {format}, context {context}, {batch} requests"
            title += "" if ask.index_keys == "bf16" else f", index keys {ask.index_keys}"
            rows = floors_of(model, batch, context, ask.index_keys, bandwidth)
            least = {r["layer"]: r["floor_us"] for r in rows}
            table = Table(title, "step, us", "launches", "compile, s", "error", *layer_model.names_of(config))
            table.add_row("floor", "", "", "", "", *(f"{f:.0f} us" for f in least.values()))
            want: dict[bool, Tensor] = {}
            for arm in ask.arms:
                if arm.startswith(HF) and format != "bf16":
                    continue
                inner = {"inner": ask.inner} if ask.inner else {}
                one = run_arm(arm, model, batch, context, ask.index_keys, clock, bandwidth, inner)
                parts, logits = one.pop("parts"), one.pop("logits")
                one |= dict(model=ask.model, format=format, batch=batch, context=context, floor_us=[*least.values()])
                one |= dict(index_keys=ask.index_keys)
                of_layers = parts[1:-1] or [None] * len(rows)
                one["layers"] = [r | (told(p) if p else {}) for r, p in zip(rows, of_layers, strict=True)]
                one["error"] = error(logits, want.setdefault(arm.startswith(HF), logits))
                one["parts"] = [p.as_dict() for p in parts]
                results.append(one)
                said = [f"{r['us']:.0f} us, {r['launches']} ({r['busy_us']:.0f} busy)" for r in one["layers"] if parts]
                numbers = f"{one['step_us']:.0f}", f"{one['launches']}", f"{one['compile_s']:.0f}"
                table.add_row(arm, *numbers, f"{one['error']:.4f}", *said)
                line = ", ".join((f"{one['step_us']:.0f} us a step", f"{one['launches']} launches", *said))
                line = f"{title}, {arm}: {line}, error {one['error']:.4f}"
                console.print(line, markup=False, highlight=False, soft_wrap=True)
                if arm in OURS and parts:
                    found += bars.cells(one, parts)
                    if ask.launches:
                        print(waterfall.text(parts, least), flush=True)
                    if ask.picture:
                        draw(ask.picture, f"{title}, {arm}, {machine}", one, parts, least)
                write()
            console.print(table)
        del model
        gc.collect()
        if clock.on_gpu:
            torch.cuda.empty_cache()
    found += bars.longer(found)
    if found:
        console.print(bars.table(found))
    write()
    return 0


def draw(file: Path, title: str, one: dict[str, Any], parts: list[waterfall.Part], floors: dict[str, float]) -> None:
    from benchmarks.picture import launches

    of = "-".join(str(one[k]) for k in ("format", "context", "batch", "arm"))
    launches(parts, floors, title, file.with_stem(f"{file.stem}-{of}"))


if __name__ == "__main__":
    raise SystemExit(main())
