"""`dsv4 explain`: what would be fused in a model, what runs it, and what it costs at least."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .arguments import Device, Disable, Dtype, Lowerings, Model, Option, Passes, Strict, plainly

if TYPE_CHECKING:
    from ..reporting.report import Report

PHASES = ("prefill", "decode")


def explain(
    model: Model = None,
    phase: Annotated[
        str, Option(help="prefill: one call of --length tokens; decode: one token after as many.")
    ] = "prefill",
    length: Annotated[int, Option(help="Tokens.")] = 512,
    device: Device = None,
    dtype: Dtype = None,
    passes: Passes = None,
    disable: Disable = None,
    lowerings: Lowerings = None,
    strict: Strict = False,
    diff: Annotated[
        str | None, Option(metavar="GLOBS", help="Show what these passes, or 'lower', did to each graph.")
    ] = None,
    machine: Annotated[str, Option(help="Name of the machine of the least times.")] = "H200",
    tflops: Annotated[float, Option(help="Its peak rate, TFLOP/s; by default that of an H200, dense bf16.")] = 989.0,
    bandwidth: Annotated[float, Option(help="Its memory bandwidth, TB/s; by default that of an H200.")] = 4.8,
    out: Annotated[Path | None, Option("--json", metavar="FILE", help="Write the report as JSON.")] = None,
) -> None:
    """Show each kind of layer: its ops, who runs them or why Inductor does, FLOPs, bytes, least time; and near misses."""
    from ..errors import DSV4Error
    from .inputs import InputError, check_writable
    from .screen import Screen

    asked = {"passes": passes, "disable": disable, "lowerings": lowerings, "strict": strict or None, "diff": diff}
    with plainly(InputError, DSV4Error):
        check_writable(out, "--json")
        with Screen().step("capturing and rewriting"):
            report = described(model, phase, length, device, dtype, asked, (machine, tflops, bandwidth))
    typer.echo(str(report))
    if out is not None:
        out.write_text(json.dumps(content(report), indent=2) + "\n", encoding="utf-8")


def described(
    model: Path | None,
    phase: str,
    length: int,
    device: str | None,
    dtype: str | None,
    asked: dict[str, Any],
    machine: tuple[str, float, float],
) -> "Report":
    """The report on one call of a model. Raises InputError, and under strict SitesMissing."""
    import torch

    from ..errors import DSV4Error, nearest
    from ..reporting.explain import explain
    from ..reporting.roofline import Machine
    from . import inputs

    if phase not in PHASES:
        raise inputs.InputError(f"--phase: unknown phase {phase!r}{nearest(phase, PHASES)}")
    name, tflops, bandwidth = machine
    if not (tflops > 0 and bandwidth > 0):
        raise inputs.InputError(f"--tflops {tflops} --bandwidth {bandwidth}: expected positive numbers")
    place = inputs.read_device(device)
    options, _ = inputs.backend_options(asked | {"inner": "eager"}, place)
    loaded, _ = inputs.load_model(model, place, inputs.read_dtype(dtype, place), lambda *_: None)
    context = loaded.config.max_position_embeddings
    if not 1 <= length <= context:
        raise inputs.InputError(f"--length {length}: expected 1 to {context} (max_position_embeddings)")
    tokens = torch.arange(length if phase == "prefill" else 1, device=place).unsqueeze(0) % loaded.config.vocab_size
    try:
        report = explain(loaded.requires_grad_(False), tokens, loaded.new_state(1, length), options=options)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        if isinstance(error.inner_exception, DSV4Error):
            raise error.inner_exception from error
        raise
    report.machine = Machine(name, tflops * 1e12, bandwidth * 1e12)
    return report


def content(report: "Report") -> dict[str, Any]:
    """A report as JSON takes it: counts, kinds of layer with their rows and what no rewrite took, near misses, diffs."""
    from ..reporting.table import kinds

    return {
        "counts": dict(report.counts),
        "sites": dict(report.sites),
        "machine": asdict(report.machine),
        "kinds": [
            {
                "name": kind.name,
                "layers": list(kind.layers),
                "seconds": kind.seconds,
                "ops": [asdict(row) | {"sizes": dict(row.sizes)} for row in kind.rows],
                "left": [asdict(part) for part in kind.left],
            }
            for kind in kinds(report)
        ],
        "misses": [
            {k: getattr(m, k) for k in ("rule", "anchor", "expected", "found", "where", "progress")}
            for m in report.misses
        ],
        "diffs": [{"pass": name, "diff": diff} for name, diff in report.diffs],
    }
