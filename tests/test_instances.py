"""Region bodies written out: every rewrite belongs to a layer, and the option `sites` chooses among them."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv4_compile.graphs.instances import inline_regions


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x, -1)


class Layer(nn.Module):
    """Writes a cache, holds a module of its own, and another region."""

    def __init__(self):
        super().__init__()
        self.inner = Inner()
        self.weight = nn.Parameter(torch.rand(8) + 0.5, requires_grad=False)

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
        h = F.rms_norm(x, (8,), self.weight, 1e-6)
        kv.add_(h)
        return x + self.inner(kv), F.silu(gated(h))


@torch.compiler.nested_compile_region
def gated(x: Tensor) -> Tensor:
    return F.silu(x) * 2


class Stack(nn.Module):
    def __init__(self, layers: int = 3):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, x: Tensor, caches: list[Tensor]) -> Tensor:
        for layer, kv in zip(self.layers, caches, strict=True):
            x, y = layer(x, kv)
            x = x + y
        return x


def inputs() -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(1)
    return torch.randn(4, 8), [torch.zeros(4, 8) for _ in range(3)]


def run(rewritten, **options):
    model, ours, theirs = Stack(), inputs(), inputs()
    with torch.no_grad():
        result, report = rewritten(model, *ours, **options)
        torch.testing.assert_close(result, model(*theirs))
    torch.testing.assert_close(ours[1], theirs[1])
    return report


def test_without_regions_each_layer_has_sites_of_its_own(rewritten):
    report = run(rewritten, regions=False)
    (graph,) = report.graphs
    assert len({s.id for s in graph.sites}) == len(graph.sites) == 3 * 4
    norms = [s.layer for s in graph.sites if s.fusion == "raise.rms_norm"]
    assert norms == ["layers.0", "layers.1", "layers.2"]
    assert [s.layer for s in graph.sites if s.fusion == "raise.softmax"] == [f"layers.{i}.inner" for i in range(3)]
    assert {s.where for s in graph.sites if s.fusion == "raise.softmax"} == {
        s.where for g in run(rewritten).graphs for s in g.sites if s.fusion == "raise.softmax"
    }


def test_with_regions_the_counts_are_the_same(rewritten):
    assert run(rewritten).rules == run(rewritten, regions=False).rules


def test_sites_select_by_id_and_glob_and_ids_do_not_move(rewritten):
    everything = [s.id for s in run(rewritten, regions=False).graphs[0].sites]
    second = next(i for i in everything if i.startswith("raise.softmax") and "layers.1." in i)
    assert [s.id for s in run(rewritten, regions=False, sites=[second]).graphs[0].sites] == [second]
    some = [s.id for s in run(rewritten, regions=False, sites="raise.s*@layers.2*").graphs[0].sites]
    assert some == [i for i in everything if "layers.2" in i and "rms_norm" not in i]
    assert run(rewritten, regions=False, sites="none").graphs[0].sites == []


def test_what_a_larger_match_takes_up_is_known(rewritten):
    f = lambda g, u: F.silu(g.clamp(max=2.0)) * u.clamp(-2.0, 2.0)  # noqa: E731
    _, report = rewritten(f, torch.randn(4, 6), torch.randn(4, 6))
    silu, swiglu = report.graphs[0].sites
    assert swiglu.absorbs == (silu.id,) and silu.absorbs == ()


def test_nothing_is_left_of_the_bodies():
    kept = []

    def backend(gm, example_inputs):
        inline_regions(gm)
        kept.append(gm)
        return gm.forward

    with torch.no_grad():
        torch.compile(Stack(), backend=backend, fullgraph=True)(*inputs())
    (gm,) = kept
    assert not list(gm.children()) and not any("subgraph" in str(n.target) for n in gm.graph.nodes)


@pytest.mark.parametrize("value", ["0", "false"])
def test_the_variable(rewritten, monkeypatch, value):
    monkeypatch.setenv("DSV4_REGIONS", value)
    assert len(run(rewritten).graphs) == 1
