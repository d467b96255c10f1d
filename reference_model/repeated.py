"""Modules that a model has many of, and that torch.compile traces once for all that are alike.

Torch 2.13 compares what the trace of a region read (numbers, tensors, globals) with the same of another layer, name by name,
which takes as long as all else that Dynamo does for the layer; and it compares neither classes nor hooks. For modules that
are as this package and torch wrote them `Repeated.likeness` says all that a trace can depend on, and stands for that
comparison; for others torch compares, and the classes are.
"""

import inspect
import itertools
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import TracingContext

NUMBERS: dict[Any, int] = {}
UNUSED = itertools.count(1)
OURS = (f"{__package__}.", "torch.nn.modules.")
SAVING = {"_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"}


class Repeated(nn.Module):
    """A layer whose forward does its work in `region`, by way of `once`."""

    region: Callable[..., Any]  # declared with `region`; takes a number, then what `once` is given
    known: Callable[..., Any]  # the same, declared with `known_region`

    def once(self, own: tuple[Any, ...], memory: Any, mark: int, shared: tuple[Any, ...]) -> Any:
        """region(number, *own, whether there is memory, *its parts, *shared), traced once for all layers that are alike.
        memory: an object with `parts` and their `likeness`, or None; mark: `mark_of(shared)`."""
        kept = (False,) if memory is None else (True, *memory.parts())
        if not torch.compiler.is_dynamo_compiling():
            return self.region(0, *own, *kept, *shared)
        facts = described(own)
        kind = self.likeness() + 0  # a sum has no origin: it is compared by value
        if kind < 0 or mark == 0 or symbols():
            return self.region(kind, *own, *kept, *shared)
        of_memory = 0 if memory is None else memory.likeness() + 0
        return self.known(number(kind, mark, of_memory, *facts) + 0, *own, *kept, *shared)

    @torch.compiler.assume_constant_result
    def likeness(self) -> int:
        """A number that modules share which are the same but for the values of their tensors. It is negative if something
        in them is not as this package or torch wrote it: then they consist of the same classes, and one that has hooks,
        or a `forward` of its own, anywhere in it shares its number with no other."""
        modules = list(self.named_modules(remove_duplicate=False))
        if any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for _, m in modules):
            return -next(UNUSED)
        if all(as_written(m) for _, m in modules):
            return number(*parts_of(modules))
        return -number(*((name, type(m)) for name, m in modules))


def as_written(module: nn.Module) -> bool:
    """Whether the class of a module is this package's or torch's, calls what they wrote, and has no hooks for gradients."""
    written = (type(module).__module__, type(module).forward.__module__)
    hooked = module._backward_hooks or module._backward_pre_hooks
    return all(f"{name}.".startswith(OURS) for name in written) and not hooked


def parts_of(modules: list[tuple[str, nn.Module]]) -> Iterator[Any]:
    """All that a trace can read of modules: their classes, tensors without their values, and other attributes. Two names of
    one tensor, or of one storage, are told from those of two."""
    places: dict[Any, int] = {}
    for name, module in modules:
        yield name, type(module), places.setdefault(id(module), len(places))
        for key, x in vars(module).items():
            if key in ("_parameters", "_buffers"):
                for part, t in x.items():
                    yield part, None if t is None else about(t, places)
            elif key not in SAVING and key != "_modules":
                yield key, plain(x)


def about(t: Tensor, places: dict[Any, int]) -> Any:
    """A tensor without its values."""
    storage = places.setdefault(t.untyped_storage()._cdata, len(places)), t.storage_offset()
    same = places.setdefault(id(t), len(places))
    layout = t.dtype, t.device, t.layout, t.shape, t.stride(), t.requires_grad, t.is_inference()
    return type(t), *layout, *storage, same, tuple(sorted(vars(t)))


def plain(x: Any) -> Any:
    """Values by type and value, everything else by identity."""
    if isinstance(x, (list, tuple)):
        return type(x), tuple(map(plain, x))
    if isinstance(x, (set, frozenset)):
        return type(x), frozenset(map(plain, x))
    if isinstance(x, dict):
        return type(x), tuple((plain(k), plain(v)) for k, v in x.items())
    if isinstance(x, (bool, int, float, complex, str, bytes, torch.dtype, torch.device, type(None))):
        return type(x), repr(x)
    return type(x), id(x)


def mark_of(shared: tuple[Any, ...]) -> int:
    """A number for tensors and numbers that layers share, which stands for all but the values of the tensors; 0 if there is
    none. Traced."""
    if not torch.compiler.is_dynamo_compiling():
        return 0
    facts = described(shared)
    return 0 if symbols() else number(*facts) + 0


def described(args: tuple[Any, ...]) -> list[Any]:
    """Arguments, tensors among them without their values. Traced, at every layer: few steps."""
    found: list[Any] = []
    for x in args:
        found.append((x.dtype, x.device, x.requires_grad, x.shape, x.stride()) if isinstance(x, Tensor) else x)
    return found


@torch.compiler.assume_constant_result
def symbols() -> bool:
    """Whether sizes that were traced so far are symbols."""
    context = TracingContext.try_get()
    mode = None if context is None else context.fake_mode
    return mode is None or mode.shape_env is None or bool(mode.shape_env.var_to_range)


@torch.compiler.assume_constant_result
def number(*parts: Any) -> int:
    """The same for parts that are equal, as long as they live."""
    return NUMBERS.setdefault(parts, next(UNUSED))


def region(f: Callable[..., Any]) -> Any:
    """Compiled once for all calls that torch finds alike; by default torch 2.13 gives up where there are more than 8 kinds."""
    return torch.compiler.nested_compile_region(f, **understood(max_reuse_entries=1 << 20))


def known_region(f: Callable[..., Any]) -> Any:
    """Compiled once for all calls with the same number as first argument behind the module."""
    twin = FunctionType(f.__code__, f.__globals__, f.__name__, f.__defaults__, f.__closure__)
    how = understood(max_reuse_entries=1 << 20, reuse_hash_fn=lambda module, number, *args: number)
    return torch.compiler.nested_compile_region(twin, **how)


def understood(**options: Any) -> dict[str, Any]:
    """Those options that this torch has; 2.11 traces every call."""
    names = inspect.signature(torch.compiler.nested_compile_region).parameters
    return {name: x for name, x in options.items() if name in names}
