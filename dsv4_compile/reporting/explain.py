"""What would be fused in this model, and what not and why: one compile past all caches, nothing generated."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType
from typing import Any

import torch

from ..backend import backend
from . import sites
from .report import Report


def explain(model: Any, *args: Any, options: dict[str, Any] | None = None, **kwargs: Any) -> Report:
    """Compile and run `model(*args, **kwargs)` with inner="eager" and report on all its graphs.

    `print(explain(model, ids))` shows tables: fusions found and expected; for each kind of layer its ops, who runs them or
    why they went back to Inductor, their operations, bytes and least time; near misses. `options`: those of the backend;
    {"diff": "fuse.moe"} adds what that pass did to each graph. Set `report.machine` for the least times of another machine.

    The arguments (generation state among them) are copied and the model's buffers restored, so nothing of the caller's
    changes. Gradients are off. DSV4_* variables apply.
    """
    report = Report(sites=sites.expected(model, bool(kwargs.get("mtp"))), kinds=sites.kinds(model))
    chosen = {**(options or {}), "inner": "eager"}
    compiled = torch.compile(fresh(model), backend=partial(backend, options=chosen, observe=report.merge))
    with torch.no_grad(), buffers_kept(model):
        compiled(*copy.deepcopy(args), **copy.deepcopy(kwargs))
    return report


def fresh(model: Any) -> Any:
    """A function that Dynamo has not seen: it counts recompiles, and gives up on, one code object at a time."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    return FunctionType(call.__code__.replace(), call.__globals__, "explain", None, call.__closure__)


@contextmanager
def buffers_kept(model: Any) -> Iterator[None]:
    """A module's buffers are afterwards what they were before."""
    buffers = list(model.buffers()) if isinstance(model, torch.nn.Module) else []
    saved = [b.clone() for b in buffers]
    try:
        yield
    finally:
        for buffer, old in zip(buffers, saved, strict=True):
            buffer.copy_(old)
