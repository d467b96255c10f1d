"""Trains `nano` from the sources of Python's library: under 10 minutes on one H100.

    python -m dsv4_compile.reference_model.train_nano --minutes 7.5 --out OUT

writes OUT/nano.safetensors (the released format, what the package ships), OUT/bf16.safetensors and OUT/training.txt.
The schedule follows the clock, or the step count with `--steps`: 2 % warm-up, a constant rate, a linear decay over the
last 60 %. CSA attends to everything for the first 8 %, while its indexer learns what to pick. In the last 20 % the
weights pass through their stored format.
"""

import argparse
import gzip
import lzma
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import DSV4, DSV4Config, load, save
from .nano import BOS, EOS, bits_per_byte, corpus
from .nano.optim import Optimizer, balance, formats
from .nano.walk import Pass, walk
from .quant import quantize

MTP_WEIGHT, INDEX_WEIGHT = 0.3, 1.0
WARM_UP, DECAY_FROM, SPARSE_FROM, QUANTISED_FROM = 0.02, 0.4, 0.08, 0.8
BALANCE_RATE = 1e-3


@torch.no_grad()
def initialise(model: DSV4, seed: int) -> None:
    """Start near a plain residual network: mHC reads the mean of its streams, writes to all, and hardly mixes them."""
    make = torch.Generator().manual_seed(seed)
    n, depth = model.config.hc_mult, 2 * (len(model.layers) + len(model.mtp))

    def normal(p: Tensor, std: float) -> None:
        p.copy_(torch.randn(p.shape, generator=make) * std)

    for name, p in model.named_parameters():
        if name.endswith(("_attn.fn", "_ffn.fn", "_head.fn")):
            normal(p, 0.02)
        elif name.endswith(("hc_attn.scale", "hc_ffn.scale", "hc_head.scale")):
            p.fill_(0.1)
        elif name.endswith("base"):
            normal(p, 0.3)  # tells the streams apart
            p[:n] -= math.log(n - 1)  # sigmoid = 1 / n
            if p.numel() > n:
                p[2 * n :] += 5.0 * torch.eye(n).flatten()
        elif name.endswith(("wo_b.weight", "w2.weight")):
            normal(p, (p.shape[-1] * depth) ** -0.5)
        elif name in ("embed.weight", "head.weight"):
            normal(p, 0.5 if name == "embed.weight" else 0.02)
        elif p.dim() > 1 and not name.endswith("ape"):
            normal(p, p.shape[-1] ** -0.5)
    for layer in model.layers:
        if (table := layer.ffn.gate.tid2eid) is not None:
            scores = torch.rand(table.shape[0], model.config.n_routed_experts, generator=make)
            table.copy_(scores.topk(table.shape[1], -1).indices)


class Sampler:
    """Random windows of a text on `device`: the documents end to end, eos after each, every window begins with bos."""

    def __init__(self, documents: list[bytes], device: torch.device, seed: int):
        parts = [torch.frombuffer(bytearray(text), dtype=torch.uint8).short() for text in documents if text]
        self.text = torch.cat([x for part in parts for x in (part, torch.tensor([EOS]).short())]).to(device)
        self.make = torch.Generator().manual_seed(seed)

    def draw(self, batch: int, length: int) -> Tensor:
        """Tokens [batch, length + 2]: `length` inputs and what follows the last, twice."""
        start = torch.randint(len(self.text) - length, (batch, 1), generator=self.make).to(self.text.device)
        rows = self.text[start + torch.arange(length + 1, device=start.device)].long()
        return F.pad(rows, (1, 0), value=BOS)


class Result(NamedTuple):
    """Of one step: next-token, MTP and indexer loss, share of the entries' attention that was picked; expert loads."""

    numbers: Tensor
    loads: list[Tensor]


def backward(model: DSV4, tokens: Tensor, step, dense: bool) -> Result:
    """Gradients of one batch [B, T + 2] in the model's parameters."""
    out: Pass = walk(model, tokens[:, :-1], step, dense)
    text = F.cross_entropy(out.logits.flatten(0, 1), tokens[:, 1:-1].flatten())
    ahead = F.cross_entropy(out.mtp_logits.flatten(0, 1), tokens[:, 2:].flatten())
    index = torch.stack(out.index_loss).sum()
    (text + MTP_WEIGHT * ahead + INDEX_WEIGHT * index).backward()
    return Result(torch.stack([text, ahead, index, torch.stack(out.captured).mean()]).detach(), out.loads)


class Graphed:
    """`backward` as one CUDA graph: about ten thousand small kernels launched at once."""

    def __init__(self, model: DSV4, tokens: Tensor, step, dense: bool):
        self.tokens = tokens.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                model.zero_grad()
                backward(model, self.tokens, step, dense)
        torch.cuda.current_stream().wait_stream(side)
        model.zero_grad()
        torch.cuda.empty_cache()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = backward(model, self.tokens, step, dense)

    def __call__(self, tokens: Tensor) -> Result:
        self.tokens.copy_(tokens)
        self.graph.replay()
        return self.result


class Eager:
    """`backward`, kernel by kernel."""

    def __init__(self, model: DSV4, tokens: Tensor, step, dense: bool):
        self.model, self.step, self.dense = model, step, dense

    def __call__(self, tokens: Tensor) -> Result:
        self.model.zero_grad()
        return backward(self.model, tokens, self.step, self.dense)


def rate(progress: float) -> float:
    """Share of the peak learning rate."""
    return min(1.0, progress / WARM_UP + 0.01, max(0.01, (1 - progress) / (1 - DECAY_FROM)))


def train(model: DSV4, optimizer: Optimizer, sampler: Sampler, args, say: Callable[[str], None]) -> None:
    """Run the schedule; afterwards the masters of `optimizer` hold the result."""
    device = sampler.text.device
    with torch.no_grad():
        step = model.step(torch.zeros(args.batch, dtype=torch.int64, device=device), args.seq, None, None)
    kind, run, was_dense, began, marks = (Graphed if args.graph else Eager), None, None, time.perf_counter(), []
    done, shown = 0, -1.0
    say("   time    step  tokens/s     rate    text     mtp   index  captured  grad")
    while (progress := done / args.steps if args.steps else (time.perf_counter() - began) / (60 * args.minutes)) < 1:
        tokens = sampler.draw(args.batch, args.seq)
        optimizer.publish(progress >= QUANTISED_FROM)
        dense = progress < SPARSE_FROM
        if run is None or dense != was_dense:
            run = None  # gives the old graph's memory back first
            run, was_dense = kind(model, tokens, step, dense), dense
        result = run(tokens)
        norm = optimizer.step(rate(progress))
        balance(model, result.loads, BALANCE_RATE)
        done += 1
        if device.type == "cuda":  # the clock is read at most two steps ahead of the device
            marks.append(torch.cuda.Event())
            marks[-1].record()
            if len(marks) > 2:
                marks.pop(0).synchronize()
        if progress - shown >= 0.02 or done == args.steps:
            text, ahead, index, captured = result.numbers.tolist()
            now, speed = time.perf_counter(), args.batch * args.seq * done / (time.perf_counter() - began)
            bits = [x / math.log(2) for x in (text, ahead)]
            say(
                f"{now - began:6.1f}s {done:7d} {speed:9.0f} {rate(progress):8.3f} {bits[0]:7.4f} {bits[1]:7.4f} "
                f"{index:7.4f} {captured:9.3f} {norm.item():5.2f}"
            )
            if not math.isfinite(text):
                raise FloatingPointError(f"the loss is {text} at step {done}: lower the learning rates")
            shown = progress
    say(f"{done} steps, {done * args.batch * args.seq / 1e6:.1f} M tokens in {time.perf_counter() - began:.0f} s")


@torch.no_grad()
def stored(model: DSV4, config: DSV4Config) -> DSV4:
    """The weights of `model` (which holds unrounded ones) in the formats of `config`."""
    result = DSV4(config).to(torch.bfloat16)
    held, kinds = dict(model.state_dict()), formats(result)
    for name, format in kinds.items():
        weight, scale, _ = quantize(held[name], format)
        held[name], held[name.removesuffix("weight") + "scale"] = weight, scale
    result.load_state_dict(held)
    return result.eval().requires_grad_(False)


def report(folder: Path, held: list[bytes], shipped: bytes, device: torch.device, limit: int, say) -> None:
    """Held-out bits per byte of both checkpoints as loaded from disk, beside gzip and xz."""
    torch.set_float32_matmul_precision("highest")
    models = [load(folder / f"{name}.safetensors", device) for name in ("bf16", "nano")]
    texts = {"shipped 64 KiB": shipped, "all held-out": b"".join(held)}
    say("\nbits per byte             bf16   stored   ratio    gzip      xz")
    for title, text in texts.items():
        text = text[: limit or None]
        bits = [bits_per_byte(model, text, batch=8, device=device) for model in models]
        squeezed = [
            8 * len(f) / len(text)
            for f in (gzip.compress(text, 9), lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
        ]
        say(f"{title:20s} {bits[0]:9.4f}{bits[1]:9.4f}{bits[1] / bits[0]:8.4f}{squeezed[0]:8.4f}{squeezed[1]:8.4f}")


def main(arguments: list[str] | None = None, config: DSV4Config | None = None) -> None:
    """The command line; `config`: train another shape than nano's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for both checkpoints and the log")
    parser.add_argument("--minutes", type=float, default=7.5, help="training time; evaluation comes on top")
    parser.add_argument("--steps", type=int, default=0, help="train for this many steps instead")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seq", type=int, default=2048, help="tokens of a sequence, a multiple of the window")
    parser.add_argument("--muon-lr", type=float, default=6e-3)
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-graph", dest="graph", action="store_false", help="launch kernel by kernel")
    parser.add_argument("--eval-bytes", type=int, default=0, help="evaluate on this much of each text only")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    args.graph = args.graph and device.type == "cuda"
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "training.txt").open("w") as log:

        def say(line: str) -> None:
            print(line, flush=True)
            print(line, file=log, flush=True)

        name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        say(f"train_nano {' '.join(arguments if arguments is not None else sys.argv[1:])}")
        say(f"torch {torch.__version__}, {name}, corpus {corpus.SHA256[:16]}")
        torch.manual_seed(args.seed)
        torch.set_float32_matmul_precision("high")
        train_text, held, shipped = corpus.split(corpus.read())
        config = config or DSV4Config.nano()
        plain = config.replace(linear_format="none", expert_format="none", mtp_expert_format="none")
        target = config.replace(linear_format="fp8", expert_format="mxfp4")
        model = DSV4(plain)
        initialise(model, args.seed)
        say(
            f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, "
            f"{sum(map(len, train_text)) / 1e6:.1f} MB of text"
        )
        model = model.to(device)
        with torch.device("meta"):
            kinds = formats(DSV4(target))
        optimizer = Optimizer(model, kinds, args.muon_lr, args.adam_lr, args.weight_decay)
        model.to(torch.bfloat16 if device.type == "cuda" else torch.float32)
        train(model, optimizer, Sampler(train_text, device, args.seed), args, say)
        model.float()
        optimizer.publish(False)
        model.cpu()
        save(stored(model, target), args.out / "nano.safetensors")
        save(model.to(torch.bfloat16), args.out / "bf16.safetensors")
        report(args.out, held, shipped, device, args.eval_bytes, say)
        say("\n" + "\n".join(f"{p.stat().st_size:10d}  {p.name}" for p in sorted(args.out.glob("*.safetensors"))))


if __name__ == "__main__":
    main()
