"""What a lowering file declares: an op by its meaning, what it costs, and who can run it.

The meaning is an ordinary PyTorch function. It is the oracle of the tests, the fake (run on fake tensors), what runs
where nobody else can, and what is inlined back into a graph. Ops are functional and return contiguous tensors.

    @op("dsv4::double")
    def double(x: Tensor, by: float) -> Tensor:
        \"\"\"x * by.\"\"\"
        return x * by

    @double.on("cuda", arch="sm_90", when=lambda a: a.x.is_contiguous() or "x must be contiguous")
    def _(x, by): ...
"""

import inspect
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import sympy
import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true as known

from .errors import BadOp
from .tuning import alike
from .tuning import few as few_tokens

__all__ = ["Cost", "Implementation", "Op", "Tensor", "acc", "alike", "at_least", "few_tokens", "hinted", "known"]
__all__ += ["left_to_inductor", "op"]

LIBRARY = torch.library.Library("dsv4", "DEF")
TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "SymInt", float: "float", bool: "bool"}
DEVICES = ("cuda", "cpu")


def acc(x: Tensor) -> Tensor:
    """At least fp32: bf16 and fp16 are raised, fp32 and fp64 stay as they are."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


@dataclass(frozen=True)
class Cost:
    """Floating-point operations, bytes read and bytes written by one call: sympy expressions of the sizes."""

    flops: Any
    read: Any
    write: Any

    def at(self, **sizes: int) -> "Cost":
        """The numbers for given sizes."""
        values = {sympy.Symbol(name): size for name, size in sizes.items()}
        return Cost(*(sympy.sympify(x).subs(values) for x in (self.flops, self.read, self.write)))


@dataclass(frozen=True)
class Implementation:
    """One way to run an op on one device. `when` returns True or the reason why it cannot; `worth` True or the reason why
    the meaning, compiled with what surrounds it, is as fast."""

    device: str
    arch: str | None
    when: Callable[[Any], bool | str] | None
    worth: Callable[[Any], bool | str] | None
    run: Callable[..., Any]
    in_place: tuple[str, ...] = ()  # arguments that `write` changes into the outputs; `run` does so in copies
    write: Callable[..., None] | None = None

    @property
    def name(self) -> str:
        return self.device if self.arch is None else f"{self.device} {self.arch}"

    @property
    def asks(self) -> bool:
        """Whether anything but the device type decides."""
        return self.arch is not None or self.when is not None or bool(self.in_place)

    def accepts(self, arguments: dict[str, Any], device: torch.device, if_worth: bool) -> bool | str:
        """True, or the reason why not. Arguments may be fake: only dtype, shape, strides and device may be asked."""
        if device.type != self.device:
            return f"runs on {self.device}, not on {device.type}"
        if self.arch is not None and not runs_on(self.arch, capability(device)):
            return f"needs {self.arch}"
        if self.device == "cuda" and not has_cutedsl():
            return "GPU kernels need nvidia-cutlass-dsl and apache-tvm-ffi"
        for name in self.in_place:
            if not arguments[name].is_contiguous():
                return f"{name} is not contiguous"
        for ask in (self.when, self.worth if if_worth else None):
            if ask is not None and (verdict := ask(SimpleNamespace(**arguments))) is not True:
                return verdict
        return True


def compact(x: Tensor) -> Tensor:
    """x, or a contiguous copy. Without a GPU torch refuses `contiguous()` of a fake tensor on one, but copies it."""
    return x if x.is_contiguous() else x.clone(memory_format=torch.contiguous_format)


def at_least(count: int, rows: Callable[[Any], Any]) -> Callable[[Any], bool | str]:
    """For `worth`: enough rows, as `rows` counts them in the arguments. A number that is not known is enough."""
    return lambda a: not known(rows(a) < count) or f"fewer than {count} rows"


def at_most(count: int, rows: Callable[[Any], Any]) -> Callable[[Any], bool | str]:
    """For `worth`: few enough rows, as `rows` counts them in the arguments. A number that is not known is few enough, and any
    where results must not depend on it."""
    return lambda a: alike() or not known(rows(a) > count) or f"more than {count} rows"


def left_to_inductor(a: Any) -> str:
    """For `worth` of an implementation that beats the meaning run call by call, and never the meaning compiled."""
    return "compiled, what it says is as fast"


@cache
def has_cutedsl() -> bool:
    return all(find_spec(name) is not None for name in ("cutlass", "tvm_ffi"))


def capability(device: torch.device) -> tuple[int, int]:
    """Of the architecture that DSV4_ARCH says kernels are compiled for, else of the device."""
    asked = os.environ.get("DSV4_ARCH")
    if not asked:
        return torch.cuda.get_device_capability(device)
    digits = asked.removeprefix("sm_").rstrip("abcdef")
    return int(digits[:-1]), int(digits[-1])


def runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """ "sm_90" is that architecture alone, "sm_80+" it and all later ones."""
    digits = arch.removeprefix("sm_").removesuffix("+")
    wanted = int(digits[:-1]), int(digits[-1])
    return capability >= wanted if arch.endswith("+") else capability == wanted


@dataclass(eq=False)
class Op:
    """An op of the dsv4 namespace. Calling it calls torch.ops.dsv4.<name>."""

    name: str
    meaning: Callable[..., Any]
    outputs: tuple[str, ...]
    schema: str
    implementations: list[Implementation] = field(default_factory=list)
    cost_of: Callable[..., Cost] | None = None
    sizes_of: Callable[[Any], dict[str, Any]] | None = None
    known_fakes: dict[Any, Any] = field(default_factory=dict, repr=False)
    in_place: tuple[str, ...] = ()  # the arguments that `dsv4::<name>_` writes to, if there is such an op
    signature: inspect.Signature = field(init=False, repr=False)  # of the meaning; Dynamo could not work it out

    def __post_init__(self) -> None:
        self.signature = inspect.signature(self.meaning)

    @property
    def target(self) -> Any:
        """The overload that stands in graphs."""
        return getattr(torch.ops.dsv4, self.name).default

    @property
    def writing_target(self) -> Any:
        """The overload of `dsv4::<name>_`: it returns nothing and makes of the arguments `in_place` what `target` returns."""
        return getattr(torch.ops.dsv4, f"{self.name}_").default

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) < len(self.signature.parameters):
            args = tuple(self.arguments(*args, **kwargs).values())
        return self.target(*args)

    def arguments(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """All arguments by name, defaults filled in."""
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)

    def claim(
        self, arguments: dict[str, Any], among: Any = DEVICES, if_worth: bool = False
    ) -> tuple[Implementation | None, list[str]]:
        """The first implementation, in order of declaration, that accepts; and why those before it did not."""
        device = next(a.device for a in arguments.values() if isinstance(a, Tensor))
        reasons: list[str] = []
        for implementation in self.implementations:
            if implementation.device not in among:
                continue
            verdict = implementation.accepts(arguments, device, if_worth)
            if verdict is True:
                return implementation, reasons
            reasons.append(f"{implementation.name}: {verdict}")
        return None, reasons

    def run(self, *args: Any) -> Any:
        """The op on real tensors: whoever claims it, else its meaning. The dispatcher hands over every argument."""
        first = args[0] if isinstance(args[0], Tensor) else next(a for a in args if isinstance(a, Tensor))
        kind = first.device.type
        for implementation in self.implementations:  # to name the arguments takes longer than a small op
            if implementation.device == kind:
                if not implementation.asks:
                    return implementation.run(*args)
                break
        claimed, _ = self.claim(dict(zip(self.signature.parameters, args, strict=True)))
        if claimed is not None:
            return claimed.run(*args)
        return self._each(self.meaning(*args), lambda x: own(x, args))

    def write(self, *args: Any) -> None:
        """`dsv4::<name>_` on real tensors."""
        arguments = dict(zip(self.signature.parameters, args, strict=True))
        implementation, _ = self.claim(arguments)
        if implementation is not None and implementation.write is not None:
            implementation.write(*args)
            return
        results = self.run(*args)
        for name, result in zip(self.in_place, results if len(self.outputs) > 1 else (results,), strict=True):
            arguments[name].copy_(result)

    def fake(self, *args: Any) -> Any:
        """Contiguous tensors of the shapes and dtypes that the meaning gives."""
        if any(isinstance(x, torch.SymInt) for a in args for x in (a.shape if isinstance(a, Tensor) else [a])):
            return self._each(self.meaning(*args), lambda x: torch.empty(x.shape, dtype=x.dtype, device=x.device))
        key = tuple((a.dtype, a.device, *a.shape) if isinstance(a, Tensor) else a for a in args)
        if key not in self.known_fakes:  # running a meaning of 100 calls on fake tensors takes 50 ms
            found = self._each(self.meaning(*args), _metadata)
            self.known_fakes[key] = (found,) if len(self.outputs) == 1 else found
        made = tuple(torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in self.known_fakes[key])
        return made[0] if len(self.outputs) == 1 else made

    def _each(self, result: Any, f: Callable[[Tensor], Any]) -> Any:
        return f(result) if len(self.outputs) == 1 else tuple(map(f, result))

    # declarations

    def on(
        self,
        device: str,
        *,
        arch: str | None = None,
        when: Callable[[Any], bool | str] | None = None,
        worth: Callable[[Any], bool | str] | None = None,
        in_place: str | tuple[str, ...] = (),
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Declare an implementation, with the arguments of the meaning. Earlier ones are asked first.

        `in_place` names the arguments that it makes into the op's outputs, in their order, returning nothing. Graphs call it
        so that Inductor copies an argument first where somebody else still reads it, and not otherwise; eager calls always
        copy.
        """
        places = (in_place,) if isinstance(in_place, str) else in_place
        if device not in DEVICES:
            raise BadOp(f"{self.name}.on({device!r}): the devices are {', '.join(DEVICES)}")
        if places:
            self._writes_to(places)

        def declare(run: Callable[..., Any]) -> Callable[..., Any]:
            if places:
                of_copies = partial(_in_copies, run, [[*self.signature.parameters].index(name) for name in places])
                new = Implementation(device, arch, when, worth, of_copies, places, run)
            else:
                new = Implementation(device, arch, when, worth, run)
            self.implementations.append(new)
            return run

        return declare

    def _writes_to(self, arguments: tuple[str, ...]) -> None:
        """Define `dsv4::<name>_`."""
        if self.in_place == arguments:
            return
        taken, _, _ = self.schema.partition(" -> ")
        tensors = [a for a in arguments if re.search(rf"\bTensor {a}\b", taken)]
        if self.in_place or len(tensors) != len(self.outputs) or len(arguments) != len(self.outputs):
            raise BadOp(
                f"{self.name}.on(in_place={arguments}): expected as many tensor arguments, the same for all implementations, "
                f"as there are outputs ({len(self.outputs)})"
            )
        for letter, argument in zip("abcdefghijkl", arguments, strict=False):
            taken = re.sub(rf"\bTensor {argument}\b", f"Tensor({letter}!) {argument}", taken)
        self.in_place, name = arguments, f"{self.name}_"
        schema = taken.replace(self.name, name, 1) + " -> ()"
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, self.write, "CompositeExplicitAutograd")
        torch.library.register_fake(f"dsv4::{name}", lambda *args: None, lib=LIBRARY)

    def cost(self, fn: Callable[..., Cost]) -> Callable[..., Cost]:
        """Declare the cost: called with one sympy symbol for each parameter name of `fn`."""
        self.cost_of = fn
        return fn

    def sizes(self, fn: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
        """Declare where the cost's sizes are: `fn(a)` reads them off the arguments `a.<name>`, of which only metadata may be
        asked. Sizes that are arguments themselves (k, iters) are left out."""
        self.sizes_of = fn
        return fn

    def bound_sizes(self, arguments: dict[str, Any]) -> dict[str, Any] | None:
        """The sizes that the cost names, as these arguments have them; a symbolic one counts as the size it was traced with.
        None where cost or sizes are not declared."""
        if self.cost_of is None or self.sizes_of is None:
            return None
        found = arguments | self.sizes_of(SimpleNamespace(**arguments))
        return {name: hinted(found[name]) for name in inspect.signature(self.cost_of).parameters}

    def symbolic_cost(self) -> Cost:
        """The cost as expressions of the sizes that its declaration names."""
        if self.cost_of is None:
            raise BadOp(f"{self.name} declares no cost: add @{self.name}.cost")
        return self.cost_of(*(sympy.Symbol(name, positive=None) for name in inspect.signature(self.cost_of).parameters))


def hinted(x: Any) -> Any:
    """A size as a number: a symbolic one as the number it was traced with. Adds no guard."""
    return x.node.hint if isinstance(x, torch.SymInt) else x


def _in_copies(write: Callable[..., None], places: list[int], *args: Any) -> Any:
    """What `write` makes of its arguments number `places`, which stay as they are."""
    given = list(args)
    for place in places:
        given[place] = args[place].clone(memory_format=torch.contiguous_format)
    write(*given)
    copies = tuple(given[place] for place in places)
    return copies if len(copies) > 1 else copies[0]


def _metadata(x: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return x.shape, x.dtype, x.device


def own(x: Tensor, inputs: tuple[Any, ...]) -> Tensor:
    """x contiguous and in storage of its own: an op never returns a view of its inputs."""
    x = compact(x)
    storages = {i.untyped_storage()._cdata for i in inputs if isinstance(i, Tensor)}
    return x.clone() if x.untyped_storage()._cdata in storages else x


def op(qualified: str, outputs: tuple[str, ...] = ("out",)) -> Callable[[Callable[..., Any]], Op]:
    """Declare `dsv4::<name>` by its meaning; parameters are annotated Tensor, Tensor | None, int, float or bool."""
    namespace, _, name = qualified.partition("::")
    if namespace != "dsv4" or not name.isidentifier():
        raise BadOp(f"op {qualified!r}: the name must read dsv4::<name>")

    def declare(meaning: Callable[..., Any]) -> Op:
        hints = get_type_hints(meaning)
        returns = hints.pop("return", None)
        count = len(get_args(returns)) or 1
        if count != len(outputs):
            raise BadOp(f"{qualified}: returns {returns}, but names the outputs {outputs}")
        parameters = inspect.signature(meaning).parameters
        wrong = [p for p in parameters if hints.get(p) not in TYPES]
        if wrong:
            raise BadOp(f"{qualified}: parameter {wrong[0]!r} must be Tensor, Tensor | None, int, float or bool")
        text = ", ".join(f"{TYPES[hints[p]]} {p}" for p in parameters)
        schema = f"{name}({text}) -> ({', '.join(['Tensor'] * count)})"
        new = Op(name, meaning, outputs, schema)
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, new.run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"dsv4::{name}", new.fake, lib=LIBRARY)
        return new

    return declare
