"""A model captured once, to be rewritten and run again and again: what costs time is tracing, not our passes.

The passes are a function of the graph that reaches them, so running them on copies of one captured graph gives what
compiling anew would, op by op (inner="eager"); code that Inductor generates is not part of it. Region bodies are written
out, so that layers are told apart.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import TracedAgain
from ..graphs.canonical import canonicalise
from ..graphs.copies import copied
from ..graphs.instances import inline_regions
from ..passes import PassManager
from ..reporting.explain import buffers_kept, fresh


class Slot(CustomGraphPass):
    """One captured graph, and the version of it that runs now."""

    def __init__(self) -> None:
        self.graph = self.now = fx.Graph()
        self.root: Any = None
        self.pieces: dict[str, fx.Graph] = {}  # meanings that went back into it, as traced
        self.inputs: list[Any] = []  # of the first run

    def uuid(self) -> None:
        return None

    def __call__(self, graph: fx.Graph) -> None:
        self.root, self.graph = graph.owning_module, copied(graph)
        canonicalise(self.graph)  # once: what the passes do first is most of their time when few rewrites are made
        self.now = self.graph

    def rewrite(self, manager: PassManager) -> None:
        """Let a copy of the graph, rewritten by `manager`, run from now on."""
        self.now, manager.pieces, manager.canonical = copied(self.graph), self.pieces, True
        with fake_mode(self.now):
            manager(self.now)

    def inner(self, gm: fx.GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
        """In Inductor's place."""
        from functorch.compile import make_boxed_func

        def run(*args: Any) -> Any:
            self.inputs = self.inputs or [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
            return fx.Interpreter(self.root, graph=self.now).run(*args)

        return make_boxed_func(run)


class Captured:
    """model(*args, **kwargs), without gradients. Arguments are copied and buffers restored, so that every run is the same."""

    def __init__(self, model: Any, args: Sequence[Any], kwargs: dict[str, Any]):
        self.model, self.args, self.kwargs = model, args, kwargs
        self.slots: list[Slot] = []
        self.plain: Any = None
        torch._dynamo.reset()
        self.compiled = torch.compile(fresh(model), backend=self.backend, dynamic=False)
        self.plain = self.call(self.compiled)

    def backend(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        if self.plain is not None:
            raise TracedAgain
        self.slots.append(slot := Slot())
        inline_regions(gm)
        patches = {"joint_custom_pre_pass": slot, "force_disable_caches": True}
        patches |= {"pattern_matcher": False, "joint_graph_constant_folding": False}  # what comes after is not used
        extra: dict[str, Any] = {"inner_compile": slot.inner, "config_patches": patches}
        compiled: Any = compile_fx(gm, inputs, **extra)
        return compiled

    def call(self, forward: Callable[..., Any]) -> Any:
        with torch.no_grad(), buffers_kept(self.model):
            return forward(*copy.deepcopy(self.args), **copy.deepcopy(self.kwargs))

    def eager(self) -> Any:
        """What the model itself returns."""
        return self.call(self.model)

    def rewritten(self, manager: PassManager) -> Any:
        """What the model returns with its graphs rewritten by `manager`."""
        for slot in self.slots:
            slot.rewrite(manager)
        return self.call(self.compiled)


def fake_mode(graph: fx.Graph) -> Any:
    """The mode that the graph's fake values belong to: ops that the passes trace make theirs in it too."""
    values = (n.meta.get("val") for n in graph.nodes)
    return next((v.fake_mode for v in values if isinstance(v, FakeTensor)), nullcontext())
