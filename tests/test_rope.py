"""RoPE: the op against complex multiplication, and the spellings that models use."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_compile.lowerings.rope import norm_rope, rope
from dsv4_compile.reference_model.layers import rope as of_the_model


def formula(x, cos, sin, inverse=False):
    """Pairs as complex numbers, times e^(i angle)."""
    d, dr = x.shape[-1], 2 * cos.shape[-1]
    pairs = torch.view_as_complex(x[..., d - dr :].double().reshape(*x.shape[:-1], dr // 2, 2).clone())
    turn = torch.complex(cos.double(), sin.double())
    turned = torch.view_as_real(pairs * (turn.conj() if inverse else turn)).flatten(-2)
    return torch.cat([x[..., : d - dr].double(), turned], -1)


def drawn(lead, d, dr, table=None, dtype=torch.float32, seed=0):
    """x [*lead, d] and tables [*table, dr/2]."""
    g = torch.Generator().manual_seed(seed)
    angle = 3 * torch.randn(*(lead if table is None else table), dr // 2, generator=g)
    return torch.randn(*lead, d, generator=g).to(dtype), angle.cos(), angle.sin()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 4), max_size=3),
    st.integers(1, 5),
    st.integers(0, 7),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_the_op_says_what_the_formula_says(lead, pairs, rest, shared, inverse, seed):
    table = [1 if shared and i == len(lead) - 1 else n for i, n in enumerate(lead)]  # one angle for all heads
    args = drawn(lead, 2 * pairs + rest, 2 * pairs, table, seed=seed)
    torch.testing.assert_close(rope(*args, inverse).double(), formula(*args, inverse), rtol=1e-5, atol=1e-5)


def test_turning_back_undoes_it():
    x, cos, sin = drawn([2, 3, 4], 10, 6, [2, 3, 1])
    torch.testing.assert_close(rope(rope(x, cos, sin, False), cos, sin, True), x)


def test_bf16_is_rounded_once():
    x, cos, sin = drawn([5, 7], 33, 8, dtype=torch.bfloat16)
    got, want = rope(x, cos, sin, False), formula(x, cos, sin).bfloat16()
    assert got.dtype == torch.bfloat16 and (got != want).sum() <= 1  # fp32 may fall on the other side of a tie


@pytest.mark.parametrize("inverse", [False, True])
def test_opcheck(inverse):
    x, cos, sin = drawn([2, 5, 3], 10, 6, [2, 1, 3])
    torch.library.opcheck(rope.target, (x.transpose(1, 2), cos.transpose(1, 2), sin.transpose(1, 2), inverse))


# Patterns


def back(x, cos, sin):
    return of_the_model(x, cos, -sin)


def in_place_of_pairs(x, cos, sin):
    """Without a stack, products commuted, the negative first."""
    dr = 2 * cos.shape[-1]
    a, b = x[..., -dr::2], x[..., -dr + 1 :: 2]
    turned = torch.cat([(cos * a - sin * b).unsqueeze(-1), (cos * b + sin * a).unsqueeze(-1)], -1)
    return torch.cat([x[..., :-dr], turned.reshape(*x.shape[:-1], dr)], -1)


HEADS, ROWS = ([2, 5, 3], [2, 5, 1]), ([2, 5], [2, 5])  # shapes of x and of the tables, without channels
STEP = ([2, 1, 3], [2, 1, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shapes", [HEADS, ROWS, STEP, ([1, 1], [1, 1])], ids=str)
@pytest.mark.parametrize("f", [of_the_model, back], ids=["forward", "back"])
def test_the_reference_model(f, shapes, dtype, rewritten):
    args = drawn(shapes[0], 10, 6, shapes[1], dtype=dtype)
    result, report = rewritten(f, *args)
    assert report.rules["raise.rope"] == 1 and [s.op for g in report.graphs for s in g.sites] == ["rope"]
    torch.testing.assert_close(result, f(*args))


def test_many_inverse_rotations_share_the_sign(rewritten):
    x, cos, sin = drawn([2, 5, 3], 10, 6, [2, 5, 1])

    def f(x, cos, sin):
        return back(x, cos, sin), back(2 * x, cos, sin)

    result, report = rewritten(f, x, cos, sin)
    assert report.rules["raise.rope"] == 2
    torch.testing.assert_close(result, f(x, cos, sin))


def halves(x, cos, sin):
    """As other models rotate: the first half of the channels against the second."""
    a, b = x[..., -6:-3], x[..., -3:]
    return torch.cat([x[..., :-6], torch.cat([a * cos - b * sin, a * sin + b * cos], -1)], -1)


def both_products_by_the_cosine(x, cos, sin):
    a, b = x[..., -6::2], x[..., -5::2]
    return torch.cat([x[..., :-6], torch.stack([a * cos - b * sin, a * cos + b * sin], -1).flatten(-2)], -1)


@pytest.mark.parametrize("f", [halves, both_products_by_the_cosine])
def test_other_rotations_stay(f, rewritten):
    args = drawn([2, 5], 10, 6)
    result, report = rewritten(f, *args)
    assert report.rules["raise.rope"] == 0
    torch.testing.assert_close(result, f(*args))


@pytest.mark.parametrize("T", [5, 1], ids="{} tokens".format)
@pytest.mark.parametrize("B", [2, 1], ids="tables of {}".format)
@pytest.mark.parametrize("h", [3, 1], ids="{} heads".format)
def test_hugging_face(T, B, h, rewritten):
    hf = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4").apply_rotary_pos_emb

    def around_transposes(x, cos, sin):
        return hf(x.transpose(1, 2), cos, -sin).transpose(1, 2)

    x, cos, sin = drawn([2, h, T], 10, 6, [B, T])
    for f, args in ((hf, (x, cos, sin)), (around_transposes, (x.transpose(1, 2).contiguous(), cos, sin))):
        torch._dynamo.reset()
        result, report = rewritten(f, *args)
        assert report.rules["raise.rope"] == 1
        torch.testing.assert_close(result, f(*args))


def test_tables_that_are_not_doubled_side_by_side_stay(rewritten):
    """cos of pairs 0 1 2 0 1 2 in the place of 0 0 1 1 2 2."""
    x, cos, sin = drawn([2, 3, 5], 10, 6, [2, 5])

    def f(x, cos, sin):
        cos, sin = torch.cat([cos, cos], -1).unsqueeze(1), torch.cat([sin, sin], -1).unsqueeze(1)
        rotary = x[..., -6:]
        swapped = torch.stack([-rotary[..., 1::2], rotary[..., 0::2]], -1).flatten(-2)
        return torch.cat([x[..., :-6], rotary * cos + swapped * sin], -1)

    result, report = rewritten(f, x, cos, sin)
    assert report.rules["raise.rope"] == 0
    torch.testing.assert_close(result, f(x, cos, sin))


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("weight", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("d", "dr"), [(512, 64), (48, 16), (36, 6), (1536, 1536)])
@pytest.mark.parametrize(
    ("lead", "table"),
    [
        ((1, 1, 5), (1, 1, 1)),
        ((2, 3, 4), (2, 3, 1)),
        ((2, 3, 4), (1, 3, 1)),
        ((2, 70), (2, 70)),
        ((2, 3, 4), (2, 1, 4)),
    ],
    ids=str,
)
def test_the_kernel_of_norm_and_rope_is_the_meaning(lead, table, d, dr, weight, dtype, kernel_parity):
    tolerance = dict(rtol=1e-2, atol=1e-2) if dtype == torch.bfloat16 else dict(rtol=1e-5, atol=1e-5)
    (x, cos, sin), (y, *others) = (drawn(lead, d, dr, table, dtype, seed) for seed in (0, 1))
    w = None if weight is None else torch.rand(d, generator=torch.Generator().manual_seed(2)).to(weight)
    kernel_parity(norm_rope, x, w, 1e-3, cos, sin, others=(y, w, 1e-3, *others), **tolerance)
