"""The backend as users meet it: by name, with and without a C++ compiler, with gradients, through the caches."""

import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from dsv4_compile import explain, reports
from dsv4_compile.errors import DSV4Warning
from dsv4_compile.reference_model.schedule import CSA, HCA, SWA
from dsv4_compile.reporting.sites import expected

needs_cxx = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="Inductor needs a C++ compiler"
)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(8)
        self.linear = nn.Linear(8, 8)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        self.seen.add_(1)
        return torch.softmax(self.linear(self.norm(x)), -1)


def compiled(f, **options):
    return torch.compile(f, backend="dsv4", fullgraph=True, options={"inner": "eager", "strict": True} | options)


def test_the_backend_is_known_by_name():
    assert "dsv4" in torch._dynamo.list_backends()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_rewrites_without_gradients(context):
    model, x = Block(), torch.randn(2, 8)
    with context():
        torch.testing.assert_close(compiled(model)(x), model(x))
    assert reports()[-1].rules["raise.rms_norm"] == reports()[-1].rules["raise.softmax"] == 1


def test_it_rewrites_with_frozen_parameters_and_gradients_on():
    model, x = Block().requires_grad_(False), torch.randn(2, 8)
    torch.testing.assert_close(compiled(model)(x), model(x))
    assert reports()[-1].rules["raise.rms_norm"] == 1


def test_with_gradients_it_warns_once_and_the_gradients_are_right():
    model, x = Block(), torch.randn(2, 8)
    (want,) = torch.autograd.grad(model(x).square().sum(), [model.norm.weight])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (got,) = torch.autograd.grad(compiled(model)(x).square().sum(), [model.norm.weight])
    torch.testing.assert_close(got, want)
    (message,) = [str(c.message) for c in caught if c.category is DSV4Warning]
    assert "torch.inference_mode()" in message and "requires_grad_(False)" in message
    assert "no rewrites: the graph needs gradients" in str(reports()[-1]) and not reports()[-1].graphs


@pytest.mark.parametrize(
    ("options", "message"),
    [({"disabel": "x"}, "did you mean 'disable'"), ({"disable": "raise.softmx"}, "did you mean 'raise.softmax'")],
)
def test_a_mistyped_option_reaches_the_user(options, message):
    with torch.no_grad(), pytest.raises(Exception, match=message):
        compiled(Block(), **options)(torch.randn(2, 8))


def test_a_mode_is_a_preset(capsys):
    with torch.no_grad():
        torch.compile(Block(), backend="dsv4", mode="debug")(torch.randn(2, 8))
    assert "raise.rms_norm/weighted" in capsys.readouterr().err
    with torch.no_grad(), pytest.raises(Exception, match="unknown mode 'debugg'; did you mean 'debug'"):
        torch._dynamo.reset()
        torch.compile(Block(), backend="dsv4", mode="debugg")(torch.randn(2, 8))


def test_a_variable_is_an_option(monkeypatch):
    monkeypatch.setenv("DSV4_DISABLE", "raise.softmax")
    with torch.no_grad():
        compiled(Block())(torch.randn(2, 8))
    assert reports()[-1].rules["raise.softmax"] == 0 and reports()[-1].rules["raise.rms_norm"] == 1


# -- no compiler


@pytest.fixture
def no_compiler():
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        yield


def test_without_a_compiler_the_graph_runs_op_by_op_and_says_so(no_compiler):
    model, x = Block().requires_grad_(False), torch.randn(2, 8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = torch.compile(model, backend="dsv4")(x)
    torch.testing.assert_close(result, model(x))
    (message,) = [str(c.message) for c in caught if c.category is DSV4Warning]
    assert "no-such-compiler" in message and "DSV4_INNER=eager" in message
    assert reports()[-1].rules["raise.rms_norm"] == 1


def test_without_a_compiler_inductor_by_name_is_an_error(no_compiler):
    with torch.no_grad(), pytest.raises(Exception, match=r"NoCompiler: .*no-such-compiler.*'inner': 'eager'"):
        compiled(Block(), inner="inductor")(torch.randn(2, 8))


# -- Inductor, caches


@pytest.mark.parametrize("dynamic", [False, True])
def test_op_by_op_no_prim_runs(dynamic):
    """Around each of them torch runs 0.1 ms of Python. One that counts from elsewhere than zero is left as it is."""

    def from_zero(x):
        return (x * 2).to(torch.bfloat16).sum(-1), torch.arange(x.shape[0])

    def from_elsewhere(x):
        return x + torch.arange(3, 6), torch.arange(2, 2 + 3 * x.shape[0], 3)

    for f in (from_zero, from_elsewhere):
        run = torch.compile(f, backend="dsv4", dynamic=dynamic, options={"inner": "eager"})
        for length in (5, 7):
            x = torch.randn(length, 3)
            run(x)
            with torch.profiler.profile() as profile:
                found = run(x)
            torch.testing.assert_close(found, f(x))
            assert f is from_elsewhere or not any(event.name.startswith("prims::") for event in profile.events())


@needs_cxx
def test_inductor_and_its_caches_follow_the_configuration():
    model, x = Block().requires_grad_(False), torch.randn(2, 8)

    def go(**options):
        torch._dynamo.reset()
        counters.clear()
        result = torch.compile(model, backend="dsv4", options={"inner": "inductor"} | options)(x)
        torch.testing.assert_close(result, model(x))
        return (
            counters["inductor"]["fxgraph_cache_miss"],
            counters["inductor"]["fxgraph_cache_hit"],
            len(reports()[-1].graphs),
        )

    with fresh_cache():
        assert go() == (1, 0, 1)
        first = reports()[-1]
        assert go() == (0, 1, 1) and "loaded from cache" in str(reports()[-1])
        assert reports()[-1].stored and not first.stored
        assert reports()[-1].rules == first.rules and reports()[-1].runs == first.runs
        assert go(disable="raise.softmax") == (1, 0, 1)
        assert go(disable="raise.softmax", explain=True)[2] == 1  # explain goes past the caches


# -- reports


def test_two_models_and_two_graphs_have_their_own_reports(rewritten):
    with torch.no_grad():
        f = compiled(Block())
        f(torch.randn(2, 8))
        g = compiled(lambda x: F.silu(x))
        g(torch.randn(4))
        f(torch.randn(2, 3, 8))
    first, second, third = (r.rules for r in reports()[-3:])
    assert first["raise.rms_norm"] == third["raise.rms_norm"] == 1 and second["raise.rms_norm"] == 0
    assert second["raise.silu"] == 1


def test_explain_reads_and_changes_nothing():
    model = Block()
    state = [torch.zeros(2, 8)]

    def forward(x, state):
        state[0].add_(x)
        return model(state[0])

    report = explain(forward, torch.randn(2, 8), state)
    assert state[0].abs().sum() == 0 and report.rules["raise.rms_norm"] == 1
    report = explain(model, torch.randn(2, 8))
    assert (
        model.seen.item() == 1 and report.sites == {} and report.rules["raise.softmax"] == 1
    )  # forward ran on a copy of x
    text = str(report)
    assert "raise.softmax/last_axis" in text and "test_backend.py" in text and "inlined: no implementation" in text


def test_explain_sees_all_graphs_of_a_broken_one():
    def f(x):
        y = F.silu(x)
        torch._dynamo.graph_break()
        return F.silu(y * 2)

    report = explain(f, torch.randn(4))
    assert len(report.graphs) == 2 and report.rules["raise.silu"] == 2


def test_explain_works_any_number_of_times():
    for _ in range(12):  # Dynamo gives up on a function after 8 compiles
        assert len(explain(F.silu, torch.randn(4)).graphs) == 1


def test_sites_come_from_the_schedule():
    kinds = [SWA, CSA, HCA, SWA]
    model = Block()
    model.config = SimpleNamespace(layer_types=kinds, hc_mult=4)
    in_layers = {"attention": 4, "moe": 4, "router": 4, "compressor": 3, "indexer": 1, "mhc": 17, "mhc_boundary": 8}
    assert expected(model) == in_layers | {"head": 1, "prologue": 8, "epilogue": 4, "output_projection": 4}
    assert expected(model, mtp=True)["mtp"] == 1 and expected(model, mtp=True)["moe"] == expected(model)["moe"] + 1
    assert expected(Block()) == {}
