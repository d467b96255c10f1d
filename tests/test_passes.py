"""The pipeline: what it keeps, what it reports, and how a failing rule ends."""

import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv4_compile.config import Config
from dsv4_compile.errors import BrokenGraph, DSV4Warning, LoweringFailed
from dsv4_compile.graphs.canonical import canonicalise
from dsv4_compile.graphs.graph import aten, call, sort, verify
from dsv4_compile.match import T, rule
from dsv4_compile.op import at_least, op
from dsv4_compile.passes import PassManager
from dsv4_compile.patterns import RULES, norm


class Layer(nn.Module):
    """Writes a cache that is an argument, as the reference model does."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.rand(8) + 0.5, requires_grad=False)
        self.matrix = nn.Parameter(torch.randn(8, 8), requires_grad=False)

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor, kv: Tensor, position: Tensor) -> Tensor:
        h = F.rms_norm(x, (8,), self.weight, 1e-6) @ self.matrix
        kv.index_copy_(0, position, h)
        y = torch.softmax(h @ kv.t(), -1) @ kv
        return x + (y if self.kind == "a" else F.silu(y))


class Stack(nn.Module):
    def __init__(self, kinds: str):
        super().__init__()
        self.layers = nn.ModuleList(map(Layer, kinds))

    def forward(self, x: Tensor, caches: list[Tensor], position: Tensor) -> Tensor:
        for layer, kv in zip(self.layers, caches, strict=True):
            x = layer(x, kv, position)
        return x


def caches(n):
    return [torch.zeros(16, 8) for _ in range(n)]


@pytest.mark.parametrize("kinds", ["abab", "aab", "ab"])
def test_regions_match_once_and_count_as_often_as_they_are_called(rewritten, kinds):
    model, x, position = Stack(kinds), torch.randn(1, 8), torch.tensor([3])
    ours, theirs = caches(len(kinds)), caches(len(kinds))
    result, report = rewritten(model, x, ours, position)
    torch.testing.assert_close(result, model(x, theirs, position))
    torch.testing.assert_close(ours, theirs)
    assert report.rules["raise.rms_norm"] == report.rules["raise.softmax"] == len(kinds)
    assert report.rules["raise.silu"] == kinds.count("b")
    repeated = [k for k in set(kinds) if kinds.count(k) > 1]
    assert sorted(g.calls for g in report.graphs if g.bodies == {} and g.calls > 1) == [
        kinds.count(k) for k in repeated
    ]
    assert report.runs["softmax", "inlined: no implementation"] == len(kinds)


def test_source_lines_are_those_of_the_model(rewritten):
    _, report = rewritten(Stack("aa"), torch.randn(1, 8), caches(2), torch.tensor([3]))
    places = {s.where for g in report.graphs for s in g.sites}
    lines = enumerate(map(str.strip, Path(__file__).read_text().splitlines()), 1)
    idioms = ("h = F.rms_norm(x", "y = torch.softmax(h @")
    assert places == {f"test_passes.py:{n} {line}" for n, line in lines if line.startswith(idioms)}


def test_a_write_stays_between_the_reads_around_it(rewritten):
    def f(kv, x):
        before = F.rms_norm(kv, (8,), x, 1e-6)
        kv.mul_(2).add_(1)
        return before, F.rms_norm(kv, (8,), x, 1e-6)

    ours, x = torch.randn(4, 8), torch.rand(8)
    theirs = ours.clone()
    result, report = rewritten(f, ours, x)
    torch.testing.assert_close(result, f(theirs, x))
    torch.testing.assert_close(ours, theirs)
    assert report.rules["raise.rms_norm"] == 2


# -- rules that fail


@op("dsv4::t_wrong")
def t_wrong(x: Tensor) -> Tensor:
    """A meaning that breaks on what the pattern matched."""
    raise ValueError("planted")


@rule(t_wrong, name="raise.t_wrong", anchor="tanh", example={"x": T(5, 7)})
def wrong(x):
    return x.tanh() * 2


@op("dsv4::t_smaller")
def t_smaller(x: Tensor) -> Tensor:
    """Not of the shape of what it replaces."""
    return x.tanh()[..., 1:]


@rule(t_smaller, name="raise.t_smaller", anchor="tanh", example={"x": T(5, 7)})
def smaller(x):
    return x.tanh() * 2


def model(x, w):
    return F.rms_norm(x, (8,), w, 1e-6).tanh() * 2


@pytest.mark.parametrize("bad", [wrong, smaller], ids=lambda r: r.label)
def test_a_failing_rule_warns_once_and_leaves_the_graph(rewritten_by, bad):
    x, w = torch.randn(3, 8), torch.rand(8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result, report = rewritten_by([bad, norm.weighted], model, x, w, strict=False)
    torch.testing.assert_close(result, model(x, w))
    (message,) = [str(c.message) for c in caught if c.category is DSV4Warning]
    assert f"rule {bad.qualified} (" in message and "test_passes.py" in message
    assert f"'disable': '{bad.name}'" in message
    assert report.rules["raise.rms_norm"] == 1 and report.rules[bad.name] == 0


@pytest.mark.parametrize("bad", [wrong, smaller], ids=lambda r: r.label)
def test_a_failing_rule_is_an_error_if_strict(rewritten_by, bad):
    with pytest.raises(
        Exception, match=rf"RuleFailed: rule {bad.qualified} \(.*test_passes\.py:\d+\) failed at test_passes"
    ):
        rewritten_by([bad], model, torch.randn(3, 8), torch.rand(8))


# -- toggles


def raises(graph):
    raise ValueError("planted")


def disorders(graph):
    output, (first, *_) = graph.output_node(), [n for n in graph.nodes if n.op == "call_function"]
    output.append(first)  # behind those that read it


def empties(graph):
    for node in reversed(list(graph.nodes)):
        if node.op != "placeholder":
            graph.erase_node(node)
    graph.output(())


HARM = {"planted": raises, "used before it has been defined": disorders, "outputs were": empties}


@pytest.mark.parametrize("said", HARM)
def test_passes_that_fail_leave_the_graph_as_it_was(rewritten_by, monkeypatch, said):
    """Whatever state it is in by then; what they write into at last belongs to the caller."""

    def f(x, w, cache):
        cache.mul_(2)
        return model(x, w) + cache

    x, w, ours = torch.randn(3, 8), torch.rand(8), torch.ones(8)
    monkeypatch.setattr("dsv4_compile.passes.scales_as_bytes", HARM[said])
    with pytest.warns(DSV4Warning, match=f"the dsv4 passes failed: .*{said}.* The graph stays as it was"):
        result, report = rewritten_by([norm.weighted], f, x, w, ours, strict=False)
    torch.testing.assert_close(result, model(x, w) + 2)
    torch.testing.assert_close(ours, torch.full((8,), 2.0))
    assert "the dsv4 passes failed" in str(report) and report.rules["raise.rms_norm"] == 0
    torch._dynamo.reset()
    with pytest.raises(Exception, match=said):
        rewritten_by([norm.weighted], f, x, w, ours, strict=True)


def test_a_disabled_rule_is_neither_tried_nor_applied_to_patterns(rewritten):
    gate, up = torch.randn(4, 6), torch.randn(4, 6)
    f = lambda g, u: F.silu(g.clamp(max=2.0)) * u.clamp(-2.0, 2.0)  # noqa: E731
    _, report = rewritten(f, gate, up)
    assert (report.rules["raise.silu"], report.rules["raise.swiglu"]) == (1, 1)
    _, report = rewritten(f, gate, up, disable="raise.silu")
    assert (report.rules["raise.silu"], report.rules["raise.swiglu"]) == (0, 0)
    _, report = rewritten(f, gate, up, passes="raise.s*", disable="*.swiglu")
    assert (report.rules["raise.silu"], report.rules["raise.swiglu"]) == (1, 0)


def test_rules_are_named_and_say_where_they_stand():
    assert len({r.qualified for r in RULES}) == len(RULES)
    assert [r.name for r in RULES if r.name.split(".")[0] not in ("raise", "fuse")] == []
    assert [r.source for r in RULES if not re.fullmatch(r"patterns/\w+\.py:\d+", r.source)] == []


# -- lowering


@op("dsv4::t_lowered")
def t_lowered(x: Tensor) -> Tensor:
    """2 tanh(x)."""
    return x.tanh() * 2


@t_lowered.on("cpu", when=lambda a: a.x.shape[-1] == 8 or "only 8 columns")
def _(x):
    return torch.full_like(x, 7.0)


@rule(t_lowered, name="raise.t_lowered", anchor="tanh", example={"x": T(5, 7)})
def lowered(x):
    return x.tanh() * 2


def test_who_accepts_runs_it_else_it_is_inlined_with_the_reason(rewritten_by):
    f = lambda x: x.tanh() * 2  # noqa: E731
    result, report = rewritten_by([lowered], f, torch.randn(3, 8))
    assert (result == 7).all() and report.runs == {("t_lowered", "cpu"): 1}
    x = torch.randn(3, 9)
    result, report = rewritten_by([lowered], f, x)
    torch.testing.assert_close(result, f(x))
    assert report.runs == {("t_lowered", "inlined: cpu: only 8 columns"): 1}
    x = torch.randn(3, 8)
    result, report = rewritten_by([lowered], f, x, lowerings=())
    torch.testing.assert_close(result, f(x))
    assert report.runs == {("t_lowered", "inlined: no implementation"): 1}


@op("dsv4::t_worth")
def t_worth(x: Tensor) -> Tensor:
    """4 tanh(x)."""
    return x.tanh() * 4


@t_worth.on("cpu", worth=at_least(6, rows=lambda a: a.x.shape[0]))
def _(x):
    return torch.full_like(x, 7.0)


@rule(t_worth, name="raise.t_worth", anchor="tanh", example={"x": T(5, 7)})
def worth(x):
    return x.tanh() * 4


def test_where_the_meaning_is_as_fast_it_is_inlined_unless_a_device_was_named(rewritten_by):
    f = lambda x: x.tanh() * 4  # noqa: E731
    few, many = torch.randn(5, 3), torch.randn(6, 3)
    result, report = rewritten_by([worth], f, few, lowerings=("*",))
    torch.testing.assert_close(result, f(few))
    assert report.runs == {("t_worth", "inlined: cpu: fewer than 6 rows"): 1}
    for x, lowerings in ((many, ("*",)), (few, ("cpu",))):
        result, report = rewritten_by([worth], f, x, lowerings=lowerings)
        assert (result == 7).all() and report.runs == {("t_worth", "cpu"): 1}
    assert (t_worth(few) == 7).all()  # a call asks nothing


@op("dsv4::t_unsure")
def t_unsure(x: Tensor) -> Tensor:
    """3 tanh(x)."""
    return x.tanh() * 3


@t_unsure.on("cpu", when=lambda a: a.nothing)
def _(x):
    raise AssertionError("never asked")


@rule(t_unsure, name="raise.t_unsure", anchor="tanh", example={"x": T(5, 7)})
def unsure(x):
    return x.tanh() * 3


def test_a_checker_that_raises_is_told():
    f = lambda x: x.tanh() * 3  # noqa: E731
    graph = traced(f, torch.randn(3, 4))
    with pytest.raises(LoweringFailed, match=r"lowering dsv4::t_unsure at .* failed: AttributeError: .*nothing"):
        PassManager(Config(strict=True), (unsure,), (t_unsure,))(graph)
    graph = traced(f, torch.randn(3, 4))
    with pytest.warns(DSV4Warning, match="stays in the graph"):
        PassManager(Config(), (unsure,), (t_unsure,))(graph)
    assert [str(n.target) for n in graph.nodes if n.op == "call_function"] == ["dsv4.t_unsure.default"]


@op("dsv4::t_turned", outputs=("a", "b"))
def t_turned(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two outputs, the first not contiguous as the meaning makes it."""
    y = x.tanh()
    return y.mT * 2, y + 1


@rule(t_turned, name="raise.t_turned", anchor="tanh", example={"x": T(5, 7)})
def turned(x):
    y = x.tanh()
    return y.mT * 2, y + 1


def test_what_is_inlined_is_contiguous_for_those_who_view_it(rewritten_by):
    def f(x):
        y = x.tanh()
        return (y.mT * 2).reshape(-1), (y + 1).view(-1)

    x = torch.randn(3, 4)
    result, report = rewritten_by([turned], f, x)
    torch.testing.assert_close(result, f(x))
    assert report.rules["raise.t_turned"] == 1


# -- the graph room


def traced(f, *inputs):
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(f, tracing_mode="fake")(*inputs).graph


def targets(graph):
    return [str(n.target).removeprefix("aten.") for n in graph.nodes if n.op == "call_function"]


def test_canonical_form_merges_equals_and_drops_nothings():
    def f(x):
        a, b = x.sin() * x.sin(), x.sin()
        return a.view(2, 3).add(b.expand(2, 3) * 1.0) + x.to(torch.float32)

    graph = traced(f, torch.randn(2, 3))
    canonicalise(graph)
    graph.eliminate_dead_code()
    assert targets(graph) == ["sin.default", "pow.Tensor_Scalar", "add.Tensor", "add.Tensor"]


def test_canonical_form_keeps_storages_and_random_numbers_apart():
    def f(x):
        return x.sin(), x.sin(), x.clone(), torch.rand_like(x) + torch.rand_like(x), x * 1.0

    graph = traced(f, torch.randn(2, 3))
    before = targets(graph)
    canonicalise(graph)
    assert targets(graph) == [
        "clone.default" if t == "mul.Tensor" else t for t in before
    ]  # 1 x is x, in storage of its own


def test_sort_restores_the_order_and_moves_little():
    graph = traced(lambda x: (x.sin().cos().tanh(), x.exp()), torch.randn(2))
    sin, cos, tanh, exp = (n for n in graph.nodes if n.op == "call_function")
    tanh.append(sin)
    with pytest.raises(BrokenGraph, match=r"after testing: .*used before"):
        verify(graph, "testing")
    sort(graph)
    verify(graph, "testing")
    assert [n for n in graph.nodes if n.op == "call_function"] == [sin, cos, tanh, exp]


def test_verify_wants_fake_values():
    graph = traced(lambda x: x.sin(), torch.randn(2))
    (sin,) = (n for n in graph.nodes if n.op == "call_function")
    with graph.inserting_after(sin):
        cos = call(graph, aten.cos.default, (sin,), sin)
    sin.replace_all_uses_with(cos, delete_user_cb=lambda u: u is not cos)
    verify(graph, "testing")
    del cos.meta["val"]
    with pytest.raises(BrokenGraph, match=r"after testing: node cos.* has no fake value"):
        verify(graph, "testing")
