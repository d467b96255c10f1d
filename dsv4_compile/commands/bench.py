"""`dsv4 bench`: `python -m benchmarks`, from anywhere. Benchmarks are not installed: they need the checkout."""

import runpy
import sys
from pathlib import Path

import typer

CHECKOUT = Path(__file__).resolve().parents[2]


def bench(context: typer.Context) -> None:
    """Time ops against eager PyTorch and Inductor; all arguments are those of `python -m benchmarks`."""
    if not (CHECKOUT / "benchmarks" / "__main__.py").is_file():
        typer.echo(
            "dsv4 bench: the benchmarks are not installed; run it in a checkout, installed with `pip install -e .`",
            err=True,
        )
        raise typer.Exit(2)
    sys.path.insert(0, str(CHECKOUT))
    sys.argv[1:] = context.args
    runpy.run_module("benchmarks", run_name="__main__")
