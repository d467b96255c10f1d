"""Which kernels a model will launch, found without a GPU and without its weights; and building them side by side.

The model is traced on meta tensors. Every op is asked who claims it as if its tensors were on the GPU, and who does runs on
fake tensors, with launches listed instead of made.
"""

import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from .config import Config
from .op import Implementation, Op
from .passes import PassManager

if TYPE_CHECKING:
    from .reference_model import DSV4Config


@dataclass(frozen=True)
class Wanted:
    """A kernel of a module in kernels/, specialised; small enough to send to another process."""

    module: str
    kernel: str
    shape: Any
    config: Any

    def __str__(self) -> str:
        return f"{self.kernel} {self.shape} {self.config}"


@dataclass
class Survey:
    """What a model needs: kernels, and why some that it may need are not known, by op. candidates: all configurations that
    tuning would try are wanted too."""

    candidates: bool = False
    wanted: dict[Wanted, None] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)


class Asking(PassManager):
    """Claims ops as on the GPU, and notes what would be launched."""

    def __init__(self, config: Config, rules: Any, ops: Any, survey: Survey):
        super().__init__(config, rules, ops)
        self.survey = survey

    def claim(self, op: Op, arguments: dict[str, Any]) -> tuple[Implementation | None, list[str]]:
        from .kernel import collecting, trying

        with unset_fake_temporarily(), FakeTensorMode():
            moved = {name: on_gpu(a) for name, a in arguments.items()}
            implementation, reasons = super().claim(op, moved)
            if implementation is not None and implementation.device == "cuda":
                with collecting() as launches, trying() as trial:
                    try:
                        implementation.run(*moved.values())
                    except Exception as error:
                        self.survey.unknown[op.name] = f"{type(error).__name__}: {error}"
                tried = [(k, shape, c) for k, shape, work in trial.seen for c in k.candidates(shape, work)]
                for kernel, shape, config in launches + (tried if self.survey.candidates else []):
                    name = f"dsv4_compile.kernels.{Path(kernel.file).stem}"
                    for variant in variants(shape):
                        self.survey.wanted[Wanted(name, kernel.name, variant, config)] = None
        return implementation, reasons


def variants(shape: Any) -> list[Any]:
    """The shape, and what becomes of it in a captured graph, where kernels may know that nobody writes their weights."""
    return [shape, replace(shape, settled=True)] if getattr(shape, "settled", True) is False else [shape]


def on_gpu(x: Any) -> Any:
    """The like of a tensor in fake memory of a GPU; sizes that are not known count as the ones they were traced with."""
    from .op import hinted

    if not isinstance(x, Tensor):
        return hinted(x)
    size, stride = [hinted(s) for s in x.shape], [hinted(s) for s in x.stride()]
    return torch.empty_strided(size, stride, dtype=x.dtype, device="cuda")


@contextmanager
def compiling_for(arch: str) -> Iterator[None]:
    """DSV4_ARCH is this."""
    before = os.environ.get("DSV4_ARCH")
    os.environ["DSV4_ARCH"] = arch
    try:
        yield
    finally:
        if before is None:
            del os.environ["DSV4_ARCH"]
        else:
            os.environ["DSV4_ARCH"] = before


def survey(
    config: "DSV4Config",
    arch: str,
    batch: int,
    tokens: Iterable[int],
    max_len: int,
    dtype: torch.dtype,
    candidates: bool = False,
    invariant: bool = False,
    index_dtype: torch.dtype | None = None,
) -> Survey:
    """The kernels of calls of so many tokens each by a model of this config, computing in `dtype`; 1: a whole step of
    decoding, the choice of the next token included. invariant: as with batch_invariant, which then stays for the process.
    index_dtype: as `new_state` takes it."""
    from .lowerings import OPS
    from .patterns import RULES
    from .reference_model import DSV4, Loop, decode_step

    found = Survey(candidates)
    with torch.device("meta"):
        model = DSV4(one_of_each(config, 2)).to("meta", dtype).eval().requires_grad_(False)  # some is made on the CPU
    with compiling_for(arch), torch.no_grad():
        for count in tokens:
            torch._dynamo.reset()
            manager = Asking(Config(inner="eager", batch_invariant=invariant), RULES, OPS, found)
            how: dict[str, Any] = dict(backend=partial(look, manager), dynamic=False, fullgraph=True)
            state = model.new_state(batch, max_len, index_dtype=index_dtype)
            if count == 1:
                torch.compile(decode_step, **how)(model, Loop.start(state, 0))
            else:
                torch.compile(model, **how)(torch.zeros(batch, count, dtype=torch.int64, device="meta"), state)
    torch._dynamo.reset()
    return found


def one_of_each(config: "DSV4Config", times: int = 1) -> "DSV4Config":
    """The config of a model with one layer of each kind, in their order: layers of a kind launch the same kernels. times: or
    so many in a row."""
    found = dict.fromkeys(zip(config.layer_types, config.mlp_layer_types, strict=True))
    kinds = [kind for kind in found for _ in range(times)]
    layers, experts = zip(*kinds, strict=True)
    return config.replace(num_hidden_layers=len(kinds), layer_types=layers, mlp_layer_types=experts)


def look(manager: PassManager, gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """A backend that shows the graph to the passes, and runs it as it was. They see the body of each kind of layer, as
    layers share it that there are several of; and the whole, where rewrites reach from one layer to the next."""
    from .backend import compile_graph
    from .bodies import taken_apart
    from .graphs.instances import inline_regions

    apart = taken_apart(gm, inputs, calls=1)
    for piece in apart.pieces.values() if apart else ():
        compile_graph(piece.gm, piece.inputs, manager, eager=True)
    inline_regions(gm)
    compile_graph(gm, inputs, manager, eager=True)
    return gm.forward


def build_all(
    wanted: Iterable[Wanted], arch: str, jobs: int, done: Callable[[Wanted, bool, Exception | None], None]
) -> None:
    """Build what the cache does not hold, in `jobs` processes; done(kernel, whether it was built now, or why it was not)."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        tasks = {pool.submit(build_one, one, arch): one for one in wanted}
        for task in as_completed(tasks):
            error = task.exception()
            if error is not None and not isinstance(error, Exception):
                raise error
            done(tasks[task], error is None and task.result(), error)


def build_one(wanted: Wanted, arch: str) -> bool:
    """Whether it had to be built. Runs in a process of its own."""
    from .kernel import STORE, Kernel

    kernels = vars(importlib.import_module(wanted.module)).values()
    kernel = next(k for k in kernels if isinstance(k, Kernel) and k.name == wanted.kernel)
    key = kernel.key(wanted.shape, wanted.config, arch)
    return STORE.load_or_build(key, lambda: kernel.build(wanted.shape, wanted.config, arch))[1]
