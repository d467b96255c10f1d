"""Layers of one kind are compiled once: Dynamo traces one of them, and one body is rewritten for all."""

import inspect
from functools import partial

import pytest
import torch
from torch._dynamo.utils import compilation_time_metrics

from dsv4_compile.backend import backend
from dsv4_compile.reference_model import DSV4, DSV4Config

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
