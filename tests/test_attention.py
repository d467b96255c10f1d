"""Attention: the op against the formula, the CPU implementation against the op, and all spellings of the model."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_compile.lowerings.attention import attention


def case(B=2, T=3, h=5, d=7, S=11, W=4, E=6, K=3, dtype=torch.float32, seed=0, none=0.3):
    """Random arguments; a share of both lists is -1, but never all of the window's."""
    g = torch.Generator().manual_seed(seed)
    q, keys = torch.randn(B, T, h, d, generator=g).to(dtype), torch.randn(B, S, d, generator=g).to(dtype)
    window = torch.randint(0, S, (B, T, W), generator=g)
    window[..., 1:][torch.rand(B, T, W - 1, generator=g) < none] = -1
    sink = torch.randn(h, generator=g, dtype=torch.promote_types(dtype, torch.float32))
    if not K:
        return q, keys, window, sink, None, None
    index = torch.randint(0, E, (B, T, K), generator=g)
    index[torch.rand(B, T, K, generator=g) < none] = -1
    return q, keys, window, sink, torch.randn(B, E, d, generator=g).to(dtype), index


def formula(q, keys, window, sink, entries, index, scale, sink_on_window):
    """Loops over queries and heads, fp64: o = sum e^s k / (sum e^s + e^sink)."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    B, T, h, _ = q.shape
    for b in range(B):
        for t in range(T):
            near = keys[b, window[b, t][window[b, t] >= 0]].double()
            far = near[:0] if index is None else entries[b, index[b, t][index[b, t] >= 0]].double()
            rows = torch.cat([near, far])
            for i in range(h):
                s = rows @ q[b, t, i].double() * scale
                if sink_on_window:
                    s[: len(near)] += sink[i].double()
                    weights = s.exp() / s.exp().sum()
                else:
                    weights = s.exp() / (s.exp().sum() + sink[i].double().exp())
                out[b, t, i] = weights @ rows
    return out


SHAPES = [
    dict(),
    dict(B=1, T=1, K=0),
    dict(T=1, h=1, W=1, S=1, K=1, E=1),
    dict(B=1, T=130, h=3, d=33, S=40, W=17, K=0),
    dict(K=0, none=0.9),
    dict(none=1.0),
]


@pytest.mark.parametrize("sink_on_window", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_meaning_and_cpu_say_what_the_formula_says(shape, sink_on_window):
    args = (*case(**shape, dtype=torch.float64), 0.3, sink_on_window)
    want = formula(*args)
    torch.testing.assert_close(attention.meaning(*args), want)
    torch.testing.assert_close(attention(*args), want)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(1, 6),
    st.integers(0, 5),
    st.booleans(),
    st.integers(0, 99),
)
def test_cpu_equals_the_meaning_on_odd_shapes(B, T, h, d, W, K, sink_on_window, seed):
    args = (*case(B, T, h, d, 8, W, 5, K, seed=seed), 0.5, sink_on_window)
    torch.testing.assert_close(attention(*args), attention.meaning(*args), rtol=1e-5, atol=1e-5)


def test_lists_may_be_empty():
    q, keys, window, sink, entries, index = case(dtype=torch.float64)
    for lists in (
        (window[..., :0], entries, index),
        (window[..., :0], entries, index[..., :0]),
        (window[..., :0], None, None),
    ):
        args = q, keys, lists[0], sink, *lists[1:], 0.5, False
        torch.testing.assert_close(attention(*args), formula(*args))


def test_bf16_keeps_its_dtype_and_accumulates_in_fp32():
    args = (*case(T=9, d=64, W=8, dtype=torch.bfloat16), 0.125, False)
    out = attention(*args)
    assert out.dtype == torch.bfloat16 and out.is_contiguous()
    torch.testing.assert_close(out.double(), formula(*args), rtol=2**-8, atol=2**-9)


@pytest.mark.parametrize("run", [attention, attention.meaning], ids=["cpu", "meaning"])
def test_rows_that_no_list_names_are_never_read(run):
    q, keys, window, sink, entries, index = case(none=0.5)
    want = run(q, keys, window, sink, entries, index, 1.0, False)
    for b in range(len(q)):  # row 0 stands in for "none": finite there, so poison everything else that is not named
        for x, lists in ((keys, window), (entries, index)):
            unnamed = [r for r in range(1, x.shape[1]) if r not in lists[b]]
            x[b, unnamed] = float("nan")
    torch.testing.assert_close(run(q, keys, window, sink, entries, index, 1.0, False), want)


def test_a_query_without_keys_gives_zero():
    q, keys, window, sink, _, _ = case(K=0)
    window[:] = -1
    assert attention(q, keys, window, sink, None, None, 1.0, False).abs().max() == 0


def test_a_large_sink_takes_everything_and_a_small_one_nothing():
    q, keys, window, sink, entries, index = case()
    big = attention(q, keys, window, sink + 1e4, entries, index, 1.0, False)
    assert big.abs().max() == 0
    small = attention(q, keys, window, sink - 1e4, entries, index, 1.0, False)
    torch.testing.assert_close(
        small.double(), formula(q, keys, window, sink - 1e4, entries, index, 1.0, False), rtol=1e-4, atol=1e-5
    )


def test_the_sink_example_of_one_query():
    """Compressed logits (1.2, -0.3, 0.7) with values (1, 2, 3), window logits (0.1, 2.0) with values (10, 20), sink 0.5."""
    values = {10.0: 0.1, 20.0: 2.0, 1.0: 1.2, 2.0: -0.3, 3.0: 0.7}
    rows = torch.tensor([[v, s, 0.0] for v, s in values.items()], dtype=torch.float64)
    q = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64).view(1, 1, 1, 3)  # reads the logit from channel 1
    sink = torch.tensor([0.5], dtype=torch.float64)
    window, index = torch.tensor([[[0, 1]]]), torch.tensor([[[0, 1, 2]]])
    args = q, rows[None, :2], window, sink, rows[None, 2:], index, 1.0
    assert abs(attention(*args, False)[0, 0, 0, 0].item() - 10.462428) < 1e-5
    assert abs(attention(*args, True)[0, 0, 0, 0].item() - 13.581852) < 1e-5


def angles(*shape, seed=0):
    angle = 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("shared", [1, 2], ids=["one table", "a table each"])
@pytest.mark.parametrize("shape", [dict(), dict(T=1, K=0), dict(B=2, T=9, d=13)], ids=str)
def test_the_output_may_be_turned_back(shape, shared):
    args = (*case(**shape, dtype=torch.float64), 0.3, False)
    want, dr = formula(*args), 6
    cos, sin = angles(shared, want.shape[1], 1, dr // 2)
    pairs = torch.view_as_complex(want[..., -dr:].unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(pairs * torch.complex(cos, -sin)).flatten(-2)
    torch.testing.assert_close(attention(*args, cos, sin), torch.cat([want[..., :-dr], turned], -1))


@pytest.mark.parametrize("shape", [dict(), dict(K=0), dict(T=1, B=1)], ids=str)
def test_opcheck(shape):
    args = (*case(**shape), 0.3, False)
    torch.library.opcheck(attention.target, (*args, None, None, 0))
    torch.library.opcheck(attention.target, (*args, *(x.float() for x in angles(*args[0].shape[:2], 1, 3)), 0))
