"""One way to write what models write in many: two spellings have one canonical form, and what only looks alike has not."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from dsv4_compile.graphs.canonical import canonicalise
from dsv4_compile.graphs.graph import head, strip, trace_aten, verify

X = torch.randn(2, 5, 3, 8)
P = torch.rand(2, 5, 3)
ROWS = torch.randn(2, 7, 6)
LIST = torch.randint(-1, 7, (2, 3, 4))
SCORES = torch.randn(4, 5).argsort(-1).float()  # none twice
ANGLE = torch.randn(2, 5, 1, 4)
TIMES = torch.randn(2, 5, 3, 6), torch.randn(3, 4, 6)


def taken(x, index):
    return x[torch.arange(x.shape[0]).view(-1, 1, 1), index.clamp(min=0)]


def rotated(x, angle):
    a, b, cos, sin = x[..., 0::2], x[..., 1::2], angle.cos(), angle.sin()
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def complex_pairs(x):
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def rotated_in_place(x, angle):
    x = x * 2
    x[..., 4:] = rotated(x[..., 4:], angle[..., :2])
    return x


def rotated_behind(x, angle):
    x = x * 2
    return torch.cat([x[..., :4], rotated(x[..., 4:], angle[..., :2])], -1)


def repeated(x):
    return x.select(2, 0).unsqueeze(2).expand(-1, -1, 3, -1)


def ends(x):
    return torch.searchsorted(x[x.argsort(stable=True)], torch.arange(5), right=True)


def chosen(scores):
    return scores.topk(2, -1).indices.flatten()


SAME = {  # two spellings, and their inputs
    "weighted rows, by a product": (
        lambda x, p: (x * p.unsqueeze(-1)).sum(-2),
        lambda x, p: (p.unsqueeze(-2) @ x).squeeze(-2),
        (X, P),
    ),
    "weighted rows, by a product from the right": (
        lambda x, p: (x * p.unsqueeze(-1)).sum(-2),
        lambda x, p: (x.mT @ p.unsqueeze(-1)).squeeze(-1),
        (X, P),
    ),
    "weighted rows, by einsum": (
        lambda x, p: (x * p.unsqueeze(-1)).sum(-2),
        lambda x, p: torch.einsum("...nd,...n->...d", x, p),
        (X, P),
    ),
    "one row, repeated and weighted, by a product from the right": (
        lambda x, p: (repeated(x) * p.unsqueeze(-1)).sum(-2),
        lambda x, p: (repeated(x).mT @ p.unsqueeze(-1)).squeeze(-1),
        (X, P),
    ),
    "columns times rows": (
        lambda x, p: p.unsqueeze(-1) * x[..., :1, :],
        lambda x, p: p.unsqueeze(-1) @ x[..., :1, :],
        (X, P),
    ),
    "weighted channel by channel": (
        lambda x, y: (x * y).sum(2),
        lambda x, y: torch.einsum("bnrc,bnrc->bnc", x, y),
        (X, X + 1),
    ),
    "a side that all tokens share": (
        lambda x, w: torch.einsum("btgk,grk->btgr", x, w),
        lambda x, w: (x.unsqueeze(-2) @ w.mT).squeeze(-2),
        TIMES,
    ),
    "the best, by sorting": (
        lambda s: s.topk(2, -1).indices,
        lambda s: s.argsort(-1, descending=True)[..., :2],
        (SCORES,),
    ),
    "the best, by sorting, with their values": (
        lambda s: s.topk(2, -1).values,
        lambda s: s.sort(-1, descending=True).values.narrow(-1, 0, 2),
        (SCORES,),
    ),
    "rows by gather": (
        taken,
        lambda x, i: x.gather(1, i.clamp(min=0).flatten(1)[..., None].expand(-1, -1, 6)).unflatten(1, (3, 4)),
        (ROWS, LIST),
    ),
    "rows by gather, limited after": (
        taken,
        lambda x, i: x.gather(1, i.flatten(1).clamp(min=0)[..., None].repeat(1, 1, 6)).unflatten(1, (3, 4)),
        (ROWS, LIST),
    ),
    "rows along an axis": (
        taken,
        lambda x, i: torch.take_along_dim(x, i.clamp(min=0).flatten(1).unsqueeze(-1), 1).unflatten(1, (3, 4)),
        (ROWS, LIST),
    ),
    "rows written by scattering": (
        lambda x, i: x.index_put((torch.arange(2).unsqueeze(1), i), x[:, :3] + 1),
        lambda x, i: x.scatter(1, i.unsqueeze(-1).expand(-1, -1, 6), x[:, :3] + 1),
        (ROWS, torch.rand(2, 7).argsort(-1)[:, :3]),
    ),
    "rotation by complex numbers": (
        rotated,
        lambda x, a: torch.view_as_real(complex_pairs(x) * torch.polar(torch.ones_like(a), a)).flatten(-2),
        (X, ANGLE),
    ),
    "rotation back": (
        lambda x, a: torch.view_as_real(complex_pairs(x) * torch.complex(a.cos(), a.sin()).conj()).flatten(-2),
        lambda x, a: torch.view_as_real(complex_pairs(x) * torch.complex(a.cos(), -a.sin())).flatten(-2),
        (X, ANGLE),
    ),
    "the last columns in place": (rotated_behind, rotated_in_place, (X, ANGLE)),
    "counts of ones": (
        lambda s: ends(chosen(s)),
        lambda s: (chosen(s).unsqueeze(-1) == torch.arange(5)).sum(0).cumsum(0),
        (SCORES,),
    ),
    "counts by scattering": (
        lambda x: ends(x),
        lambda x: torch.zeros(5, dtype=torch.int64).scatter_add(0, x, torch.ones_like(x)).cumsum(0),
        (LIST.abs().flatten() % 5,),
    ),
    "turned twice": (lambda x: x.exp(), lambda x: x.mT.reshape(10, 8, 3).mT.exp().view(x.shape), (X,)),
    "a new axis that is dropped": (lambda x: x.exp(), lambda x: x.unsqueeze(0).squeeze(0).exp(), (X,)),
    "twice negative": (lambda x: x.exp(), lambda x: (x.neg().neg()).exp(), (X,)),
}


def canonical(f, *inputs):
    """(graph, names of what it computes, in no order) of f and one more step: what leaves a graph keeps its storage."""
    with FakeTensorMode():
        fakes = [torch.empty(x.shape, dtype=x.dtype) for x in inputs]
        graph = trace_aten(lambda *xs: torch.func.functionalize(f)(*xs) + 1, fakes)
        canonicalise(graph)
    graph.eliminate_dead_code()
    verify(graph, "testing")
    names = [head(n) for n in graph.nodes if n.op == "call_function" and strip(n) is n]
    return graph, sorted(n for n in names if n != "prims.iota")


@pytest.mark.parametrize("name", SAME)
def test_spellings_of_one_thing_have_one_form(name):
    f, g, inputs = SAME[name]
    (_, names), (graph, others) = canonical(f, *inputs), canonical(g, *inputs)
    assert names == others
    got = fx.GraphModule(torch.nn.Module(), graph)(*inputs)
    torch.testing.assert_close(got, f(*inputs) + 1)
    torch.testing.assert_close(got, g(*inputs) + 1)


OTHER = {  # what stays, and by what it is told
    "a stable order, in which equals stand as they were": (
        lambda s: s.sort(stable=True, dim=-1, descending=True).indices[..., :2],
        (SCORES,),
        "aten.sort",
    ),
    "the worst": (lambda s: s.argsort(-1)[..., :2], (SCORES,), "aten.sort"),
    "the second best on": (lambda s: s.argsort(-1, descending=True)[..., 1:3], (SCORES,), "aten.sort"),
    "an index for each element": (lambda x, i: x.gather(1, i), (ROWS, LIST[0].abs() % 7), "aten.gather"),
    "dot products": (lambda x, p: (p.unsqueeze(-2) @ x.mT).squeeze(-2), (X, torch.rand(2, 5, 8)), "aten.bmm"),
    "dot products with copies": (
        lambda x, p: (p.unsqueeze(-2) @ x.mT.contiguous()).squeeze(-2),
        (X, torch.rand(2, 5, 8)),
        "aten.bmm",
    ),
    "rounded products": (lambda x, p: p.unsqueeze(-2) @ x, (X.bfloat16(), P.bfloat16()), "aten.bmm"),
    "numbers that may be negative, counted": (
        lambda x: (x.unsqueeze(-1) == torch.arange(5)).sum(0).cumsum(0),
        (LIST.flatten(),),
        "aten.cumsum",
    ),
    "the middle columns in place": (
        lambda x: torch.slice_scatter(x * 2, x[..., 2:4], -1, 2, 4),
        (X,),
        "aten.slice_scatter",
    ),
    "an input's columns in place": (
        lambda x: torch.slice_scatter(x, x[..., 4:] * 2, -1, 4),
        (X,),
        "aten.slice_scatter",
    ),
}


@pytest.mark.parametrize("name", OTHER)
def test_what_only_looks_alike_stays(name):
    f, inputs, told_by = OTHER[name]
    if name == "an index for each element":
        inputs = ROWS, torch.randint(0, 7, (2, 3, 6))
    graph, names = canonical(f, *inputs)
    assert told_by in names
    torch.testing.assert_close(fx.GraphModule(torch.nn.Module(), graph)(*inputs), f(*inputs) + 1)


def test_a_router_that_sorts_stably_is_reported_and_right(rewritten):
    """Equal scores stay in the order of experts, which topk does not promise."""
    logits, bias = torch.randn(7, 9), torch.randn(9)

    def route(logits, bias):
        score = F.softplus(logits).sqrt()
        expert = (score + bias).sort(stable=True, dim=-1, descending=True).indices[:, :3]
        gate = score.gather(-1, expert)
        return expert, gate / (gate.sum(-1, keepdim=True) + 1e-20) * 1.5

    (expert, gate), report = rewritten(route, logits, bias)
    assert torch.equal(expert, route(logits, bias)[0])
    torch.testing.assert_close(gate, route(logits, bias)[1])
    assert report.counts["router"] == 0
    assert any(m.rule == "fuse.router/chosen" and "aten.sqrt" in m.found for m in report.misses), report.misses
