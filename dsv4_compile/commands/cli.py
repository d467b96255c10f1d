"""The command line. `dsv4 run` is the main job; bad input ends with one line on stderr and exit code 2."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from .arguments import Device, Disable, Dtype, Lowerings, Model, Option, Passes, Strict, plainly
from .bench import bench
from .bisect import bisect, shadow
from .cache import app as cache_app
from .explain import explain
from .warm import warm

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(cache_app, name="cache")
app.command()(explain)
app.command()(bisect)
app.command()(shadow)
app.command()(warm)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})(bench)


@app.callback()
def dsv4() -> None:
    """dsv4_compile: a torch.compile backend for DeepSeek-V4."""


@app.command()
def run(
    model: Model = None,
    prompt: Annotated[str, Option(help="Text to continue.")] = "def ",
    max_new_tokens: Annotated[int, Option(help="Tokens to generate.")] = 128,
    temperature: Annotated[float, Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, Option(help="Seed of the sampling.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    passes: Passes = None,
    disable: Disable = None,
    lowerings: Lowerings = None,
    mode: Annotated[str | None, Option(help="Preset: decode, prefill or debug.")] = None,
    strict: Strict = False,
    verify: Annotated[bool, Option("--verify", help="Try every rewrite, and leave out those that are wrong.")] = False,
    cache_dir: Annotated[str | None, Option(metavar="DIR", help="Where reports are kept for warm starts.")] = None,
    inner: Annotated[
        str | None, Option(help="inductor, or eager to run the rewritten graph op by op without generated code.")
    ] = None,
    compare: Annotated[str | None, Option(metavar="inductor", help="Also time plain torch.compile.")] = None,
    report: Annotated[Path | None, Option(metavar="FILE", help="Write the result as JSON.")] = None,
) -> None:
    """Generate text with a compiled model, then compare it with eager: sites, compile time, speed, accuracy."""
    from .inputs import InputError, check_writable
    from .run import Ask
    from .run import run as do
    from .screen import Screen

    screen = Screen()
    with plainly(InputError):
        check_writable(report, "--report")
        job = Ask(model, prompt, max_new_tokens, temperature, seed, device, dtype, compare=compare)
        job = replace(job, passes=passes, disable=disable, lowerings=lowerings, mode=mode, strict=strict or None)
        result = do(replace(job, verify=verify or None, cache_dir=cache_dir, inner=inner), screen)
    screen.table(result)
    if report is not None:
        report.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        screen.note(f"report written to {report}")


def main() -> None:
    app(prog_name="dsv4")
