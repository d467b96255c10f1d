"""RMSNorm and RoPE as one op, in the models' spellings, and attention turned back."""

from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_compile.lowerings.rope import norm_rope
from dsv4_compile.reference_model.layers import rms_norm, rope

EPS = 1e-3  # large enough to be missed
modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")


def drawn(*lead, d=10, dr=6, table=None, dtype=torch.float32, seed=0):
    """x [*lead, d], weight [d], tables [*table, dr/2]."""
    g = torch.Generator().manual_seed(seed)
    angle = 3 * torch.randn(*(lead if table is None else table), dr // 2, generator=g)
    x = 10 ** (3 * torch.rand(*lead, 1, generator=g) - 3) * torch.randn(*lead, d, generator=g)
    return x.to(dtype), 1 + torch.randn(d, generator=g) / 5, angle.cos(), angle.sin()


def formula(x, weight, cos, sin):
    """fp64, pairs as complex numbers."""
    y, d, half = x.double(), x.shape[-1], cos.shape[-1]
    y = y / (y.pow(2).sum(-1, keepdim=True) / d + EPS).sqrt() * (1.0 if weight is None else weight.double())
    pairs = torch.view_as_complex(y[..., d - 2 * half :].reshape(*x.shape[:-1], half, 2).clone())
    turned = torch.view_as_real(pairs * torch.complex(cos.double(), sin.double())).flatten(-2)
    return torch.cat([y[..., : d - 2 * half], turned], -1)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=3),
    st.integers(1, 4),
    st.integers(0, 5),
    st.booleans(),
    st.integers(0, 99),
)
def test_the_op_says_what_the_formula_says(lead, pairs, rest, weighted, seed):
    x, weight, cos, sin = drawn(*lead, d=2 * pairs + rest, dr=2 * pairs, seed=seed)
    weight = weight if weighted else None
    got = norm_rope(x, weight, EPS, cos, sin)
    torch.testing.assert_close(got.double(), formula(x, weight, cos, sin), rtol=1e-5, atol=1e-5)


def test_bf16_keeps_its_dtype():
    x, weight, cos, sin = drawn(5, 7, d=33, dr=8, dtype=torch.bfloat16)
    got = norm_rope(x, weight, EPS, cos, sin)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), formula(x, weight, cos, sin), rtol=2**-7, atol=2**-7)


def test_opcheck():
    x, weight, cos, sin = drawn(2, 5, 3, table=(2, 5, 1))
    torch.library.opcheck(norm_rope.target, (x, weight, EPS, cos, sin))
    torch.library.opcheck(norm_rope.target, (x.transpose(0, 1), None, EPS, cos.transpose(0, 1), sin.transpose(0, 1)))


# Patterns: x [B, T, h, d] or [B, T, d]


def queries(x, weight, cos, sin):
    return rope(rms_norm(x, None, EPS), cos.unsqueeze(2), sin.unsqueeze(2))


def keys(x, weight, cos, sin):
    return rope(rms_norm(x, weight, EPS), cos, sin)


def keys_of_a_product(x, weight, cos, sin):
    return keys(x @ torch.ones(x.shape[-1], x.shape[-1]).to(x.dtype), weight, cos, sin)


def hf_queries(x, weight, cos, sin):
    q = x.transpose(1, 2)
    q = q * torch.rsqrt(q.float().square().mean(-1, keepdim=True) + EPS).to(q.dtype)
    return modeling.apply_rotary_pos_emb(q, cos, sin).transpose(1, 2)


def hf_keys(x, weight, cos, sin):
    y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)
    kv = (weight * y.to(x.dtype)).to(x.dtype)
    return modeling.apply_rotary_pos_emb(kv.unsqueeze(2).transpose(1, 2), cos, sin)


OF_HEADS = (queries, hf_queries)
CASES = [
    (f, B, T) for f in (queries, keys, keys_of_a_product, hf_queries, hf_keys) for B, T in ((2, 5), (2, 1), (1, 1))
]


@pytest.mark.parametrize(("f", "B", "T"), CASES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_the_spellings(f, B, T, rewritten):
    args = drawn(B, T, *([3] if f in OF_HEADS else []), table=(B, T))
    result, report = rewritten(f, *args)
    assert report.counts["prologue"] == 1 and "norm_rope" in {op for op, _ in report.runs}
    torch.testing.assert_close(result, f(*args), rtol=1e-4, atol=1e-4)


def test_one_table_for_a_batch_in_hugging_faces_spelling(rewritten):
    for f in (hf_queries, hf_keys):
        torch._dynamo.reset()
        args = drawn(2, 5, *([3] if f in OF_HEADS else []), table=(1, 5))
        result, report = rewritten(f, *args)
        assert report.counts["prologue"] == 1
        torch.testing.assert_close(result, f(*args), rtol=1e-4, atol=1e-4)


def test_a_norm_that_others_read_stays(rewritten):
    def f(x, weight, cos, sin):
        y = rms_norm(x, weight, EPS)
        return rope(y, cos, sin), y

    args = drawn(2, 5)
    result, report = rewritten(f, *args)
    assert report.counts["prologue"] == 0 and report.rules["raise.rope"] == 1
    for got, want in zip(result, f(*args), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.skipif(find_spec("cutlass") is None, reason="GPU kernels need CuTeDSL")
@pytest.mark.parametrize("index_keys", ["bf16", "fp8"])
def test_all_of_a_decode_step_compiles_without_a_gpu_and_does_not_spill(index_keys):
    from dsv4_compile.kernels.prologue import KERNEL, OfCompressor, OfNorm, Shape, configs

    queries, keys = OfNorm(128, "bf16", "none", 64), OfNorm(128, "bf16", "fp32", 64, "bf16")
    each = OfCompressor(512, 8, 64, True, "fp32", "bf16"), OfCompressor(128, 8, 64, True, "fp32", index_keys)
    shape = Shape(queries, keys, each)
    _, facts = KERNEL.build(shape, next(configs(shape)), "sm_90a")
    assert facts["kernels"] and all(k["stack"] == 0 for k in facts["kernels"].values()), facts
    between = OfCompressor(
        256, 8, 64, True, "fp32", "bf16"
    )  # two warps in blocks of four: its barriers would not be met
    assert not list(configs(Shape(queries, keys, (between,))))
