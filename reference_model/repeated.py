"""Modules that a model has many of, and that torch.compile traces once for all that are alike.

Torch 2.13 compares what the trace of a region read (numbers, tensors, globals) with the same of another layer, but neither
the classes nor the hooks of the modules in it.
"""

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

NUMBERS: dict[tuple[tuple[str, type], ...], int] = {}
UNUSED = itertools.count()


class Repeated(nn.Module):
    """A layer whose forward calls a `region` with its `likeness`."""

    @torch.compiler.assume_constant_result
    def likeness(self) -> int:
        """A number that modules share which consist of the same classes. One that has hooks, or a `forward` of its own,
        anywhere in it shares its number with no other."""
        modules = list(self.named_modules())
        if any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for _, m in modules):
            return next(UNUSED)
        return NUMBERS.setdefault(tuple((name, type(m)) for name, m in modules), next(UNUSED))


def region(f: Callable[..., Any]) -> Any:
    """Compiled once for all calls that are alike; by default torch 2.13 gives up where there are more than 8 kinds."""
    limit = {"max_reuse_entries": 1 << 20}
    known = inspect.signature(torch.compiler.nested_compile_region).parameters
    return torch.compiler.nested_compile_region(f, **(limit if limit.keys() <= known.keys() else {}))
