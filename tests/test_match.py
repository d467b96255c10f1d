"""The matcher: what is free, what is not, and what it says when a block is not the one."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4_compile.errors import BadRule
from dsv4_compile.match import Found, Int, Scalar, T, finder, head, rule, strip, term
from dsv4_compile.op import op

EPS = 1e-5


@op("dsv4::t_route", outputs=("index", "gate"))
def t_route(logits: Tensor, bias: Tensor, k: int, eps: float, scale: float) -> tuple[Tensor, Tensor]:
    """The k best by score + bias, weighted by score."""
    score = torch.sigmoid(logits)
    index = (score + bias).topk(k, -1).indices
    gate = score.gather(-1, index)
    return index, gate / (gate.sum(-1, keepdim=True) + eps) * scale


@rule(t_route, name="fuse.t_route", anchor="topk", example={"logits": T(5, 11), "bias": T(11), "k": 7})
def route(logits, bias, k: Int, eps: Scalar, scale: Scalar):
    score = torch.sigmoid(logits)
    index = (score + bias).topk(k, -1).indices
    gate = score.gather(-1, index)
    return index, gate / (gate.sum(-1, keepdim=True) + eps) * scale


def spelled(x, bias, k=3, eps=1e-20, scale=1.5):
    s = x.float().sigmoid()
    i = torch.topk(bias + s, k, dim=1, sorted=False)[1]
    g = torch.gather(s, 1, i)
    return i, scale * (g / (eps + torch.sum(g, dim=1, keepdim=True)))


# -- norms, the small idiom in all its spellings

W = torch.rand(8) + 0.5
NORMS = {
    "functional": lambda x: F.rms_norm(x, (8,), W, EPS),
    "weight left": lambda x: W * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)),
    "x times x": lambda x: torch.rsqrt(EPS + (x * x).mean(-1, True)) * x * W,
    "square": lambda x: x * (x.square().mean(dim=-1, keepdim=True) + EPS).rsqrt() * W,
    "casts": lambda x: W * (x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + EPS)).float(),
    "two casts of one value": lambda x: x.double() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + EPS) * W,
    "views": lambda x: (x.view(4, 8) * torch.rsqrt(x.view(4, 8).pow(2).mean(1, keepdim=True) + EPS)).view(2, 2, 8) * W,
    "weight broadcast": lambda x: (
        x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * W[None, None].expand(2, 2, 8)
    ),
    "one repetition, made twice": lambda x: norm_of(
        x[0].unsqueeze(1).expand(2, 2, 8), x[0].view(2, 1, 1, 8).expand(2, 2, 1, 8).reshape(2, 2, 8)
    ),
}


def norm_of(x, y):
    """A norm of x if y is x."""
    return x * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS) * W


@pytest.mark.parametrize("name", NORMS)
def test_every_spelling_raises(rewritten, name):
    x = torch.randn(2, 2, 8)
    result, report = rewritten(NORMS[name], x)
    torch.testing.assert_close(result, NORMS[name](x), rtol=1e-5, atol=1e-6)
    assert report.rules["raise.rms_norm"] == 1 and report.rules["raise.unit_norm"] == 0


NOT_NORMS = {
    "other axis": lambda x: x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + EPS) * W,
    "cube": lambda x: x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 2) * W,
    "sum": lambda x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPS) * W,
    "another value scaled": lambda x: (x + 1) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * W,
    "groups of the last axis": lambda x: (
        x * torch.rsqrt(x.view(2, 2, 2, 4).pow(2).mean(-1, keepdim=True) + EPS).expand(2, 2, 2, 4).reshape(2, 2, 8) * W
    ),
    "transposed on the way": lambda x: x * torch.rsqrt(x.mT.pow(2).mean(-1, keepdim=True) + EPS).sum() * W,
    "repeated along another axis": lambda x: norm_of(x[0].unsqueeze(1).expand(2, 2, 8), x[0].expand(2, 2, 8)),
    "another thing repeated": lambda x: norm_of(x[0].unsqueeze(1).expand(2, 2, 8), x[1].unsqueeze(1).expand(2, 2, 8)),
    "negative": lambda x: x * -torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * W,
}


@pytest.mark.parametrize("name", NOT_NORMS)
def test_what_is_not_a_norm_stays(rewritten, name):
    x = torch.rand(2, 2, 8) + 0.1
    result, report = rewritten(NOT_NORMS[name], x)
    torch.testing.assert_close(result, NOT_NORMS[name](x))
    assert report.rules["raise.rms_norm"] == report.rules["raise.unit_norm"] == 0


def test_a_norm_of_reinterpreted_rows_is_a_norm_of_the_view(rewritten):
    """A view that mixes axes before the block changes what the input is, not whether it is a norm."""
    x, w = torch.randn(4, 8), torch.rand(16)

    def f(x):
        y = x.view(2, 16)
        return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + EPS) * w

    result, report = rewritten(f, x)
    torch.testing.assert_close(result, f(x))
    assert report.rules["raise.rms_norm"] == 1


# -- several outputs, captured numbers


@pytest.mark.parametrize("shape", [(6, 10), (1, 10), (6, 7)])
def test_outputs_numbers_and_integers_are_captured(rewritten_by, shape):
    x, bias = torch.randn(shape), torch.randn(shape[-1])
    (index, gate), report = rewritten_by([route], spelled, x, bias)
    want = spelled(x, bias)
    torch.testing.assert_close(gate.sort().values, want[1].sort().values)
    assert torch.equal(index.sort().values, want[0].sort().values)
    assert report.rules["fuse.t_route"] == 1 and report.counts == {"t_route": 1}


def test_captured_values_reach_the_op(rewritten_by):
    seen = {}

    @rule(
        t_route, name="fuse.t_route", anchor="topk", example={"logits": T(5, 11), "bias": T(11), "k": 7},
        check=lambda m: seen.update(m.arguments, dtype=m.dtype("logits"), experts=m.sizes[11]) is None,
    )  # fmt: skip
    def spy(logits, bias, k: Int, eps: Scalar, scale: Scalar):
        return route_body(logits, bias, k, eps, scale)

    rewritten_by(
        [spy], lambda x, b: spelled(x, b, 4, 0.25, 2), torch.randn(6, 10, dtype=torch.bfloat16), torch.randn(10)
    )
    assert (seen["k"], seen["eps"], seen["scale"], seen["experts"]) == (4, 0.25, 2.0, 10)


def route_body(logits, bias, k, eps, scale):
    score = torch.sigmoid(logits)
    index = (score + bias).topk(k, -1).indices
    gate = score.gather(-1, index)
    return index, gate / (gate.sum(-1, keepdim=True) + eps) * scale


def test_a_scalar_is_one_number_everywhere(rewritten):
    gate, up = torch.randn(4, 6), torch.randn(4, 6)
    same = lambda g, u: F.silu(g.clamp(max=2.0)) * u.clamp(-2.0, 2.0)  # noqa: E731
    other = lambda g, u: F.silu(g.clamp(max=2.0)) * u.clamp(-2.0, 3.0)  # noqa: E731
    assert rewritten(same, gate, up)[1].rules["raise.swiglu"] == 1
    result, report = rewritten(other, gate, up)
    assert report.rules["raise.swiglu"] == 0
    torch.testing.assert_close(result, other(gate, up))


def test_three_in_one_graph_are_three_matches(rewritten_by):
    def f(x, bias):
        return [spelled(x + i, bias) for i in range(3)]

    _, report = rewritten_by([route], f, torch.randn(6, 10), torch.randn(10))
    assert report.counts["t_route"] == 3


def test_an_interior_value_read_outside_refuses_unless_shared(rewritten_by):
    def f(x, bias):
        s = x.sigmoid()
        total = s + bias
        i = total.topk(3).indices
        g = s.gather(-1, i)
        return i, g / (g.sum(-1, keepdim=True) + 1e-20) * 1.5, total * 2

    x, bias = torch.randn(6, 10), torch.randn(10)
    result, report = rewritten_by([route], f, x, bias)
    torch.testing.assert_close(result, f(x, bias))
    (miss,) = report.misses
    assert report.counts["t_route"] == 0 and "(aten.add) is also read by" in miss.found

    shared = rule(
        t_route,
        name="fuse.t_route",
        anchor="topk",
        example={"logits": T(5, 11), "bias": T(11), "k": 7},
        shared=("aten.add",),
    )
    result, report = rewritten_by([shared(route_body_rule)], f, x, bias)
    torch.testing.assert_close(result, f(x, bias))  # what the other reader needs is computed twice
    assert report.counts["t_route"] == 1


def route_body_rule(logits, bias, k: Int, eps: Scalar, scale: Scalar):
    return route_body(logits, bias, k, eps, scale)


def test_an_input_computed_from_an_output_refuses(rewritten_by):
    @op("dsv4::t_pair", outputs=("a", "b"))
    def t_pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """sin(x) and sin(x) * erf(y)."""
        return x.sin(), x.sin() * y.erf()

    @rule(t_pair, name="fuse.t_pair", anchor="erf", example={"x": T(5, 7), "y": T(5, 7)})
    def pair(x, y):
        s = x.sin()
        return s, s * y.erf()

    def tangled(x):
        s = x.sin()
        return s, s * (s + 1).erf()

    x = torch.randn(3, 4)
    result, report = rewritten_by([pair], tangled, x)
    torch.testing.assert_close(result, tangled(x))
    assert report.counts["t_pair"] == 0 and "computed from an output" in report.misses[0].found

    def fine(x, y):
        s = x.sin()
        early = s.cos()  # reads the first output before the second's input exists
        return early, s, s * (y + 1).erf()

    y = torch.randn(3, 4)
    result, report = rewritten_by([pair], fine, x, y)
    torch.testing.assert_close(result, fine(x, y))
    assert report.counts["t_pair"] == 1


# -- near misses


def test_a_near_miss_says_what_was_expected_and_where(rewritten_by):
    def f(x, bias):
        s = x.sigmoid()
        i = (s + bias).topk(3).indices
        g = s.gather(-1, i)
        return i, g / (g.amax(-1, keepdim=True) + 1e-20) * 1.5  # not the sum

    _, report = rewritten_by([route], f, torch.randn(6, 10), torch.randn(10))
    (miss,) = report.misses
    assert miss.rule == "fuse.t_route/route" and miss.anchor == "aten.topk"
    assert (miss.expected, miss.found) == ("a use by aten.sum", "aten.amax, aten.div")
    assert "test_match.py" in miss.where and 0.5 <= miss.progress < 1


def test_a_check_gives_the_reason(rewritten_by):
    reluctant = rule(
        t_route, name="fuse.t_route", anchor="topk", example={"logits": T(5, 11), "bias": T(11), "k": 7},
        check=lambda m: m.arguments["k"] > 5 or f"k = {m.arguments['k']} is too few",
    )(route_body_rule)  # fmt: skip
    _, report = rewritten_by([reluctant], spelled, torch.randn(6, 10), torch.randn(10))
    assert report.counts["t_route"] == 0 and report.misses[0].found == "k = 3 is too few"


# -- precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_casts_around_a_block_belong_to_it(rewritten, dtype):
    def f(x):
        y = x if dtype == torch.float64 else x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + EPS) * W).to(x.dtype) + 1

    x = torch.randn(2, 3, 8, dtype=dtype)
    result, report = rewritten(f, x)
    torch.testing.assert_close(result, f(x), rtol=1e-6 if dtype != torch.bfloat16 else 8e-3, atol=0)
    assert report.rules["raise.rms_norm"] == 1 and result.dtype == dtype


def test_a_result_used_unrounded_is_not_rounded(rewritten):
    def f(x):
        y = x.float()
        n = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + EPS) * W
        return n.to(x.dtype), n

    x = torch.randn(64, 8).bfloat16()
    (rounded, exact), report = rewritten(f, x)
    torch.testing.assert_close(exact, f(x)[1], rtol=1e-6, atol=1e-7)
    assert report.rules["raise.rms_norm"] == 1 and rounded.dtype == torch.bfloat16


# -- symbolic sizes


def test_symbolic_sizes_are_not_specialised(rewritten_by):
    from dsv4_compile.backend import build
    from dsv4_compile.config import Config
    from dsv4_compile.lowerings import OPS
    from dsv4_compile.passes import PassManager
    from dsv4_compile.patterns import RULES

    managers = []

    def backend(gm, inputs):
        managers.append(PassManager(Config(inner="eager", strict=True), (*RULES, route), (*OPS, t_route)))
        return build(gm, inputs, managers[-1])

    def f(x, bias):
        y = F.rms_norm(x, (10,), bias, EPS)
        return spelled(torch.softmax(y.view(-1, 10), -1), bias)

    compiled = torch.compile(f, backend=backend, fullgraph=True)
    bias = torch.rand(10)
    for n in (4, 6, 9, 16):
        x = torch.randn(2, n, 10)
        torch._dynamo.mark_dynamic(x, 1)
        torch.testing.assert_close(compiled(x, bias)[1], f(x, bias)[1])
    (manager,) = managers
    assert (
        manager.report.rules["raise.rms_norm"]
        == manager.report.rules["raise.softmax"]
        == manager.report.counts["t_route"]
        == 1
    )


# -- finders


@op("dsv4::t_chain")
def t_chain(x: Tensor, steps: int) -> Tensor:
    """sin of x, `steps` times."""
    for _ in range(steps):
        x = x.sin()
    return x


@finder(t_chain, name="raise.t_chain", anchor="sin")
def chain(node):
    if any(head(u) == "aten.sin" for u in node.users):
        return None  # not the last
    nodes = [node]
    while head(below := strip(term(nodes[-1]).operands[0])) == "aten.sin":
        nodes.append(below)
    if len(nodes) < 3:
        return f"a chain of {len(nodes)} is not worth it"
    return Found({"x": term(nodes[-1]).operands[0], "steps": len(nodes)}, [node], nodes)


@pytest.mark.parametrize("steps", [3, 6])
def test_a_finder_walks_chains_of_any_length(rewritten_by, steps):
    def f(x):
        for _ in range(steps):
            x = x.sin()
        return x + 1

    x = torch.randn(3, 4)
    result, report = rewritten_by([chain], f, x)
    torch.testing.assert_close(result, f(x))
    assert report.rules["raise.t_chain"] == 1 and report.runs == {("t_chain", "inlined: no implementation"): 1}


def test_a_finder_may_say_why_not(rewritten_by):
    _, report = rewritten_by([chain], lambda x: x.sin().sin() * 2, torch.randn(3))
    assert [m.expected for m in report.misses] == ["a chain of 2 is not worth it"]


# -- declarations


def test_a_rule_that_cannot_be_traced_is_named(rewritten_by):
    @rule(t_chain, name="raise.t_chain", anchor="sin", example={"x": T(3, 4), "steps": 5})
    def broken(x, steps: Int):
        return x.sin() @ x

    with pytest.raises(Exception, match=r"broken cannot be traced with .*T\(shape=\(3, 4\)"):
        rewritten_by([broken], lambda x: x.sin(), torch.randn(3))


def test_an_example_must_name_the_parameters():
    with pytest.raises(BadRule, match=r"parameters \['x'\], example \['y'\]"):
        rule(t_chain, name="raise.t_chain", anchor="sin", example={"y": T(3)})(lambda x: x.sin())
