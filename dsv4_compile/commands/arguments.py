"""What the commands have in common: options that mean the same everywhere, and how bad input ends."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

Option = typer.Option
Model = Annotated[
    Path | None,
    Option(metavar="DIR", help="Checkpoint folder or .safetensors file; the packaged nano if left out."),
]
Device = Annotated[str | None, Option(help="cpu, cuda or cuda:N; CUDA where there is one.")]
Dtype = Annotated[str | None, Option(help="Compute dtype; float32 on CPU, as stored on CUDA.")]
Passes = Annotated[str | None, Option(metavar="GLOBS", help="Passes to run; all if left out.")]
Disable = Annotated[str | None, Option(metavar="GLOBS", help="Passes to leave out, such as 'fuse.moe,raise.*'.")]
Lowerings = Annotated[str | None, Option(metavar="GLOBS", help="Devices whose implementations run ops.")]
Strict = Annotated[bool, Option("--strict", help="Fail if a fusion does not find all its places.")]


@contextmanager
def plainly(*errors: type[Exception]) -> Iterator[None]:
    """These errors are one line on stderr and exit code 2."""
    try:
        yield
    except errors as error:
        typer.secho(f"error: {error}", err=True, fg="red")
        raise typer.Exit(2) from None
