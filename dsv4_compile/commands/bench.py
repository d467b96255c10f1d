"""`dsv4 bench`: `python -m benchmarks`, and with `--layer` `python -m benchmarks.layer`, from anywhere. Benchmarks are not
installed: they need the checkout."""

import runpy
import sys
from pathlib import Path

import typer

CHECKOUT = Path(__file__).resolve().parents[2]
LAYER = "--layer"


def bench(context: typer.Context) -> None:
    """Time ops against eager PyTorch and Inductor, or with --layer whole layers, launch by launch. All other arguments are
    those of `python -m benchmarks`, or of `python -m benchmarks.layer`."""
    if not (CHECKOUT / "benchmarks" / "__main__.py").is_file():
        typer.echo(
            "dsv4 bench: the benchmarks are not installed; run it in a checkout, installed with `pip install -e .`",
            err=True,
        )
        raise typer.Exit(2)
    sys.path.insert(0, str(CHECKOUT))
    sys.argv[1:] = [word for word in context.args if word != LAYER]
    runpy.run_module("benchmarks.layer" if LAYER in context.args else "benchmarks", run_name="__main__")
