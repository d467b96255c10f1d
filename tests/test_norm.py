"""RMSNorm: the ops against the formula, the three spellings of dtypes that models use, and the kernel."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_compile.lowerings.norm import repeated, rms_norm, table, unit_norm

EPS = 1e-3  # large enough to be missed


def formula(x, weight=None):
    x = x.double()
    y = x / (x.pow(2).sum(-1, keepdim=True) / x.shape[-1] + EPS).sqrt()
    return y if weight is None else y * weight.double()


def drawn(*shape, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(*shape, generator=g)).to(dtype), torch.randn(shape[-1], generator=g)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=3), st.integers(1, 70), st.integers(0, 99))
def test_the_ops_say_what_the_formula_says(lead, D, seed):
    x, weight = drawn(*lead, D, seed=seed)
    for got, want in ((rms_norm(x, weight, EPS), formula(x, weight)), (unit_norm(x, EPS), formula(x))):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_bf16_is_rounded_once():
    x, weight = drawn(7, 33, dtype=torch.bfloat16)
    want = formula(x, weight).bfloat16()  # correctly rounded
    assert (rms_norm(x, weight, EPS) != want).sum() <= 1  # fp32 may fall on the other side of a tie


def test_opcheck():
    x, weight = drawn(2, 3, 10)
    torch.library.opcheck(rms_norm.target, (x, weight, EPS))
    torch.library.opcheck(unit_norm.target, (x.transpose(0, 1), EPS))


def plain(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def upcast(x, weight):
    return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS) * weight.float()).to(x.dtype)


@pytest.mark.parametrize(
    ("f", "dtype", "of_weight"),
    [
        (plain, torch.float32, torch.float32),
        (upcast, torch.bfloat16, torch.bfloat16),
        (upcast, torch.bfloat16, torch.float32),
    ],
    ids=["fp32", "bf16", "bf16 with an fp32 weight"],
)
def test_the_spellings_raise(f, dtype, of_weight, rewritten):
    x, weight = drawn(2, 5, 12, dtype=dtype)
    result, report = rewritten(f, x, weight.to(of_weight))
    assert report.rules["raise.rms_norm"] == 1
    torch.testing.assert_close(result, f(x, weight.to(of_weight)))


@pytest.mark.parametrize(
    "of_table", [(2, 3, 1), (1, 3, 1), (2, 1, 1), (2, 1, 4), (1, 1, 4), (1, 1, 1), (3, 1), (2, 3, 4), ()], ids=str
)
def test_every_row_finds_its_row_of_a_table(of_table):
    """As the kernel does: row r reads row (r / inner) mod P."""
    x, t = torch.zeros(2, 3, 4, 8), torch.randn(*of_table, 5)
    inner, flat = repeated(t.shape, x.shape), table(t, x)
    got = flat[torch.arange(24) // inner % len(flat)]
    assert torch.equal(got, t.expand(2, 3, 4, 5).reshape(24, 5))


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("of_weight", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("D", [4, 36, 512, 1536, 4096, 7168, 16384])
@pytest.mark.parametrize("lead", [(0,), (1,), (3, 5), (257,)], ids=str)
def test_the_kernel_is_the_meaning(lead, D, of_weight, dtype, kernel_parity):
    tolerance = dict(rtol=8e-3, atol=1e-5) if dtype == torch.bfloat16 else dict(rtol=1e-5, atol=1e-6)
    (x, weight), (other, _) = drawn(*lead, D, dtype=dtype), drawn(*lead, D, dtype=dtype, seed=1)
    weight = weight.to(of_weight)
    kernel_parity(rms_norm, x, weight, EPS, others=(other, weight, EPS), **tolerance)
    kernel_parity(unit_norm, x, EPS, others=(other, EPS), **tolerance)
