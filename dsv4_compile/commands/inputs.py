"""What a user hands to the command line, checked before any work is done: each error names the thing and the fix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import DSV4Error, nearest

if TYPE_CHECKING:
    from ..config import Config
    from ..reference_model import DSV4

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


class InputError(Exception):
    """Something the user gave cannot be used; the text says what and what to do. The command line exits with 2."""


@contextmanager
def as_input_error(*kinds: type[BaseException]) -> Iterator[None]:
    """Turn errors of these kinds, whose texts are written for users, into InputError."""
    try:
        yield
    except kinds as error:
        raise InputError(str(error)) from error


def read_device(name: str | None) -> torch.device:
    """The device asked for, or CUDA where there is one, else the CPU."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device {name}: not a device; use cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: expected cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices; use --device cpu"
        )
    return device


def read_dtype(name: str | None, device: torch.device) -> torch.dtype | None:
    """The compute dtype asked for. By default fp32 on a CPU, where narrower types are slower, and elsewhere None, which keeps
    what the checkpoint stores. Quantised weights stay as they are."""
    if name is not None and name not in DTYPES:
        raise InputError(f"--dtype: unknown dtype {name!r}{nearest(name, DTYPES)}")
    if name is not None:
        return DTYPES[name]
    return torch.float32 if device.type == "cpu" else None


def backend_options(given: dict[str, Any], device: torch.device) -> tuple[dict[str, Any], Config]:
    """What was given (None: left out) as options for `torch.compile(backend="dsv4")`, all of them checked now instead of
    inside Dynamo, and what they mean together with DSV4_* variables."""
    from .. import backend, config
    from ..op import DEVICES
    from ..patterns import RULES

    options = {name: value for name, value in given.items() if value is not None}
    with as_input_error(DSV4Error):
        resolved = config.resolve(options, passes={rule.name for rule in RULES}, devices=DEVICES)
        backend.chosen_inner(resolved.inner or "inductor", [torch.empty(0, device=device)])
    return options, resolved


def load_model(
    path: Path | None, device: torch.device, dtype: torch.dtype | None, progress: Callable[[str, int, int], None]
) -> tuple[DSV4, Path]:
    """Read the model at `path`, or the packaged one; returns it with the folder that holds it."""
    from ..reference_model import load, nano

    path = nano.CHECKPOINT if path is None else path
    with as_input_error(ValueError, TypeError, OSError):
        return load(path, device, dtype, progress=progress), path.parent if path.is_file() else path


def check_writable(file: Path | None, option: str) -> None:
    """Refuse a file that cannot be written before the work, not after it."""
    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise InputError(f"{option} {file}: expected a file in a folder that exists")


def check_fits(prompt: int, new: int, context: int) -> None:
    """Raise InputError unless a prompt and the tokens to be generated fit the model's context."""
    if new < 1:
        raise InputError(f"--max-new-tokens {new}: expected at least 1")
    if prompt + new > context:
        raise InputError(
            f"the prompt has {prompt} tokens and --max-new-tokens asks for {new} more, the model's context "
            f"(max_position_embeddings) is {context}: shorten the prompt or ask for at most {max(context - prompt, 0)}"
        )
