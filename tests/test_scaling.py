"""Layers of one kind are compiled once: Dynamo traces one of them, and one body is rewritten for all."""

import inspect
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.utils import compilation_time_metrics

from dsv4_compile.backend import backend
from dsv4_compile.reference_model import DSV4, DSV4Config
from dsv4_compile.reference_model.layers import Linear
from dsv4_compile.reference_model.repeated import Repeated, region

SWA, HCA = "sliding_attention", "heavily_compressed_attention"
REUSES = "reuse_hash_fn" in inspect.signature(torch.compiler.nested_compile_region).parameters  # torch 2.13 on


def deep(kinds) -> DSV4:
    torch.manual_seed(0)
    config = DSV4Config.tiny().replace(
        num_hidden_layers=len(kinds),
        layer_types=kinds,
        mlp_layer_types=("moe",) * len(kinds),
        hc_sinkhorn_iters=1,
        num_nextn_predict_layers=0,
    )
    return DSV4(config).eval().requires_grad_(False)


@pytest.mark.parametrize("remembers", [True, False], ids=["decode", "sequence"])
def test_a_kind_of_layer_is_traced_and_rewritten_once(remembers):
    model, reports = deep((SWA, HCA) * 3), []
    compiled = torch.compile(
        model,
        backend=partial(backend, options={"inner": "eager"}, observe=reports.append),
        fullgraph=True,
        dynamic=False,
    )
    compilation_time_metrics.clear()
    state = model.new_state(1, 16) if remembers else None
    tokens = torch.arange(1 if remembers else 5).unsqueeze(0)
    torch.testing.assert_close(compiled(tokens, state), model(tokens), rtol=1e-4, atol=1e-4)
    (report,) = reports
    assert not report.missing and sorted(g.calls for g in report.graphs) == [1, 1, 3, 3]  # before, after, the bodies
    if REUSES:
        assert len(compilation_time_metrics["invoke_subgraph_trace"]) == 2
        assert len(compilation_time_metrics["invoke_subgraph_reuse_stamp_out"]) == 4


def test_dynamo_gets_through_layers_whose_sizes_are_symbols():
    """`State.fits` settles which of them are the model's own: a region must not find out. No more than Dynamo here."""
    model = deep((SWA,) * 2)

    def through(gm, inputs):
        raise RuntimeError("traced")

    compiled = torch.compile(model, backend=through, fullgraph=True, dynamic=True)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="traced"):
        compiled(torch.arange(2).unsqueeze(1), model.new_state(2, 16))


def hooked(layer):
    layer.ffn.gate.register_forward_hook(lambda module, args, out: (out[0], 3 * out[1]))


class Doubled(Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def of_another_class(layer):
    layer.ffn.shared_experts.w1.__class__ = Doubled


def with_its_own_forward(layer):
    layer.ffn.shared_experts.forward = torch.zeros_like


@pytest.mark.parametrize("change", [hooked, of_another_class, with_its_own_forward])
def test_a_layer_that_torch_would_take_for_its_neighbour_is_traced(change):
    """Torch 2.13 compares neither classes nor hooks: `Repeated.likeness` does."""
    model = deep((SWA,) * 3)
    change(model.layers[1])
    tokens = torch.arange(3).unsqueeze(0)
    got = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)(tokens)
    torch.testing.assert_close(got, model(tokens), rtol=1e-4, atol=1e-4)


def test_any_number_of_kinds_of_layer_is_traced():
    """By default torch 2.13 gives up behind the eighth."""
    layers = nn.ModuleList(Counted(i) for i in range(10))

    def run(x):
        for layer in layers:
            x = layer(x)
        return x

    x = torch.ones(3)
    torch.testing.assert_close(torch.compile(run, backend="eager", fullgraph=True)(x), run(x))


class Counted(Repeated):
    def __init__(self, number):
        super().__init__()
        self.number = number

    def forward(self, x):
        return self.region(self.likeness() + 0, x)

    @region
    def region(self, alike, x):
        return x + self.number
