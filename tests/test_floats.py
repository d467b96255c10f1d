"""Floats of modules under dynamic=True: constants that are guarded, also inside regions; a caller's own are inputs."""

from functools import partial

import pytest
import torch
from torch import nn

from dsv4_compile.backend import backend
from dsv4_compile.errors import DSV4Warning


class Layer(nn.Module):
    """A formula with a number of the module in it, and one that is computed from it."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps

    @torch.compiler.nested_compile_region
    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) + self.eps * 3


class Stack(nn.Module):
    def __init__(self, *eps: float):
        super().__init__()
        self.layers = nn.ModuleList(map(Layer, eps))
        self.scale = 2.5

    def forward(self, x, shift=None):
        for layer in self.layers:
            x = layer(x)
        return x * self.scale if shift is None else x * self.scale + shift


def compiled(model, reports):
    how = partial(backend, options={"inner": "eager"}, observe=reports.append)
    return torch.compile(model, backend=how, dynamic=True, fullgraph=True)


def close(got, want):
    torch.testing.assert_close(got, want)


def test_regions_share_a_body_with_the_number_in_it():
    model, reports = Stack(1e-6, 1e-6, 1e-6), []
    run = compiled(model, reports)
    for size in (7, 9, 11):
        x = torch.randn(4, size)
        close(run(x), model(x))
    (report,) = reports  # one trace
    assert report.rules["raise.unit_norm"] == 3 and not report.hint and len(report.graphs) > 1
    model.layers[1].eps = model.scale = 0.5  # guarded
    close(run(x), model(x))
    assert len(reports) == 2 and reports[1].rules["raise.unit_norm"] == 3


@pytest.mark.parametrize("eps", [(1e-6, 1e-5, 1e-6), (1e-6, 1e-6)], ids=["another number", "a caller's"])
def test_where_torch_has_no_regions_with_floats_they_are_written_out(eps):
    model, reports = Stack(*eps), []
    run = compiled(model, reports)
    for shift in (2.5, 0.25):
        x = torch.randn(4, 7)
        close(run(x, shift), model(x, shift))
    assert all(r.rules["raise.unit_norm"] == len(eps) for r in reports)


@pytest.mark.parametrize("eps", [(), (1e-6, 1e-6)], ids=["no regions", "regions"])
def test_a_graph_that_needs_gradients_is_traced_once_too(eps):
    model, x = Stack(*eps), torch.randn(4, 7, requires_grad=True)
    with pytest.warns(DSV4Warning) as caught:
        (got,) = torch.autograd.grad(compiled(model, [])(x).square().sum(), [x])
    (want,) = torch.autograd.grad(model(x).square().sum(), [x])
    close(got, want)
    assert sum(w.category is DSV4Warning for w in caught) == 1


def test_a_float_that_is_a_result_stays_one():
    class Told(Stack):
        def forward(self, x):
            return super().forward(x), self.scale * 2

    model, reports = Told(1e-6), []
    x = torch.randn(4, 7)
    got, want = compiled(model, reports)(x), model(x)
    close(got[0], want[0])
    assert got[1] == want[1] == 5.0 and reports[0].rules["raise.unit_norm"] == 1
