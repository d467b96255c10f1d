"""How models are used: any context, length, batch and thread; variants of the model keep what is known of them."""

import os
import threading
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

import dsv4_compile
from dsv4_compile.backend import backend
from dsv4_compile.reference_model import DSV4, DSV4Config
from dsv4_compile.reference_model.model import Attention, Experts
from dsv4_compile.reference_model.schedule import CSA, HCA, SWA

on_demand = pytest.mark.skipif(os.environ.get("DSV4_TEST_ROBUST") != "all", reason="set DSV4_TEST_ROBUST=all")


def small(kind=CSA, **change) -> DSV4:
    """One layer of tiny."""
    torch.manual_seed(0)
    fields = dict(num_hidden_layers=1, layer_types=(kind,), mlp_layer_types=("moe",), hc_sinkhorn_iters=2)
    return DSV4(DSV4Config.tiny().replace(**fields, num_nextn_predict_layers=0, **change)).eval().requires_grad_(False)


def tokens_for(length: int, batch: int = 1) -> torch.Tensor:
    return torch.arange(batch * length).view(batch, length) % 331


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def compiled(model, reports=None, **how):
    observe = None if reports is None else reports.append
    return torch.compile(model, backend=partial(backend, options={"inner": "eager"}, observe=observe), **how)


def found_all(report) -> bool:
    return bool(report.sites) and not report.missing


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("context", [torch.inference_mode, torch.enable_grad])
def test_the_model_is_right_in_every_context(context):
    model, reports = small(SWA), []
    run = compiled(model, reports, fullgraph=True)
    with context():
        state, other = model.new_state(2, 32), model.new_state(2, 32)
        for tokens in (tokens_for(9, 2), tokens_for(9, 2)):
            close(run(tokens, state), model(tokens, other))
    assert found_all(reports[0]) and len(reports) == 1


@pytest.mark.parametrize("marked", [False, pytest.param(True, marks=on_demand)], ids=["all sizes", "marked"])
def test_forty_lengths_of_prefill_need_at_most_three_graphs(marked):
    model, reports = small(), []
    run = compiled(model, reports, fullgraph=True, dynamic=None if marked else True)
    for length in range(13, 53):
        tokens, state = tokens_for(length), model.new_state(1, 64)
        if marked:
            torch._dynamo.mark_dynamic(tokens, 1)
        got = run(tokens, state)
        if length % 13 == 0:
            close(got, model(tokens_for(length)))
    assert len(reports) <= 3 and found_all(reports[0])


class Norm(nn.Module):
    """A formula with a number of the module in it."""

    def __init__(self):
        super().__init__()
        self.eps = 1e-6

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def test_numbers_of_modules_stay_numbers_under_dynamic_true():
    model, reports = Norm(), []
    run = compiled(model, reports, dynamic=True)
    for width in (7, 9):
        x = torch.randn(4, width)
        close(run(x), model(x))
    (report,) = reports
    assert report.rules["raise.unit_norm"] == 1 and "specialize_float" not in str(report)
    model.eps = 0.5  # guarded
    close(run(x), model(x))
    assert len(reports) == 2


def test_a_callers_number_is_an_input_under_dynamic_true_and_the_report_says_so():
    def scaled(x, eps):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

    reports, x = [], torch.randn(4, 7)
    run = compiled(scaled, reports, dynamic=True)
    for eps in (1e-6, 0.5, 2.0):
        close(run(x, eps), scaled(x, eps))
    assert len(reports) == 1 and reports[0].rules["raise.unit_norm"] == 0 and "specialize_float" in str(reports[0])


def test_each_batch_has_its_graph_and_keeps_it():
    model, reports = small(SWA), []
    run = compiled(model, reports, dynamic=False, fullgraph=True)
    for _ in range(2):
        for batch in (1, 2, 4):
            state = model.new_state(batch, 16)
            close(run(tokens_for(1, batch), state), model(tokens_for(1, batch)))
    assert len(reports) == 3


def test_500_decode_steps_are_one_graph():
    model = small()
    run = compiled(model, dynamic=False, fullgraph=True)
    state, tokens = model.new_state(1, 600), tokens_for(501)
    with torch.no_grad():
        want = model(tokens)  # all at once
        run(tokens[:, :1], state)
        before = graphs()
        with torch._dynamo.config.patch(error_on_recompile=True):
            for step in range(1, 501):
                close(run(tokens[:, step : step + 1], state), want[:, step : step + 1])
    assert graphs() == before and int(state.position) == 501


def test_a_graph_break_around_the_model_breaks_nothing():
    model, reports = small(SWA), []

    def user(tokens):
        logits = model(tokens)
        torch._dynamo.graph_break()
        return torch.softmax(logits[:, -1], -1).argmax(-1)

    run = compiled(user, reports)
    assert torch.equal(run(tokens_for(7)), user(tokens_for(7)))
    assert len(reports) == 2 and found_all(reports[0]) and reports[1].rules["raise.softmax"] == 1


def test_threads_that_compile_at_once():
    models, results, errors = [small(kind) for kind in (SWA, HCA)], {}, []

    def work(i):
        try:
            with torch.no_grad():
                results[i] = compiled(models[i], fullgraph=True)(tokens_for(9))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors
    for i, model in enumerate(models):
        close(results[i], model(tokens_for(9)))


# -- variants: what is known is fused, what is not is left and told


def explained(model):
    """The report of a compile, whose result is right."""
    reports = []
    close(compiled(model, reports)(tokens_for(9)), model(tokens_for(9)))
    return reports[0]


def test_other_windows_and_choices_are_no_variant():
    report = explained(small(sliding_window=5, index_topk=2, num_experts_per_tok=2))
    assert found_all(report) and not report.misses


class Normed(Attention):
    """A norm more: over the heads' outputs, before they are turned back."""

    def forward(self, x, step, state, pick):
        y, picked = super().forward(x, step, state, pick)
        return F.rms_norm(y, y.shape[-1:]), picked


class Gelu(Experts):
    """Experts with another activation."""

    def gathered(self, x, expert, gate):
        return self.grouped(x, expert, gate)

    def grouped(self, x, expert, gate):
        w1, w2, w3 = (w.dense(x.dtype)[expert] for w in (self.w1, self.w2, self.w3))  # [N, k, I, D]
        h = F.gelu(torch.einsum("nd,nkid->nki", x, w1)) * torch.einsum("nd,nkid->nki", x, w3)
        return (torch.einsum("nki,nkdi->nkd", h, w2) * gate.unsqueeze(-1)).sum(1)


def varied(place: str, kind: type[nn.Module]) -> DSV4:
    model = small(SWA)
    module = model.layers[0].get_submodule(place)
    module.__class__ = kind
    return model


def test_a_norm_more_is_found_and_costs_nothing_else():
    report = explained(varied("attn", Normed))
    assert found_all(report)
    assert report.rules["raise.unit_norm"] == 2  # the queries' own, and this


def test_another_activation_leaves_the_experts_alone_and_is_told():
    model = varied("ffn.experts", Gelu)
    report = explained(model)
    assert report.counts["moe"] == 0 and report.counts["attention"] == report.counts["router"] == 1
    assert not report.missing  # a class of the user's own owes nothing
    torch._dynamo.reset()
    report = dsv4_compile.explain(model, tokens_for(9))  # which knows the whole model by its configuration
    assert report.missing == {"moe": (0, 1)}
    assert any("fuse.moe" in str(m) for m in report.misses) or "fuse.moe: 1 of 1 places not found" in str(report)
