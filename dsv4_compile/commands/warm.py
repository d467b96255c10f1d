"""`dsv4 warm`: build the kernels of a model before it runs, on a machine that needs no GPU."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .arguments import Option, plainly

if TYPE_CHECKING:
    import torch

    from ..reference_model import DSV4Config

NAMED = ("flash", "pro", "tiny")


def warm(
    config: Annotated[
        str, Option(metavar="NAME|DIR", help="flash, pro, tiny, nano, or a folder or file with a config.json.")
    ] = "nano",
    arch: Annotated[str, Option(help="What to compile for.")] = "sm_90a",
    batch: Annotated[int, Option(help="Sequences of a call.")] = 1,
    tokens: Annotated[str, Option(help="Tokens of the calls to prepare for; 1 is decode.")] = "1,512",
    max_len: Annotated[int, Option(help="Positions of a state; at most the model's context.")] = 8192,
    dtype: Annotated[str, Option(help="Compute dtype.")] = "bfloat16",
    jobs: Annotated[int, Option(help="Processes.")] = max(len(os.sched_getaffinity(0)) - 1, 1),
    candidates: Annotated[
        bool, Option("--candidates", help="Also the configurations that autotune=full tries, up to 16 a kernel.")
    ] = False,
    invariant: Annotated[bool, Option("--invariant", help="As they are with batch_invariant.")] = False,
) -> None:
    """Find the kernels that a model needs, and build those that the cache does not hold."""
    from .inputs import DTYPES, InputError

    with plainly(InputError):
        if dtype not in DTYPES:
            raise InputError(f"--dtype: unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
        counts = [int(t) for t in tokens.split(",") if t.strip().isdigit()]
        if not counts or min(*counts, batch, max_len, jobs) < 1:
            raise InputError("--tokens, --batch, --max-len and --jobs: expected numbers of at least 1")
        failed = prepare(config_of(config), arch, batch, counts, max_len, DTYPES[dtype], jobs, candidates, invariant)
    if failed:
        raise typer.Exit(1)


def config_of(name: str) -> "DSV4Config":
    """Raises InputError for what is neither a known name nor readable."""
    from ..reference_model import DSV4Config, nano
    from ..reference_model.shards import read_config
    from .inputs import InputError, as_input_error

    if name in NAMED:
        return getattr(DSV4Config, name)()
    path = nano.CHECKPOINT if name == "nano" else Path(name)
    if not path.exists():
        raise InputError(f"--config {name}: expected {', '.join(NAMED)}, nano, or a folder with a config.json")
    with as_input_error(ValueError, TypeError, OSError):
        return DSV4Config.from_hf(read_config(path))


def prepare(
    config: "DSV4Config",
    arch: str,
    batch: int,
    counts: list[int],
    max_len: int,
    dtype: "torch.dtype",
    jobs: int,
    candidates: bool,
    invariant: bool,
) -> int:
    """Survey, build, tell -> how many kernels could not be built or are not known."""
    from ..warm import Wanted, build_all, survey
    from .screen import Screen

    screen, built = Screen(), {True: 0, False: 0}
    with screen.step("tracing the model") as step:
        longest = min(max_len, config.max_position_embeddings)
        found = survey(config, arch, batch, counts, longest, dtype, candidates, invariant)
    for op, why in found.unknown.items():
        screen.note(f"dsv4::{op}: its kernels are not known ({why})")
    errors: list[str] = []
    with screen.step(f"building kernels for {arch}") as step:

        def done(one: Wanted, new: bool, error: Exception | None) -> None:
            built[new] += error is None
            if error is not None:
                errors.append(f"{one}: {type(error).__name__}: {error}")
            step.at(str(one), sum(built.values()) + len(errors), len(found.wanted))

        build_all(found.wanted, arch, min(jobs, max(len(found.wanted), 1)), done)
    for error in errors:
        screen.note(error)
    print(f"{len(found.wanted)} kernels: {built[True]} built, {built[False]} in the cache, {len(errors)} failed")
    return len(errors) + len(found.unknown)
