"""`dsv4 bisect` and `dsv4 shadow`: which rewrites make a model wrong, and how far each of them is off."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .arguments import Device, Disable, Dtype, Lowerings, Model, Option, plainly

Prompt = Annotated[str, Option(help="Text that the model reads.")]
Phase = Annotated[
    str, Option(help="prefill: the prompt in one call; decode: its last token, the others being in the state.")
]

PROMPT = "def largest(values):\n    "


def bisect(
    model: Model = None,
    prompt: Prompt = PROMPT,
    phase: Phase = "prefill",
    metric: Annotated[str, Option(help="logits, kl, tokens or bits: what of the output must not change.")] = "logits",
    threshold: Annotated[float | None, Option(help="Of the metric; by default what rounding does not reach.")] = None,
    budget: Annotated[int, Option(help="Compiles to spend.")] = 200,
    device: Device = None,
    dtype: Dtype = None,
    disable: Disable = None,
    lowerings: Lowerings = None,
    script: Annotated[Path | None, Option(metavar="FILE", help="Write a Python file that shows the fault.")] = None,
) -> None:
    """Find the rewrites that make a model wrong: rule, layer and source line of each. Exit code 1 if there are any."""
    from ..accuracy.bisect import bisect as search
    from ..errors import DSV4Error
    from .inputs import InputError
    from .screen import Screen

    screen = Screen()
    with plainly(InputError, DSV4Error), screen.step("searching"):
        loaded, (tokens, *state), options = prepared(model, prompt, phase, device, dtype, disable, lowerings)
        if metric == "bits" and phase == "decode":
            raise InputError("--metric bits: needs the prompt in one call; use --phase prefill, or --metric kl")
        place = repr(str(model.resolve())) if model is not None else "nano.CHECKPOINT"
        source = f"reference_model.load({place}, {str(tokens.device)!r}, {loaded.embed.weight.dtype})"
        result = search(
            loaded,
            tokens,
            *state,
            metric=metric,
            threshold=threshold,
            budget=budget,
            options=options,
            script=script,
            source=f"{source}.requires_grad_(False)",
            tell=screen.note,
        )
    typer.echo(str(result))
    if result.guilty or result.spent:
        raise typer.Exit(1)


def shadow(
    model: Model = None,
    prompt: Prompt = PROMPT,
    phase: Phase = "prefill",
    device: Device = None,
    dtype: Dtype = None,
    disable: Disable = None,
    lowerings: Lowerings = None,
) -> None:
    """Hold every op against the plain graph while a prompt is read: errors by layer and rule. Exit code 1 if one is wrong."""
    from ..accuracy.shadow import shadow as watch
    from ..errors import DSV4Error
    from .inputs import InputError
    from .screen import Screen

    with plainly(InputError, DSV4Error), Screen().step("comparing"):
        loaded, given, options = prepared(model, prompt, phase, device, dtype, disable, lowerings)
        result = watch(loaded, *given, options=options)
    typer.echo(str(result))
    if result.failed:
        raise typer.Exit(1)


def prepared(
    model: Path | None,
    prompt: str,
    phase: str,
    device: str | None,
    dtype: str | None,
    disable: str | None,
    lowerings: str | None,
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The model; its tokens [1, T] and at decode its state; the backend's options. Raises InputError."""
    import torch

    from ..errors import nearest
    from . import inputs
    from .explain import PHASES
    from .text import special, text_of

    if phase not in PHASES:
        raise inputs.InputError(f"--phase: unknown phase {phase!r}{nearest(phase, PHASES)}")
    place = inputs.read_device(device)
    options, _ = inputs.backend_options({"disable": disable, "lowerings": lowerings, "inner": "eager"}, place)
    loaded, folder = inputs.load_model(model, place, inputs.read_dtype(dtype, place), lambda *_: None)
    ids = [*special(loaded.config.bos_token_id)[:1], *text_of(folder, loaded.config).encode(prompt)]
    if len(ids) < 2:
        raise inputs.InputError("--prompt is too short: give at least two tokens of text")
    inputs.check_fits(len(ids) - 1, 1, loaded.config.max_position_embeddings)
    tokens = torch.tensor([ids], device=place)
    if phase == "prefill":
        return loaded.requires_grad_(False), (tokens,), options
    state = loaded.requires_grad_(False).new_state(1, len(ids))
    loaded(tokens[:, :-1], state)
    return loaded, (tokens[:, -1:], state), options
