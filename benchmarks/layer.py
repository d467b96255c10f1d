"""A decode step of four layers at DeepSeek-V4 Flash's real sizes, layer by layer, every contender on the same weights.

    python -m benchmarks.layer [--formats bf16,fp4] [--arms hf-eager,hf-inductor,eager,inductor,ours] [--context 8192]
                               [--json FILE]

The layers are SWA with hash routing, CSA, HCA, CSA, both mHC sites included; weights are random, and so is what the state
remembers of `--context` tokens. One sequence. "inductor" and "ours" are one CUDA graph a step; launches and times of a
layer are read off a profile of its replays, marks between the layers telling them apart, and the times are scaled so that
they add up to the time of a step outside the profiler. The floor of a layer is what it must read at the read bandwidth
measured in the same run. `--small` runs the same on tiny sizes, on a CPU too. "hf-": Hugging Face's model on the same
weights, in bf16, with a static cache; errors of those arms are against "hf-eager", as their caches remember other
numbers. "tuned": ours, with configurations by timings.
"""

import argparse
import gc
import json
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from dsv4_compile.reference_model import DSV4, DSV4Config, Loop, State, draw

KINDS = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
LAYERS = KINDS[0], KINDS[1], KINDS[2], KINDS[1]
NAMES = "SWA, hash", "CSA", "HCA", "CSA again"
FORMATS = {"bf16": ("none", "none"), "fp4": ("fp8", "mxfp4")}  # of dense weights and experts
HF = "hf-"
ARMS: dict[str, dict[str, Any] | None] = {
    "eager": None,
    "inductor": {"mode": "decode", "passes": "none"},
    "ours": {"mode": "decode"},
    "tuned": {"mode": "decode", "autotune": "full"},
}
ARMS |= {f"{HF}{name}": how for name, how in ARMS.items()}
MARK = "bessel_j0"  # a kernel that nothing else launches
STEPS = 12  # compared; the last ones are timed

LIBRARY = torch.library.Library("dsv4_benchmark", "DEF")
LIBRARY.define("mark(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


@cache
def one(device: torch.device) -> Tensor:
    return torch.ones(1, device=device)


def mark(x: Tensor) -> Tensor:
    copy = x.clone()
    torch.special.bessel_j0(one(x.device))
    return copy


LIBRARY.impl("mark", mark, "CompositeExplicitAutograd")
torch.library.register_fake("dsv4_benchmark::mark", torch.empty_like, lib=LIBRARY)


class Marked(nn.Module):
    """A layer with a mark behind it, and the first one with a mark before it."""

    def __init__(self, layer: nn.Module, first: bool):
        super().__init__()
        self.layer, self.first = layer, first

    def forward(self, X: Tensor, *rest: Any) -> tuple[Any, ...]:
        if self.first:
            X = torch.ops.dsv4_benchmark.mark(X)
        X, *found = self.layer(X, *rest)
        return torch.ops.dsv4_benchmark.mark(X), *found


def config_of(format: str, small: bool) -> DSV4Config:
    linear, expert = FORMATS[format]
    base = DSV4Config.nano() if small else DSV4Config.flash()
    return base.replace(
        num_hidden_layers=len(LAYERS),
        layer_types=LAYERS,
        mlp_layer_types=("hash_moe", "moe", "moe", "moe"),
        num_nextn_predict_layers=0,
        linear_format=linear,
        expert_format=expert,
        mtp_expert_format=expert,
    )


def drawn(t: Tensor, name: str, device: torch.device) -> Tensor:
    """Random content of about the size that training starts from, made where it stays."""
    if not t.is_meta:
        return t.to(device)
    width = t.shape[-1] if t.dim() > 1 else 1
    if t.dtype == torch.int64:
        return torch.randint(0, 8, t.shape, device=device)
    if t.dtype == torch.uint8:  # two e2m1 numbers
        return torch.randint(0, 256, t.shape, device=device, dtype=torch.uint8)
    if t.dtype == torch.float8_e8m0fnu:  # of blocks whose numbers are about 1
        exponent = 127 - round(torch.tensor(width * 32.0).log2().item() / 2)
        return torch.full(t.shape, exponent, device=device, dtype=torch.uint8).view(t.dtype)
    if t.dtype == torch.float8_e4m3fn:
        return torch.empty(t.shape, device=device, dtype=torch.bfloat16).normal_().to(t.dtype)
    x = torch.empty(t.shape, device=device, dtype=t.dtype).normal_(std=width**-0.5 if t.dim() > 1 else 0.1)
    return x + 1 if t.dim() == 1 and name in ("weight", "scale") else x


def model_of(config: DSV4Config, device: torch.device) -> DSV4:
    """A marked model with random weights, built in the device's memory."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = DSV4(config).to(torch.bfloat16)
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(drawn(p, name, device), requires_grad=False)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = drawn(b, name, device)
    model.layers = nn.ModuleList(Marked(layer, i == 0) for i, layer in enumerate(model.layers))
    return model.eval()


def state_of(model: DSV4, context: int, room: int) -> State:
    """Equal numbers in every call: what is remembered of `context` tokens."""
    torch.manual_seed(1)
    state = model.new_state(1, context + room)
    for layer in state.layers:
        for part in layer.parts():
            if isinstance(part, Tensor):
                part.normal_()
    state.position.fill_(context)
    return state


def step(model: DSV4, loop: Loop) -> Tensor:
    """`decode_step` that also gives the logits [1, V]."""
    logits = model(loop.token, loop.state)[:, -1]
    loop.token.copy_(draw(logits, loop.temperature, loop.seed, loop.state.position).unsqueeze(1))
    return logits


def must_read(layer: nn.Module, config: DSV4Config, state: Any, context: int) -> int:
    """Bytes that one token makes a layer read: weights, of the experts the chosen ones; keys, entries, open windows."""
    bytes_of = lambda t: t.numel() * t.element_size()  # noqa: E731
    total = 0
    for name, p in layer.named_parameters():
        share = config.num_experts_per_tok / config.n_routed_experts if ".experts." in name else 1
        total += int(bytes_of(p) * share)
    total += bytes_of(state.kv)
    for memory, picked in ((state.compressor, config.index_topk), (state.indexer, None)):
        if memory is not None:
            m = config.rate(layer.layer.attn.kind)
            rows = context // m if picked is None or m > 4 else min(picked, context // m)
            total += bytes_of(memory.values) + bytes_of(memory.gates)
            total += rows * memory.entries.shape[-1] * memory.entries.element_size()
    return total


class Clock:
    """Time on the device, or of the host where there is none."""

    def __init__(self, device: torch.device):
        self.device, self.on_gpu = device, device.type == "cuda"

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def us(self, work: Callable[[], object], rounds: int = 9, calls: int = 10) -> float:
        """Median time of one of `calls` calls that follow each other."""
        times = []
        for _ in range(rounds):
            self.wait()
            start = perf_counter()
            for _ in range(calls):
                work()
            self.wait()
            times.append((perf_counter() - start) / calls * 1e6)
        return median(times)

    def read_bandwidth(self) -> float:
        """Bytes a second that one long sum reads."""
        x = torch.randn((1 << 30) if self.on_gpu else (1 << 20), device=self.device)
        x.sum()
        return x.numel() * 4 / (self.us(x.sum, 5, 4) * 1e-6)

    def kernels(self, work: Callable[[], object], calls: int = 6) -> list[list[tuple[str, float, float]]]:
        """By call and in order: (name, start, end) in us of what ran on the device."""
        if not self.on_gpu:
            return []
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity

        self.wait()
        with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profile:
            for _ in range(calls):
                work()
                self.wait()
        found = sorted(
            (e.time_range.start, e.time_range.end, e.name)
            for e in profile.events()
            if e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", False) and "##" not in e.name
        )
        whole = len(found) // calls
        assert whole * calls == len(found), f"{len(found)} kernels in {calls} equal calls"
        return [[(n, a, b) for a, b, n in found[i * whole : (i + 1) * whole]] for i in range(calls)]


def layers_of(call: list[tuple[str, float, float]]) -> Iterator[tuple[int, float, float]]:
    """(launches, us from the first start to the last end, us of all kernels) of each layer; the marks' own are left out."""
    marks = [i for i, (name, _, _) in enumerate(call) if MARK in name]
    for before, after in pairwise(marks):
        part = call[before + 1 : after - 1]  # a mark's copy comes before its other kernel
        yield len(part), part[-1][2] - part[0][1], sum(b - a for _, a, b in part)


def contender(name: str, ours: DSV4, context: int) -> tuple[Callable[..., Tensor], Any, Any]:
    """A step, its model, and where it begins."""
    if not name.startswith(HF):
        return step, ours, Loop.start(state_of(ours, context, 512), 1)
    from benchmarks import layer_hf

    model = layer_hf.model_of(ours, [marked.layer for marked in ours.layers], torch.ops.dsv4_benchmark.mark)
    return layer_hf.step, model, layer_hf.HFLoop.start(model, context, 512)


def run_arm(name: str, ours: DSV4, context: int, clock: Clock, inner: dict[str, Any]) -> dict[str, Any]:
    """Logits of the first steps, time of a step, launches and times by layer."""
    torch._dynamo.reset()
    gc.collect()  # the last arm's model
    if clock.on_gpu:
        torch.cuda.empty_cache()
    how = ARMS[name]
    call, model, loop = contender(name, ours, context)
    if how is not None:
        call = torch.compile(call, backend="dsv4", options=how | inner, dynamic=False, fullgraph=True)
    start, logits = perf_counter(), []
    for n in range(STEPS):
        loop.token.fill_(n + 1)
        logits.append(call(model, loop).float().clone())
        clock.wait()
        if n == 0:
            compile_s = perf_counter() - start
    us = clock.us(lambda: call(model, loop), *((9, 10) if clock.on_gpu else (1, 1)))
    calls = clock.kernels(lambda: call(model, loop))
    parts = [list(layers_of(c)) for c in calls]
    spans = [c[-1][2] - c[0][1] for c in calls]
    layers = []
    for i, layer in enumerate(NAMES if parts else ()):
        scale = us / median(spans) if how is not None else 1.0  # eager is not one graph: the profiler slows the host
        row = {"layer": layer, "launches": parts[0][i][0], "us": median(p[i][1] for p in parts) * scale}
        layers.append(row | {"busy_us": median(p[i][2] for p in parts)})
    tops: dict[str, list[float]] = {}
    for kernel, a, b in calls[0] if calls else ():
        tops.setdefault(kernel, []).append(b - a)
    top = sorted(((sum(t), len(t), k) for k, t in tops.items()), reverse=True)[:40]
    return {
        "arm": name,
        "compile_s": compile_s,
        "step_us": us,
        "launches": len(calls[0]) if calls else None,
        "layers": layers,
        "logits": torch.cat(logits),
        "top": top,
    }


def error(logits: Tensor, want: Tensor) -> float:
    """Median over steps of the mean difference, in standard deviations of the logits: a near tie among experts that falls
    the other way changes single steps."""
    steps = (logits - want).abs().mean(-1) / want.std(-1)
    return steps.median().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="bf16,fp4")
    parser.add_argument("--arms", default="eager,inductor,ours")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--inner", help="eager: no generated code")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--top", action="store_true", help="also the kernels that take longest")
    ask = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock, console, results = Clock(device), Console(width=150), []
    bandwidth = clock.read_bandwidth()
    console.print(f"{torch.cuda.get_device_name() if clock.on_gpu else 'CPU'}: reads {bandwidth / 1e12:.2f} TB/s")
    with torch.inference_mode():
        for format in ask.formats.split(","):
            config = config_of(format, ask.small)
            model = model_of(config, device)
            state = state_of(model, ask.context, 512)
            pairs = zip(model.layers, state.layers, strict=True)
            floors = [must_read(layer, config, s, ask.context) / bandwidth * 1e6 for layer, s in pairs]
            table = Table(f"{format}, context {ask.context}", "step, us", "launches", "compile, s", "error", *NAMES)
            table.add_row("floor", "", "", "", "", *(f"{f:.0f} us" for f in floors))
            want: dict[bool, Tensor] = {}
            for arm in ask.arms.split(","):
                if arm.startswith(HF) and format != "bf16":
                    continue
                found = run_arm(arm, model, ask.context, clock, {"inner": ask.inner} if ask.inner else {})
                logits = found.pop("logits")
                found |= {"format": format, "floor_us": floors}
                found["error"] = error(logits, want.setdefault(arm.startswith(HF), logits))
                results.append(found)
                parts = [f"{r['us']:.0f} us, {r['launches']} ({r['busy_us']:.0f} busy)" for r in found["layers"]]
                numbers = f"{found['step_us']:.0f}", f"{found['launches']}", f"{found['compile_s']:.0f}"
                table.add_row(arm, *numbers, f"{found['error']:.4f}", *parts)
                top = found.pop("top")
                for us, count, kernel in top if ask.top and arm != "eager" else ():
                    console.print(f"  {us:8.1f} us {count:4d} {kernel[:110]}", markup=False, highlight=False)
                said = ", ".join((f"{found['step_us']:.0f} us a step", f"{found['launches']} launches", *parts))
                console.print(f"{format} {arm}: {said}, error {found['error']:.4f}", markup=False, soft_wrap=True)
                if ask.json:  # a run may be stopped
                    ask.json.write_text(json.dumps({"bandwidth": bandwidth, "results": results}, indent=1))
            console.print(table)
            del model, state
            gc.collect()
            if clock.on_gpu:
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
