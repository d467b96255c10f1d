"""The end of the model and the beginning of MTP: the ops against the model's modules in fp64, and what raises to them."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dsv4_compile.lowerings.head import head, mtp_join
from dsv4_compile.lowerings.mhc import mhc_head
from dsv4_compile.lowerings.norm import rms_norm
from dsv4_compile.reference_model import DSV4Config
from dsv4_compile.reference_model.layers import RMSNorm, acc
from dsv4_compile.reference_model.model import MTP, HyperHead

V, EPS = 23, 3e-2
CONFIG = replace(DSV4Config.tiny(), hc_eps=1e-3, rms_norm_eps=1e-2, num_nextn_predict_layers=1)


class Last(nn.Module):
    """As in the reference model (`exact`) and as in Hugging Face's."""

    def __init__(self, n, D, exact=True):
        super().__init__()
        torch.manual_seed(0)
        self.collapse, self.norm = HyperHead(replace(CONFIG, hc_mult=n, hidden_size=D)), RMSNorm(D, EPS)
        self.vocabulary = nn.Parameter(torch.randn(V, D) * D**-0.5)
        for p in (self.collapse.base, self.collapse.scale, self.norm.weight):
            nn.init.normal_(p, 1.0, 0.5)
        self.exact = exact
        self.requires_grad_(False)

    def forward(self, X, last=None):
        h = self.norm(self.collapse(X))
        h = h if last is None else h[:, -last:]
        return F.linear(acc(h), acc(self.vocabulary)) if self.exact else F.linear(h, self.vocabulary)

    def arguments(self, X):
        c = self.collapse
        tensors = X, c.fn.data, c.base.data, c.scale.data, self.norm.weight.data, self.vocabulary.data
        return *tensors, c.eps, c.rms_eps, EPS, self.exact


SHAPES = [((1,), 4, 16), ((2, 3), 3, 7), ((33,), 1, 5), ((1, 1), 2, 1), ((0,), 4, 6)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_head_says_what_the_modules_say(shape):
    lead, n, D = shape
    last, X = Last(n, D).double(), torch.randn(*lead, n, D).double()
    for run in (head, head.meaning):
        got = run(*last.arguments(X))
        torch.testing.assert_close(got, last(X), rtol=1e-11, atol=1e-12)
        assert got.is_contiguous() and got.shape == (*lead, V)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 9))
def test_single_precision_on_odd_shapes(N, n, D):
    last, X = Last(n, D), torch.randn(N, n, D)
    torch.testing.assert_close(head(*last.arguments(X)).double(), last.double()(X.double()), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("exact", [True, False])
def test_logits_are_exact_or_of_the_dtype_of_the_streams(exact):
    last, X = Last(4, 64, exact).bfloat16(), torch.randn(9, 4, 64).bfloat16()
    got = head(*last.arguments(X))
    assert got.dtype == (torch.float32 if exact else torch.bfloat16)
    X, fn, base, scale, weight, vocabulary, *_ = last.arguments(X)
    h = rms_norm(
        mhc_head(X, fn, base, scale, CONFIG.hc_eps, CONFIG.rms_norm_eps), weight, EPS
    )  # rounded twice, as there
    want = F.linear(h.double(), vocabulary.double())
    torch.testing.assert_close(got.double(), want, rtol=1e-5 if exact else 2**-7, atol=1e-5 if exact else 1e-2)


def joined(config, dtype):
    torch.manual_seed(0)
    mtp = MTP(config)
    for norm in (mtp.enorm, mtp.hnorm):
        nn.init.normal_(norm.weight, 1.0, 0.5)
    return mtp.to(dtype).requires_grad_(False)


def drawn(dtype, B=2, T=3):
    D, n = CONFIG.hidden_size, CONFIG.hc_mult
    return torch.randn(B, T, D).to(dtype), torch.randn(B, T, n, D).to(dtype)


def arguments(m, e, X):
    scales = m.e_proj.scale, m.h_proj.scale
    weights = m.enorm.weight, m.hnorm.weight, m.e_proj.weight, m.h_proj.weight
    return e, X, *weights, *scales, m.enorm.eps, m.hnorm.eps


@pytest.mark.parametrize("format", ["none", "fp8"])
def test_the_join_says_what_the_module_says(format):
    m, (e, X) = joined(replace(CONFIG, linear_format=format), torch.float64), drawn(torch.float64)
    for run in (mtp_join, mtp_join.meaning):
        torch.testing.assert_close(run(*arguments(m, e, X)), m.join(e, X), rtol=1e-11, atol=1e-11)


def test_opcheck():
    torch.library.opcheck(head.target, Last(3, 6).arguments(torch.randn(2, 3, 6)))
    m, given = joined(CONFIG, torch.bfloat16), drawn(torch.bfloat16)
    torch.library.opcheck(mtp_join.target, arguments(m, *given))


def test_costs_are_those_of_the_products():
    cost = head.symbolic_cost().at(N=1, n=4, D=4096, V=129280, bits=16)
    products = 2 * 4096 * 129280
    assert (
        products < cost.flops < 1.01 * products and products < cost.read < 1.01 * products and cost.write == 4 * 129280
    )
    cost = mtp_join.symbolic_cost().at(N=4096, M=3, n=4, K=4096, bits=8, block=128**2)
    assert 2 * 15 * 4096**2 < cost.flops < 1.1 * 2 * 15 * 4096**2 and 2 * 4096**2 < cost.read < 2.1 * 4096**2


# -- raising


@pytest.mark.parametrize("exact", [True, False], ids=["ours", "Hugging Face's"])
@pytest.mark.parametrize(
    ("dtype", "T", "last"), [(torch.bfloat16, 1, None), (torch.float32, 5, 1), (torch.bfloat16, 5, 3)]
)
def test_both_heads_raise(rewritten, exact, dtype, T, last):
    model, X = Last(4, 16, exact).to(dtype), torch.randn(2, T, 4, 16).to(dtype)
    result, report = rewritten(model, X, last)
    assert report.counts["head"] == 1 and {"head", "mhc_head", "rms_norm"} <= {name for name, _ in report.runs}
    want = model(X, last)
    assert result.dtype == want.dtype
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(result, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("format", ["none", "fp8"])
@pytest.mark.parametrize(("dtype", "T"), [(torch.bfloat16, 1), (torch.float32, 3)], ids=str)
def test_the_join_raises(rewritten, format, dtype, T):
    m, (e, X) = joined(replace(CONFIG, linear_format=format), dtype), drawn(dtype, T=T)
    result, report = rewritten(m.join, e, X)
    assert report.counts["mtp"] == 1 and report.runs["linear", "cpu"] == 2
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(result, m.join(e, X), rtol=tolerance, atol=tolerance)


def test_what_is_neither_stays(rewritten):
    model, X = Last(4, 16), torch.randn(2, 3, 4, 16)
    m, (e, Y) = joined(CONFIG, torch.float32), drawn(torch.float32)

    def others(X, e, Y):
        h = model.norm(model.collapse(X))
        joins = (
            m.e_proj(m.enorm(e)).unsqueeze(2) - m.h_proj(m.hnorm(Y)),
            m.e_proj(e).unsqueeze(2) + m.h_proj(m.hnorm(Y)),
        )
        return F.linear(h, model.vocabulary), h.exp(), *joins

    result, report = rewritten(others, X, e, Y, strict=False)  # MTP's modules are there
    assert report.counts["head"] == report.counts["mtp"] == 0
    assert any("is also read by exp" in x.found for x in report.graphs[0].misses if x.rule == "fuse.head/whole")
    for got, want in zip(result, others(X, e, Y), strict=True):
        torch.testing.assert_close(got, want)
