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
from dsv4_compile.reference_model.repeated import Repeated, known_region, region
from dsv4_compile.reference_model.schedule import HCA, SWA

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


def test_layers_whose_memory_differs_are_told_apart():
    """Of three alike, one has room for more entries."""
    model = deep((HCA,) * 3)
    mine, theirs = (model.new_state(1, 16) for _ in "ab")
    for state in (mine, theirs):
        memory = state.layers[1].compressor
        memory.entries = torch.cat([memory.entries, memory.entries], 1)
    assert [a.likeness() for a in mine.layers] == [b.likeness() for b in theirs.layers]
    assert len({layer.likeness() for layer in mine.layers}) == 2
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    compilation_time_metrics.clear()
    for token in torch.arange(5).view(5, 1, 1):
        torch.testing.assert_close(compiled(token, mine), model(token, theirs), rtol=1e-4, atol=1e-4)
    if REUSES:
        assert len(compilation_time_metrics["invoke_subgraph_trace"]) == 2


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


def with_another_number(layer):
    layer.attn_norm.eps = 0.5


def with_another_dtype(layer):
    layer.attn_norm.weight.data = layer.attn_norm.weight.data.double()


def with_other_strides(layer):
    weight = layer.ffn.shared_experts.w1.weight
    weight.data = weight.data.t().contiguous().t()


def with_one_parameter_for_two(layer):
    layer.ffn.shared_experts.w1.weight = layer.ffn.shared_experts.w3.weight


def with_one_storage_for_two(layer):
    layer.ffn.shared_experts.w1.weight.data = layer.ffn.shared_experts.w3.weight.data


def with_a_gradient(layer):
    layer.attn_norm.weight.requires_grad_(True)


def with_a_buffer_more(layer):
    layer.attn_norm.register_buffer("more", torch.zeros(1))


CHANGES = [hooked, of_another_class, with_its_own_forward, with_another_number, with_another_dtype, with_other_strides]
CHANGES += [with_one_parameter_for_two, with_one_storage_for_two, with_a_gradient, with_a_buffer_more]


def test_layers_that_differ_in_anything_but_values_are_not_alike():
    model = deep((SWA,) * (1 + len(CHANGES)))
    assert len({layer.likeness() for layer in model.layers}) == 1
    for layer, change in zip(model.layers[1:], CHANGES, strict=True):
        before = layer.likeness()
        change(layer)
        assert layer.likeness() != before == model.layers[0].likeness(), change.__name__
    assert len({layer.likeness() for layer in model.layers}) == 1 + len(CHANGES)


def test_every_layer_that_is_unlike_its_neighbour_is_traced():
    """Torch 2.13 compares neither classes nor hooks, and nothing where `known_region` is told that layers are alike."""
    changes = [c for c in CHANGES if c is not with_one_storage_for_two]  # which no region may be given
    model = deep((SWA,) * (2 + len(changes)))
    for layer, change in zip(model.layers[1:-1], changes, strict=True):
        change(layer)
    compilation_time_metrics.clear()
    tokens = torch.arange(3).unsqueeze(0)
    with torch.no_grad():
        got = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)(tokens)
        torch.testing.assert_close(got, model(tokens), rtol=1e-4, atol=1e-4)
    if REUSES:
        assert len(compilation_time_metrics["invoke_subgraph_trace"]) == 1 + len(changes)
        assert len(compilation_time_metrics["invoke_subgraph_reuse_stamp_out"]) == 1


def test_a_layer_that_is_called_with_other_tensors_is_traced():
    model = deep((SWA,) * 2)

    def run(tokens):
        found = []
        for layer, count in zip(model.layers, (4, 3), strict=True):
            step = model.step(torch.zeros(1, dtype=torch.int64), count, None, None)
            X = model.embed(tokens[:, :count]).unsqueeze(2).repeat(1, 1, model.config.hc_mult, 1)
            found.append(layer(X, tokens[:, :count], step, None)[0])
        return found

    tokens = torch.arange(4).unsqueeze(0)
    for got, want in zip(torch.compile(run, backend="eager", fullgraph=True)(tokens), run(tokens), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


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
        return self.once((x,), None, 0, ())

    def work(self, alike, x, remembers):
        return x + self.number

    region, known = region(work), known_region(work)
