"""The clamped SwiGLU: the op against the formula, and which spellings raise to it."""

import math

import pytest
import torch
import torch.nn.functional as F

from dsv4_compile.lowerings.pointwise import swiglu
from dsv4_compile.patterns import pointwise
from dsv4_compile.reference_model.model import swiglu as of_the_model

RULES = (pointwise.decomposed, pointwise.gated, pointwise.clamped)
LIMIT = 0.7


def formula(g: float, u: float, limit: float) -> float:
    g, u = min(g, limit), max(-limit, min(u, limit))
    return g / (1 + math.exp(-g)) * u


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 0)], ids=str)
def test_says_what_the_formula_says(shape):
    g, u = torch.randn(2, *shape, dtype=torch.float64) * 3
    want = [formula(a, b, LIMIT) for a, b in zip(g.flatten().tolist(), u.flatten().tolist(), strict=True)]
    torch.testing.assert_close(swiglu(g, u, LIMIT), torch.tensor(want, dtype=torch.float64).view(shape))
    torch.library.opcheck(swiglu.target, (g, u, LIMIT))


def test_bf16_is_rounded_once():
    g, u = torch.randn(99).bfloat16(), torch.randn(99).bfloat16()
    assert torch.equal(swiglu(g, u, LIMIT), swiglu(g.double(), u.double(), LIMIT).bfloat16())


def hugging_face(g, u, limit):
    return F.silu(g.clamp(max=limit)) * u.clamp(min=-limit, max=limit)


def turned_around(g, u, limit):
    g = torch.clamp_max(g, limit)
    return torch.clamp_max(torch.clamp_min(u, -limit), limit) * (torch.sigmoid(g) * g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("f", [of_the_model, hugging_face, turned_around])
def test_spellings_raise(rewritten_by, f, dtype):
    g, u = torch.randn(4, 3, 5).to(dtype) * 3, torch.randn(4, 3, 5).to(dtype) * 3
    got, report = rewritten_by(RULES, lambda g, u: f(g, u, LIMIT).to(dtype), g, u)
    assert report.rules["raise.swiglu"] == 1
    torch.testing.assert_close(got, f(g, u, LIMIT).to(dtype))


PLANTED = {  # one thing wrong, and what the report says of it
    "gate not clamped": (lambda g, u: F.silu(g) * u.clamp(-LIMIT, LIMIT), "clamp_max"),
    "up not clamped": (lambda g, u: F.silu(g.clamp(max=LIMIT)) * u, "clamp_max"),
    "another limit for up": (lambda g, u: F.silu(g.clamp(max=LIMIT)) * u.clamp(-LIMIT, 1), "limit"),
    "limit with the wrong sign": (lambda g, u: F.silu(g.clamp(max=LIMIT)) * u.clamp(LIMIT, LIMIT), "limit"),
    "another activation": (lambda g, u: F.gelu(g.clamp(max=LIMIT)) * u.clamp(-LIMIT, LIMIT), ""),
}


@pytest.mark.parametrize("name", PLANTED)
def test_differences_do_not_raise(rewritten_by, monkeypatch, name):
    monkeypatch.setattr(
        "dsv4_compile.reporting.report.NEAR", 0.0
    )  # tell of every miss, also of a mismatch near the anchor
    f, reason = PLANTED[name]
    g, u = torch.randn(3, 5) * 3, torch.randn(3, 5) * 3
    got, report = rewritten_by(RULES, f, g, u)
    torch.testing.assert_close(got, f(g, u))
    assert report.rules["raise.swiglu"] == 0
    assert not reason or any("raise.swiglu" in m.rule and reason in str(m) for m in report.misses)
