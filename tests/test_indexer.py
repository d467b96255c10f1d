"""The indexer: the op against scores in fp64, and what raises to it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dsv4_compile.lowerings.compressor_append import quantized
from dsv4_compile.lowerings.indexer import indexer, not_turned
from dsv4_compile.reference_model.layers import rope as turned
from dsv4_compile.reference_model.quant import dequantize_rows


def case(B, T, h, d, E, dtype=torch.float64, seed=0, shared=False):
    """q, keys, w, visible; every number of visible entries from 0 to E occurs."""
    g = torch.Generator().manual_seed(seed)
    q, keys, w = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((B, T, h, d), (B, E, d), (B, T, h)))
    visible = torch.randint(0, E + 1, (1 if shared else B, T), generator=g)
    return q.to(dtype), keys.to(dtype), w.to(torch.promote_types(dtype, torch.float32)), visible


def scores(q, keys, w, visible):
    """[B, T, E] in fp64; what may not be seen is -inf."""
    q, keys, w = q.double(), keys.double(), w.double()
    s = sum(w[:, :, i, None] * torch.einsum("btd,bed->bte", q[:, :, i], keys).clamp(min=0) for i in range(q.shape[2]))
    hidden = torch.arange(keys.shape[1]).view(1, 1, -1) >= visible.unsqueeze(-1)
    return s.masked_fill(hidden, float("-inf"))


def check(pick, score, visible, k, slack=0.0):
    """k places; every entry once, only visible ones, as many as there are; none that is left out has a better score."""
    assert pick.dtype == torch.int64 and pick.shape == (*score.shape[:2], k) and pick.is_contiguous()
    for chosen, row, seen in zip(
        pick.flatten(0, 1), score.flatten(0, 1), visible.expand(pick.shape[:2]).flatten(), strict=True
    ):
        some = chosen[chosen >= 0].tolist()
        assert len(set(some)) == len(some) == min(k, seen) and all(c < seen for c in some)
        rest = [e for e in range(int(seen)) if e not in some]
        if some and rest:
            assert row[some].min() >= row[rest].max() - slack


SHAPES = [(2, 5, 3, 7, 11), (1, 1, 4, 8, 1), (1, 40, 2, 3, 33), (3, 1, 1, 1, 6), (2, 0, 2, 3, 4)]
RUNS = pytest.mark.parametrize("run", [indexer, indexer.meaning], ids=["cpu", "meaning"])


@RUNS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["positions of rows", "positions of all"])
def test_the_best_visible_entries_are_picked(run, shape, shared):
    args = case(*shape, shared=shared)
    for k in sorted({1, min(3, shape[-1]), shape[-1]}):
        check(run(*args, k), scores(*args), args[-1], k)


@settings(max_examples=25, deadline=None)
@given(*(st.integers(1, n) for n in (3, 9, 4, 6, 20)), st.integers(0, 99), st.data())
def test_single_precision_on_odd_shapes(B, T, h, d, E, seed, data):
    args, k = case(B, T, h, d, E, torch.float32, seed), data.draw(st.integers(1, E))
    for run in (indexer, indexer.meaning):
        check(run(*args, k), scores(*args), args[-1], k, slack=1e-5)


@RUNS
def test_half_precision_is_scored_in_single(run):
    args = case(2, 20, 8, 16, 40, torch.bfloat16)
    check(run(*args, 5), scores(*args), args[-1], 5, slack=1e-4)


def test_many_queries_go_block_by_block(monkeypatch):
    args = case(2, 33, 4, 5, 21)
    monkeypatch.setitem(indexer.implementations[0].run.__globals__, "BLOCK", 4 * 21 * 7)
    check(indexer(*args, 6), scores(*args), args[-1], 6)


def test_of_equal_scores_the_lower_entries_are_picked():
    """ReLUs are often all zero: exact ties."""
    q, keys, w, _ = case(1, 9, 2, 3, 30)
    visible = torch.arange(22, 31).view(1, 9)
    pick = indexer(q * 0, keys, w, visible, 4)
    assert pick.sort(-1).values.tolist() == [[[0, 1, 2, 3]] * 9]


def test_strides_do_not_matter_and_the_op_is_sound():
    q, keys, w, visible = case(2, 5, 3, 4, 11, torch.float32)
    spread = [torch.stack([x, x], -1)[..., 0] for x in (q, keys, w)]
    assert torch.equal(indexer(*spread, visible, 4), indexer(q, keys, w, visible, 4))
    torch.library.opcheck(indexer.target, (q, keys, w, visible, 4, None, None, None))


def test_costs_are_those_of_the_products():
    cost = indexer.symbolic_cost().at(B=1, T=7, h=64, d=128, E=1000, k=512, bits=16)
    products = 2 * 7 * 64 * 128 * 1000
    assert products < cost.flops < 1.02 * products and cost.write == 8 * 7 * 512
    args = case(2, 5, 3, 4, 11)
    assert indexer.bound_sizes(indexer.arguments(*args, 4)) == dict(B=2, T=5, h=3, d=4, E=11, k=4, bits=16)


def stored(keys):
    """Codes and scales."""
    codes, scale = quantized(keys.float())
    return codes, scale


@RUNS
def test_keys_in_e4m3_are_scored_with_their_scales(run):
    q, keys, w, visible = case(2, 20, 8, 16, 40, torch.bfloat16)
    codes, scale = stored(keys * 2.0 ** torch.arange(-3, 37).view(1, 40, 1).remainder(7))
    assert scale.unique().numel() > 4
    wide = codes.double() * scale.double()
    check(run(q, codes, w, visible, 5, None, None, scale), scores(q, wide, w, visible), visible, 5, slack=1e-3)
    tried = "test_autograd_registration", "test_faketensor"  # the others multiply numbers in e4m3
    torch.library.opcheck(indexer.target, (q, codes, w, visible, 4, None, None, scale), test_utils=tried)
    sizes = indexer.bound_sizes(indexer.arguments(q, codes, w, visible, 5, None, None, scale))
    assert sizes["bits"] == 8 + 32 / 16
    cost = indexer.symbolic_cost().at(**(sizes | {"d": 128, "bits": 8.25}))
    assert int(cost.read) == 2 * (20 * 8 * 128 * 2 + 40 * 132 + 20 * (4 * 8 + 8))


# -- raising: with so many heads that their ReLUs are never all zero, which would be a tie


def pick_of(q, keys, w, visible, k=3, relu=torch.relu, hidden=torch.ge, key_scale=None, none=-1):
    """As the model has it, with places to change; commuted where that does not matter."""
    s = relu(q.float() @ keys.transpose(1, 2).float().unsqueeze(1))
    if key_scale is not None:
        s = key_scale * s
    score = torch.sum(w.unsqueeze(-1) * s, dim=2)
    seen = visible.unsqueeze(-1)
    score = score.masked_fill(hidden(torch.arange(score.shape[-1]), seen), -float("inf"))
    pick = torch.topk(score, k, dim=-1)[1]
    if key_scale is not None:
        return torch.where(pick >= seen, torch.full_like(pick, none), pick)
    return torch.where(pick < seen, pick, none)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("change", [{}, {"key_scale": 0.25}], ids=["ours", "Hugging Face's"])
@pytest.mark.parametrize("shape", [(2, 5, 16, 4, 11), (1, 1, 16, 4, 11), (1, 5, 16, 4, 3)], ids=str)
def test_both_spellings_raise(rewritten, dtype, change, shape):
    args = case(*shape, dtype)
    f = lambda *args: pick_of(*args, **change)  # noqa: E731
    result, report = rewritten(f, *args)
    assert report.runs == {("indexer", "cpu"): 1}
    assert torch.equal(result.sort(-1).values, f(*args).sort(-1).values)


def test_two_layers_share_what_hides_entries(rewritten):
    q, keys, w, visible = case(2, 5, 16, 4, 11, torch.float32)
    f = lambda *args: (pick_of(*args), pick_of(args[0].flip(1), args[1] * 2, *args[2:]))  # noqa: E731
    result, report = rewritten(f, q, keys, w, visible)
    assert report.runs == {("indexer", "cpu"): 2}
    for got, want in zip(result, f(q, keys, w, visible), strict=True):
        assert torch.equal(got.sort(-1).values, want.sort(-1).values)


class Turned(nn.Module):
    """Queries are turned and weights scaled by `factor`, as in the model."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, q, keys, w, visible, cos, sin):
        return pick_of(turned(q, cos, sin), keys, w.float() * self.factor, visible)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factor", [0.3, -0.3])
def test_turned_queries_and_scaled_weights_are_the_ops_own(factor, dtype, rewritten, monkeypatch):
    q, keys, w, visible = case(2, 5, 16, 12, 11, dtype)
    angle, seen = torch.randn(2, 5, 1, 3), []
    args = q, keys, w.to(dtype), visible, angle.cos(), angle.sin()

    def claims(a):
        seen.append((a.cos is not None, a.q.dtype, a.w.dtype))
        return not_turned(a)

    monkeypatch.setattr(indexer, "implementations", [replace(i, when=claims) for i in indexer.implementations])
    result, report = rewritten(Turned(factor), *args)
    own = factor > 0  # else the order is another one
    assert report.counts["indexer"] == 1 and report.runs[("indexer", "cpu")] == 1
    assert seen[0] == (own, dtype, dtype if own else torch.float32)
    assert seen[0] == seen[-1] or seen[-1] == (False, dtype, dtype)
    want = Turned(factor)(*args)
    if dtype == torch.float32:
        assert torch.equal(result.sort(-1).values, want.sort(-1).values)


class OfStored(nn.Module):
    """With keys in e4m3, turned queries and scaled weights, or neither."""

    def forward(self, q, codes, scale, w, visible, cos=None, sin=None):
        keys = dequantize_rows(codes, scale, torch.float32)
        return pick_of(q if cos is None else turned(q, cos, sin), keys, w if cos is None else w * 0.3, visible)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("turn", [False, True], ids=["plain", "turned"])
def test_stored_keys_reach_the_op_with_their_scales(turn, dtype, rewritten, monkeypatch):
    q, keys, w, visible = case(2, 5, 16, 12, 11, dtype)
    angle, seen = torch.randn(2, 5, 1, 3), []
    args = q, *stored(keys), w, visible, *((angle.cos(), angle.sin()) if turn else ())

    def claims(a):
        seen.append((a.keys.dtype, None if a.scale is None else a.scale.dtype))
        return not_turned(a)

    monkeypatch.setattr(indexer, "implementations", [replace(i, when=claims) for i in indexer.implementations])
    result, report = rewritten(OfStored(), *args)
    assert report.runs[("indexer", "cpu")] == 1 and set(seen) == {(torch.float8_e4m3fn, torch.float32)}
    if dtype == torch.float32:
        assert torch.equal(result.sort(-1).values, OfStored()(*args).sort(-1).values)


def test_positions_that_all_rows_share_and_a_symbolic_length(rewritten):
    args = case(2, 5, 16, 4, 11, torch.float32, shared=True)
    for i in (0, 2, 3):
        torch._dynamo.mark_dynamic(args[i], 1)
    result, report = rewritten(pick_of, *args)
    assert report.runs == {("indexer", "cpu"): 1}
    assert torch.equal(result.sort(-1).values, pick_of(*args).sort(-1).values)


WRONG = {
    "no relu": {"relu": lambda x: x},
    "another activation": {"relu": torch.sigmoid},
    "entries that are hidden the other way": {"hidden": torch.lt},
    "one more": {"hidden": torch.gt},
    "another sentinel": {"none": -2},
}


def test_what_is_no_indexer_stays(rewritten):
    args = case(2, 5, 16, 4, 11, torch.float32)

    def all_of_them(*args):
        return [pick_of(*args, **change) for change in WRONG.values()]

    result, report = rewritten(all_of_them, *args)
    assert report.counts["indexer"] == 0 and len([m for m in report.misses if "indexer" in m.rule]) >= 2
    for got, want in zip(result, all_of_them(*args), strict=True):
        assert torch.equal(got, want)


def test_scores_that_others_read_too_are_no_indexer_and_the_report_says_who(rewritten):
    args = case(2, 5, 16, 4, 11, torch.float32)

    class Reads(nn.Module):
        def forward(self, q, keys, w, visible):
            s = torch.relu(q @ keys.mT.unsqueeze(1))
            score = (s * w.unsqueeze(-1)).sum(-2)
            seen = visible.unsqueeze(-1)
            pick = score.masked_fill(torch.arange(11) >= seen, float("-inf")).topk(3).indices
            return torch.where(pick < seen, pick, -1), score.exp()

    _, report = rewritten(Reads(), *args)
    assert report.counts["indexer"] == 0
    assert any("is also read by" in m.found for m in report.misses if m.rule == "fuse.indexer/weighted")
