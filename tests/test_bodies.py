"""Graphs taken apart: a body that several layers share is compiled once, and the result is what it was."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dsv4_compile.bodies
from dsv4_compile.backend import backend
from dsv4_compile.bodies import taken_apart


class Layer(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.w = nn.Parameter(torch.randn(width, width) / width**0.5)

    @torch.compiler.nested_compile_region
    def forward(self, x, memory):
        memory.mul_(0.5).add_(x.mean(0))
        return F.silu(x @ self.w) * memory


class Stack(nn.Module):
    """Layers with a memory each, between something before and something after."""

    def __init__(self, layers: int, width: int = 6):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))

    def forward(self, x, memories, clock):
        x = x * clock
        for layer, memory in zip(self.layers, memories, strict=True):
            x = layer(x, memory)
        clock.add_(1)  # after the layers have read it
        return torch.softmax(x, -1)


class Busy(Stack):
    """Something else is computed between any two layers."""

    def forward(self, x, memories, clock):
        for i, (layer, memory) in enumerate(zip(self.layers, memories, strict=True)):
            x = layer(x + i, memory).sin()
        return x


def graph_of(model, *args):
    """Dynamo's graph with its inputs."""
    held = []

    def keep(gm, inputs):
        held.append((gm, inputs))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=keep, fullgraph=True)(*args)
    return held[0]


def inputs_for(model, rows=3, width=6):
    torch.manual_seed(1)
    return torch.randn(rows, width), [torch.randn(width) for _ in model.layers], torch.ones(1)


def test_layers_become_calls_of_one_body():
    model = Stack(4)
    parts = taken_apart(*graph_of(model, *inputs_for(model)))
    assert {name: len(piece.calls) for name, piece in parts.pieces.items()} == {"piece_0": 0, "body_0": 4, "piece_2": 0}
    called = [n.target for n in parts.driver.graph.nodes if getattr(n.target, "__name__", "") == "body_0"]
    assert len(called) == 4


@pytest.mark.parametrize("model", [Stack(1), Busy(5)], ids=["one layer", "work between layers"])
def test_nothing_to_gain_leaves_the_graph_whole(model):
    assert taken_apart(*graph_of(model, *inputs_for(model))) is None


def test_calls_whose_operands_alias_otherwise_share_no_body():
    """A body compiled for two operands of one storage is wrong for operands that are apart, if it writes to them."""
    gm = torch.fx.GraphModule({"body": nn.Identity()}, torch.fx.Graph())
    base, other = torch.zeros(6), torch.zeros(3)
    views = {"a": base[:3], "b": base[3:], "c": other, "d": torch.zeros(3)}
    places = {name: gm.graph.placeholder(name) for name in views}
    for name, place in places.items():
        place.meta["example_value"] = views[name]
    calls = []
    for operands in ("ab", "ab", "cd", "dc", "aa", "ba"):
        body = gm.graph.get_attr("body")
        args = body, "body", *(places[o] for o in operands)
        calls.append(gm.graph.call_function(torch.ops.higher_order.invoke_subgraph, args))
    names = ["body_0", "body_0", "body_1", "body_1", None, None]
    assert [dsv4_compile.bodies.shared(gm).get(call) for call in calls] == names


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_the_result_and_the_memories_are_eagers(inner):
    model, reports = Stack(3), []
    ours, theirs = inputs_for(model), inputs_for(model)
    torch._dynamo.reset()
    compiled = torch.compile(
        model, backend=partial(backend, options={"inner": inner}, observe=reports.append), fullgraph=True
    )
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(compiled(*ours), model(*theirs))
            torch.testing.assert_close(ours, theirs)
    (report,) = reports
    assert sorted(g.calls for g in report.graphs) == [1, 1, 3]
    assert report.rules["raise.softmax"] == 1 and report.rules["raise.silu"] == 3


def test_lengths_that_vary_stay_one_graph():
    model, reports = Stack(3), []
    torch._dynamo.reset()
    compiled = torch.compile(
        model, backend=partial(backend, options={"inner": "eager"}, observe=reports.append), fullgraph=True
    )
    for rows in (5, 9, 17):
        x, memories, clock = inputs_for(model, rows)
        again = inputs_for(model, rows)
        torch._dynamo.mark_dynamic(x, 0)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x, memories, clock), model(*again))
    assert len(reports) == 1 and max(g.calls for g in reports[0].graphs) == 3
