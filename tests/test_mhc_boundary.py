"""mHC between two blocks: the ops against the reference model's modules in fp64, and what raises to them."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dsv4_compile.lowerings.mhc import mhc_head, mhc_post, mhc_pre
from dsv4_compile.lowerings.mhc_boundary import in_one_launch, mhc_boundary, mhc_enter
from dsv4_compile.lowerings.norm import rms_norm
from dsv4_compile.reference_model import DSV4Config
from dsv4_compile.reference_model.layers import RMSNorm
from dsv4_compile.reference_model.model import HyperConnection, reconnect

CONFIG = replace(DSV4Config.tiny(), hc_sinkhorn_iters=3, hc_eps=1e-3, rms_norm_eps=1e-2)  # large enough to be missed
NORM_EPS = 3e-2


def modules(n, D, dtype=torch.float64):
    torch.manual_seed(0)
    connection = HyperConnection(replace(CONFIG, hc_mult=n, hidden_size=D)).double()
    norm = RMSNorm(D, NORM_EPS).double()
    for p in (connection.base, connection.scale, norm.weight):
        nn.init.normal_(p, 1.0, 0.5)
    return connection.to(dtype).requires_grad_(False), norm.to(dtype).requires_grad_(False)


def case(lead, n, D, dtype=torch.float64):
    """Tensor arguments of `mhc_boundary`, its numbers, and what the modules make of them in fp64."""
    connection, norm = modules(n, D)
    shapes = (*lead, n, D), (*lead, D), (*lead, n), (*lead, n, n)
    exact = torch.promote_types(dtype, torch.float32)
    tensors = [
        torch.randn(s, dtype=torch.float64).to(t) for s, t in zip(shapes, (dtype, dtype, exact, exact), strict=True)
    ]
    weights = [w.data.to(exact) for w in (connection.fn, connection.base, connection.scale, norm.weight)]
    numbers = connection.iters, connection.eps, connection.rms_eps, norm.eps
    for p, w in zip((connection.fn, connection.base, connection.scale, norm.weight), weights, strict=True):
        p.data = w.double()
    streams = reconnect(*(t.double() for t in tensors))
    x, post, comb = connection(streams)
    return (*tensors, *weights), numbers, (streams, norm(x), post, comb)


SHAPES = [((1,), 4, 192), ((33,), 4, 10), ((1,), 1, 1), ((2, 3), 2, 5), ((0,), 4, 6)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_ops_say_what_the_modules_say(shape):
    tensors, numbers, want = case(*shape)
    for run in (mhc_boundary, mhc_boundary.meaning):
        torch.testing.assert_close(run(*tensors, *numbers), want, rtol=1e-11, atol=1e-12)
    for run in (mhc_enter, mhc_enter.meaning):
        torch.testing.assert_close(run(want[0], *tensors[4:], *numbers), want[1:], rtol=1e-11, atol=1e-12)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 20), st.integers(1, 5), st.integers(1, 9))
def test_single_precision_on_odd_shapes(N, n, D):
    tensors, numbers, want = case((N,), n, D, torch.float32)
    for got, w in zip(mhc_boundary(*tensors, *numbers), want, strict=True):
        torch.testing.assert_close(got.double(), w, rtol=1e-3, atol=1e-4)


def test_rounded_where_the_parts_are():
    """In bf16 the new streams and the block's input are rounded before they are read again, coefficients never."""
    (X, y, post, comb, *weights, weight), numbers, _ = case((9,), 4, 64, torch.bfloat16)
    got = mhc_boundary.meaning(X, y, post, comb, *weights, weight, *numbers)
    streams = mhc_post(X, y, post, comb)
    x, *coefficients = mhc_pre(streams, *weights, *numbers[:3])
    assert [g.dtype for g in got] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    for g, want in zip(got, (streams, rms_norm(x, weight, NORM_EPS), *coefficients), strict=True):
        assert torch.equal(g, want) and g.is_contiguous()
    for g, want in zip(mhc_enter.meaning(streams, *weights, weight, *numbers), got[1:], strict=True):
        assert torch.equal(g, want)


def test_opcheck():
    tensors, numbers, want = case((3,), 4, 6, torch.bfloat16)
    torch.library.opcheck(mhc_boundary.target, (*tensors, *numbers))
    torch.library.opcheck(mhc_enter.target, (want[0].bfloat16(), *tensors[4:], *numbers))


def test_a_boundary_saves_traffic_and_nothing_else():
    sizes = dict(N=7, n=4, D=4096, iters=20)
    parts = [mhc_post.symbolic_cost(), mhc_pre.symbolic_cost(), rms_norm.symbolic_cost()]
    parts = [p.at(**sizes) for p in parts]
    whole, enter = (op.symbolic_cost().at(**sizes) for op in (mhc_boundary, mhc_enter))
    assert whole.flops == sum(p.flops for p in parts) and enter.flops == whole.flops - parts[0].flops
    streams, x = 2 * 7 * 4 * 4096, 2 * 7 * 4096
    assert sum(p.read + p.write for p in parts) - (whole.read + whole.write) == streams + 2 * x


# -- raising


class Blocks(nn.Module):
    """Two blocks with their connections, as in a layer of the reference model."""

    def __init__(self, dtype):
        super().__init__()
        D = CONFIG.hidden_size
        self.connections = nn.ModuleList(HyperConnection(CONFIG) for _ in range(2))
        self.norms = nn.ModuleList(RMSNorm(D, NORM_EPS) for _ in range(2))
        self.blocks = nn.ModuleList(nn.Linear(D, D, bias=False) for _ in range(2))
        self.to(dtype).requires_grad_(False)

    def forward(self, X):
        for connection, norm, block in zip(self.connections, self.norms, self.blocks, strict=True):
            x, post, comb = connection(X)
            X = reconnect(X, block(norm(x)), post, comb)
        return X


def drawn(B, T, dtype):
    return torch.randn(B, T, CONFIG.hc_mult, CONFIG.hidden_size).to(dtype)


def ran(report):
    return {name: sum(n for (op, _), n in report.runs.items() if op == name) for name, _ in report.runs}


@pytest.mark.parametrize(
    ("dtype", "B", "T"),
    [(torch.bfloat16, 1, 1), (torch.bfloat16, 2, 3), (torch.float32, 3, 1), (torch.float64, 1, 3)],
    ids=str,
)
def test_the_model_raises(rewritten, dtype, B, T):
    blocks, X = Blocks(dtype), drawn(B, T, dtype)
    result, report = rewritten(blocks, X)
    assert report.counts["mhc_boundary"] == 2 and report.counts["mhc"] == 4
    found = ran(report)
    assert found["mhc_enter"] == found["mhc_boundary"] == 1
    assert report.runs["mhc_pre", "cpu"] == report.runs["mhc_post", "cpu"] == 2  # the parts, asked in their turn
    tolerance = {torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(result, blocks(X), rtol=tolerance, atol=tolerance)


def test_parts_have_their_lines_again(rewritten):
    _, report = rewritten(Blocks(torch.float32), drawn(1, 3, torch.float32))
    (graph,) = report.graphs
    lines = {r.op: (r.where, r.layer) for r in graph.ran if not r.apart}
    assert "acc(X)).sum(-2)" in lines["mhc_pre"][0] and lines["mhc_pre"][1].startswith("connections.")
    assert "post.unsqueeze" in lines["mhc_post"][0] and lines["rms_norm"][1].startswith("norms.")
    apart = [r for r in graph.ran if r.apart]
    assert {r.op for r in apart} == {"mhc_enter", "mhc_boundary"} and all(r.flops == r.moved == 0 for r in apart)


def test_a_symbolic_length_stays_symbolic(rewritten):
    blocks, X = Blocks(torch.bfloat16), drawn(2, 5, torch.bfloat16)
    torch._dynamo.mark_dynamic(X, 1)
    result, report = rewritten(blocks, X)
    assert report.counts["mhc_boundary"] == 2
    torch.testing.assert_close(result, blocks(X), rtol=2e-2, atol=2e-2)


def test_an_input_that_others_read_too_is_no_boundary_and_the_report_says_who(rewritten):
    blocks, X = Blocks(torch.float32), drawn(1, 3, torch.float32)

    def forward(X):
        x, post, comb = blocks.connections[0](X)
        return reconnect(X, blocks.norms[0](x) + x.abs(), post, comb)

    result, report = rewritten(forward, X)
    assert report.counts["mhc_boundary"] == 0 and report.counts["mhc"] == 2
    (miss,) = [m for m in report.graphs[0].misses if m.rule == "fuse.mhc_boundary/first"]
    assert miss.expected == "a block that can be replaced" and "is also read by abs" in miss.found
    torch.testing.assert_close(result, forward(X))


def test_another_norm_is_no_boundary(rewritten):
    blocks, X = Blocks(torch.float32), drawn(1, 3, torch.float32)

    def forward(X):
        x, post, comb = blocks.connections[0](X)
        return reconnect(X, torch.nn.functional.layer_norm(x, x.shape[-1:]), post, comb)

    result, report = rewritten(forward, X)
    assert report.counts["mhc_boundary"] == 0 and report.counts["mhc"] == 2
    torch.testing.assert_close(result, forward(X))


def test_without_mhc_there_are_no_boundaries_and_none_are_missed(rewritten):
    _, report = rewritten(Blocks(torch.float32), drawn(1, 1, torch.float32), disable="fuse.mhc")
    assert "fuse.mhc_boundary" in report.off and report.counts["mhc_boundary"] == 0


# -- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("n", "D"), [(4, 192), (4, 4096), (4, 7168), (3, 40), (2, 4), (1, 1028), (4, 36)])
@pytest.mark.parametrize("lead", [(0, 3), (1, 1), (3,), (2, 8)], ids=str)
def test_the_kernel_is_the_meaning(lead, n, D, dtype, kernel_parity):
    tolerance = dict(rtol=1e-2, atol=3e-2) if dtype == torch.bfloat16 else dict(rtol=1e-4, atol=1e-4)
    (tensors, numbers, _), (others, _, _) = case(lead, n, D, dtype), case(lead, n, D, dtype)
    kernel_parity(mhc_boundary, *tensors, *numbers, others=(*others, *numbers), **tolerance)
    enter, instead = (t[:1] + t[4:] for t in (tensors, others))
    kernel_parity(mhc_enter, *enter, *numbers, others=(*instead, *numbers), **tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("D", [192, 200])
@pytest.mark.parametrize("lead", [(1,), (5,), (16,)], ids=str)
def test_every_division_and_a_last_collapse(lead, D, monkeypatch, poisoned):
    """Clusters of each size, which may serve several tokens in turn, and the form without coefficients. Who has which pieces
    does not matter to the bits; the last ones lack columns, or have none."""
    from dsv4_compile.kernels.mhc_boundary import BOUNDARY, Config

    n, alike = 4, {}
    tensors, numbers, want = case(lead, n, D, torch.float32)
    head = (torch.randn(n, n * D), torch.randn(n), torch.randn(1), tensors[-1])
    collapsed = mhc_head.meaning(*(t.double() for t in (tensors[0], *head[:3])), 1e-3, 1e-2)
    normed = rms_norm.meaning(collapsed, head[3].double(), NORM_EPS)
    for config in (Config(splits, parts) for parts in (1, 2) for splits in (1, 2, 4, 8, 16)):
        monkeypatch.setattr(BOUNDARY, "choice", lambda shape, work=(), config=config: config)
        got = mhc_boundary(*(t.cuda() for t in tensors), *numbers)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g.cpu().double(), w, rtol=1e-4, atol=1e-4)
        _, x, post, comb = in_one_launch(*(t.cuda() for t in (tensors[0], *head)), 0, 1e-3, 1e-2, NORM_EPS)
        assert post is None and comb is None
        torch.testing.assert_close(x.cpu().double(), normed, rtol=1e-4, atol=1e-4)
        for g, w in zip((*got, x), alike.setdefault(config.pieces, (*got, x)), strict=True):
            assert torch.equal(g, w)


@pytest.mark.skipif(find_spec("cutlass") is None, reason="kernels need CuTeDSL")
@pytest.mark.parametrize("D", [64, 192, 2048, 4096, 5120, 7168])
def test_columns_are_divided_alike_for_any_number_of_tokens(D):
    from dsv4_compile.kernels.mhc_boundary import configs, rank

    shape = shape_of(4, D)
    by_count = [rank(shape, (count,)) for count in (1, 2, 4, 8, 16, 64)]
    assert len({c.pieces for found in by_count for c in found}) == 1
    assert all({*found} == {*configs(shape)} for found in by_count)
    assert by_count[0][0].parts == 1 and by_count[3][0].splits <= (8 if D < 5120 else 16)


def shape_of(n, D):
    from dsv4_compile.kernels.mhc_boundary import Shape

    return Shape(n, D, "fp32", CONFIG.hc_sinkhorn_iters, True, "fp32")
