"""bisect: the search within its bound, what it names and says, the script that it writes, and the command line."""

import math
import runpy
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

import dsv4_compile
from dsv4_compile.accuracy import metrics
from dsv4_compile.accuracy.bisect import Hunt
from dsv4_compile.accuracy.capture import Captured
from dsv4_compile.accuracy.torch_bisect import torch_bisect
from dsv4_compile.commands import cli
from dsv4_compile.config import Config
from dsv4_compile.errors import AlreadyWrong, NotForAScript, TracedAgain, UnknownName
from dsv4_compile.lowerings import OPS
from dsv4_compile.passes import PassManager
from dsv4_compile.patterns import RULES, norm
from dsv4_compile.reference_model.schedule import SWA
from dsv4_compile.reporting.report import GraphReport, Report, Site

# The search, on paper


class Paper(Hunt):
    """A search over numbered rewrites that are wrong in given groups: each whole group that is made costs 1."""

    def __init__(self, count: int, groups: list[set[int]], takes: dict[int, int], budget: int = 10_000):
        self.config, self.compiles, self.budget, self.known, self.sites = Config(), 0, budget, {}, []
        self.told = []
        self.tell = self.told.append
        self.groups = [{str(i) for i in g} for g in groups]
        self.all = [
            Site("rule", "rule", "op", "here", "layer", id=str(i), absorbs=(str(takes[i]),) if i in takes else ())
            for i in range(count)
        ]

    def compile(self, sites):
        self.charge()
        wanted = {s.id for s in self.all} if sites == ("*",) else set(sites)
        made: set[str] = set()
        for site in self.all:
            if site.id in wanted and set(site.absorbs) <= made:
                made.add(site.id)
        value = float(sum(g <= made for g in self.groups))
        return value, Report([GraphReport(sites=[s for s in self.all if s.id in made])])


@st.composite
def papers(draw):
    count = draw(st.integers(2, 120))
    numbers = draw(st.lists(st.integers(0, count - 1), unique=True, min_size=1, max_size=min(8, count)))
    groups, rest = [], numbers
    while rest:
        size = draw(st.integers(1, min(3, len(rest))))
        groups.append(set(rest[:size]))
        rest = rest[size:]
    takes = {i: draw(st.integers(0, i - 1)) for i in range(1, count) if draw(st.integers(0, 9)) == 0}
    return count, groups, {i: j for i, j in takes.items() if i not in numbers and j not in numbers}


@settings(max_examples=300, deadline=None)
@given(papers())
def test_the_search_finds_all_groups_within_the_bound(paper):
    count, groups, takes = paper
    found = Paper(count, groups, takes).run("paper", 0.5)
    assert sorted(sorted(int(s.id) for s in g.sites) for g in found.guilty) == sorted(map(sorted, groups))
    assert found.rest == 0 and not found.spent
    k, members = sum(map(len, groups)), sum(len(g) for g in groups if len(g) > 1)
    assert found.compiles <= k * (math.ceil(math.log2(count)) + 2) + 2 + members


def test_a_wrong_part_takes_what_is_made_of_it_along():
    paper = Paper(6, [{1}, {4}], {3: 1, 5: 3})
    found = paper.run("paper", 0.5)
    assert len(paper.told) == 3 and paper.told[1].startswith("rule in layer: 1, without it 1; ")
    assert [[s.id for s in g.sites] for g in found.guilty] == [["1"], ["4"]] and found.rest == 0
    assert found.needed == ("1", "4")
    (only,) = Paper(6, [{3}], {3: 1}).run("paper", 0.5).guilty  # needs 1, which is innocent
    assert [s.id for s in only.sites] == ["3"]


def test_a_spent_budget_is_said():
    found = Paper(64, [{5}, {40}], {}, budget=12).run("paper", 0.5)
    assert found.spent and found.compiles == 12 and [g.sites[0].id for g in found.guilty] == ["5"]
    assert "the budget of 12 compiles is spent" in str(found)


def test_nothing_to_find():
    found = Paper(9, [], {}).run("paper", 0.5)
    assert found.compiles == 2 and found.guilty == [] and "nothing to find" in str(found)


# A model


@contextmanager
def eps(factor: float):
    """RMSNorm gets an eps that is wrong by a factor, wherever it is found."""

    def check(match):
        match.arguments["eps"] *= factor
        return True

    object.__setattr__(norm.weighted, "check", check)
    try:
        yield
    finally:
        object.__setattr__(norm.weighted, "check", None)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    layers = [nn.RMSNorm(8, 1e-6), nn.Linear(8, 8), nn.Softmax(-1), nn.RMSNorm(8, 1e-6), nn.SiLU()]
    return nn.Sequential(*layers).eval().requires_grad_(False)


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def test_it_names_rule_layer_and_line_and_writes_a_script(model, tmp_path):
    def farthest(got, want):  # a metric of the user's, which the script must hold
        return float((got - want).abs().max())

    with eps(1e5):
        found = dsv4_compile.bisect(model, X, metric=farthest, threshold=1e-3, script=tmp_path / "repro.py")
        first, second = (g.sites[0] for g in found.guilty)
        assert (first.rule, first.layer, second.layer) == ("raise.rms_norm/weighted", "0", "3")
        assert found.sites == 4 and found.value > 1e-3 > found.rest and found.compiles <= 2 * 4 + 2
        assert all(g.value == g.contribution[0] > 1e-3 for g in found.guilty)
        assert "options={'disable': 'raise.rms_norm'}" in str(found)
        assert f"in 0 at {first.where}" in str(found) and str(tmp_path / "repro.py") in str(found)
        torch._dynamo.reset()
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(found.script))
        assert ended.value.code == 1
    done = subprocess.run([sys.executable, "-P", str(found.script)], capture_output=True, text=True)
    assert done.returncode == 0 and "nothing to find" in done.stdout, done.stderr


class Local(nn.Module):
    """Stands for a model of the user's main program."""

    __module__ = "__main__"


@pytest.mark.parametrize(
    ("how", "what"),
    [({"metric": lambda got, want: 0.0}, "the metric '<lambda>'"), ({}, "the model's 'Local'")],
    ids=["metric", "model"],
)
def test_what_no_script_could_load_is_said_before_the_search(tmp_path, how, what):
    script = tmp_path / "repro.py"
    with pytest.raises(NotForAScript, match=f"{what} cannot be written into a script"):
        dsv4_compile.bisect(nn.Sequential(Local()), X, script=script, **how)
    assert not script.exists()


def test_a_right_model_costs_two_compiles(model):
    found = dsv4_compile.bisect(model, X)
    assert found.compiles == 2 and not found.guilty and found.value <= found.threshold


@pytest.mark.filterwarnings("ignore:the dsv4 passes failed")
def test_a_rewrite_that_breaks_the_graph_is_guilty(model, monkeypatch):
    lower = PassManager.lower

    def planted(self, graph, report):
        if any(site.fusion == "raise.softmax" for site in report.sites):
            raise ValueError("planted")
        lower(self, graph, report)

    monkeypatch.setattr(PassManager, "lower", planted)
    found = dsv4_compile.bisect(model, X)
    ((guilty,),) = [g.sites for g in found.guilty]
    assert guilty.fusion == "raise.softmax" and found.value == math.inf and found.rest <= found.threshold


def test_metrics(model):
    def largest(got, want):
        return float(got.max() - want.max())

    with eps(1e5):
        for metric in ("logits", "kl", "tokens", largest):
            found = dsv4_compile.bisect(
                model, X, metric=metric, threshold=0.0 if metric == "tokens" else 1e-4, budget=2
            )
            assert found.metric == (metric if isinstance(metric, str) else "largest") and found.compiles == 2
    with pytest.raises(UnknownName, match="unknown metric 'logit'; did you mean 'logits'"):
        dsv4_compile.bisect(model, X, metric="logit")
    ids = torch.tensor([[1, 2, 3]])
    sure = torch.nn.functional.one_hot(torch.tensor([[2, 3, 0]]), 4).float() * 100
    assert metrics.bits(ids)(torch.zeros(1, 3, 4), sure) == pytest.approx(2.0)
    assert metrics.tokens(sure.flip(-1), sure) == 1 and metrics.kl(sure, sure) == 0
    assert metrics.finite(float("nan")) == math.inf


def test_a_model_that_is_wrong_without_us(model):
    class Odd(nn.Module):
        def forward(self, x):
            return x + (1.0 if torch.compiler.is_compiling() else 0.0)

    with pytest.raises(AlreadyWrong, match=r"without any rewrite.*Give a larger threshold"):
        dsv4_compile.bisect(Odd(), X)


def test_a_captured_model_runs_as_often_as_asked_and_says_when_it_cannot():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x, state):
            self.seen.add_(1)
            state.add_(1)
            return torch.softmax(x + state + self.seen, -1)

    counting, state = Counting(), torch.zeros(8)
    captured = Captured(counting, (X, state), {})
    for _ in range(3):
        manager = PassManager(Config(), RULES, OPS)
        torch.testing.assert_close(captured.rewritten(manager), captured.eager())
        assert manager.report.rules["raise.softmax"] == 1
    assert not state.any() and not counting.seen.any() and len(captured.slots) == 1
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"traced a second time.*do not call torch\._dynamo\.reset"):
        captured.rewritten(PassManager(Config(), RULES, OPS))
    assert issubclass(TracedAgain, dsv4_compile.errors.DSV4Error)


# Others


def test_torchs_own_bisector_finds_a_rewrite(model, monkeypatch, capsys):
    from torch._inductor import compiler_bisector

    theirs = compiler_bisector.BACKENDS
    systems = {name: theirs.get(name, []) for name in ("eager", "dsv4", "inductor")}  # a sweep over all takes 20 s
    monkeypatch.setattr(compiler_bisector, "BACKENDS", systems)
    monkeypatch.setenv("DSV4_INNER", "eager")
    want = model(X)

    def test() -> bool:
        torch._dynamo.reset()
        with torch.no_grad():
            return torch.allclose(torch.compile(model, backend="dsv4")(X), want, atol=1e-3)

    with eps(1e5):
        found = torch_bisect(test)
    assert (found.backend, found.subsystem, found.bisect_number) == ("dsv4", "rewrites", 2)
    assert "raise.rms_norm/weighted@0#" in found.debug_info
    assert list(systems) == ["eager", "inductor"] and not compiler_bisector.CompilerBisector.bisection_enabled
    assert test() and "Binary search completed" in capsys.readouterr().out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from dsv4_compile.reference_model import DSV4, DSV4Config, save

    torch.manual_seed(0)
    change = dict(num_hidden_layers=1, layer_types=(SWA,), mlp_layer_types=("moe",))
    config = DSV4Config.tiny().replace(**change, hc_sinkhorn_iters=2, num_nextn_predict_layers=0)
    folder = tmp_path_factory.mktemp("model") / "model"
    save(DSV4(config).eval(), folder)
    return folder


def call(*arguments):
    return CliRunner().invoke(cli.app, list(map(str, arguments)))


def test_the_command_line(folder, tmp_path):
    with eps(1e5):
        result = call(
            "bisect", "--model", folder, "--prompt", "ab", "--script", tmp_path / "r.py", "--threshold", "1e-3"
        )
    assert result.exit_code == 1, result.output
    assert "raise.rms_norm/weighted in layers.0." in result.stdout and "compiles" in result.stdout
    assert f"reference_model.load('{folder}', 'cpu', torch.float32)" in (tmp_path / "r.py").read_text()
    result = call("shadow", "--model", folder, "--prompt", "ab", "--disable", "fuse.moe", "--phase", "decode")
    assert result.exit_code == 0, result.output
    assert "0 of" in result.stdout and "fuse.attention/window_only" in result.stdout and "fuse.moe" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bisect", "--metric", "logit"), "unknown metric 'logit'; did you mean 'logits'"),
        (("bisect", "--prompt", "a" * 5000), "shorten the prompt"),
        (("bisect", "--phase", "decod"), "unknown phase 'decod'; did you mean 'decode'"),
        (("bisect", "--phase", "decode", "--metric", "bits"), "--metric bits: needs the prompt in one call"),
        (("shadow", "--disable", "fuse.mo"), "unknown pass 'fuse.mo'; did you mean 'fuse.moe'"),
        (("bisect", "--prompt", ""), "give at least two tokens"),
    ],
)
def test_bad_input_is_one_line(folder, arguments, message):
    result = call(arguments[0], "--model", folder, *arguments[1:])
    assert result.exit_code == 2 and message in result.stderr and result.stderr.startswith("error: ")
