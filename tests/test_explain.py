"""explain and its reports: kinds of layer with costs, near misses, diffs, and reports that outlive the process."""

import json
import math
import re
from functools import partial
from pathlib import Path

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typer.testing import CliRunner

import dsv4_compile
from dsv4_compile.backend import backend
from dsv4_compile.commands import cli
from dsv4_compile.commands.explain import content
from dsv4_compile.config import Config
from dsv4_compile.graphs.near import align
from dsv4_compile.lowerings import OPS
from dsv4_compile.match import T, rule
from dsv4_compile.op import op
from dsv4_compile.passes import front
from dsv4_compile.patterns import RULES
from dsv4_compile.reference_model import DSV4, DSV4Config, save
from dsv4_compile.reference_model.model import Router
from dsv4_compile.reference_model.schedule import HCA, SWA
from dsv4_compile.reporting import stored
from dsv4_compile.reporting.roofline import H200, Machine
from dsv4_compile.reporting.table import AROUND, kinds
from dsv4_compile.reporting.unclaimed import summed


def small(attention=(SWA, HCA, SWA), experts=("moe", "moe", "moe"), **change) -> DSV4:
    fields = dict(num_hidden_layers=len(attention), layer_types=attention, mlp_layer_types=experts)
    torch.manual_seed(0)
    config = DSV4Config.tiny().replace(**fields, hc_sinkhorn_iters=2, num_nextn_predict_layers=0, **change)
    return DSV4(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def report():
    """Two layers of one kind and one of another, prefill of 2 x 7 tokens."""
    torch._dynamo.reset()
    model = small()
    return dsv4_compile.explain(model, torch.arange(14).view(2, 7), options={"diff": "fuse.router"})


# -- costs


@pytest.mark.parametrize("op", OPS, ids=lambda o: o.name)
def test_every_op_tells_its_cost_and_where_its_sizes_are(op):
    cost = op.symbolic_cost()
    assert op.sizes_of is not None
    names = {str(s) for e in (cost.flops, cost.read, cost.write) for s in sympy.sympify(e).free_symbols}
    assert names <= set(op.cost_of.__code__.co_varnames)


def test_costs_are_those_of_the_sizes_in_the_graph(report):
    known, seen = {op.name: op for op in OPS}, set()
    for graph in report.graphs:
        for ran in graph.ran:
            cost = known[ran.op].symbolic_cost().at(**ran.sizes)
            if ran.apart:  # what its parts leave
                assert 0 <= ran.flops < cost.flops and 0 <= ran.moved < cost.read + cost.write, ran
                continue
            assert math.isclose(ran.flops, float(cost.flops)), ran
            assert math.isclose(ran.moved, float(cost.read + cost.write)), ran
            seen.add(ran.op)
    assert seen >= {"attention", "moe", "router", "compressor", "mhc_pre", "mhc_post", "mhc_head", "rms_norm"}
    (attention,) = {tuple(r.sizes.items()) for g in report.graphs for r in g.ran if r.op == "attention" and "K" in r.sizes
                    and r.sizes["K"] and not r.apart}  # fmt: skip
    assert dict(attention) == dict(B=2, T=7, h=6, d=48, W=7, K=1, dr=0, bytes=2 * 48)


def test_least_times_are_those_of_the_machine():
    machine = Machine("small", flops=100.0, bandwidth=10.0)
    assert machine.seconds(50, 10) == 1.0 and machine.bound(50, 10) == "memory"
    assert machine.seconds(200, 10) == 2.0 and machine.bound(200, 10) == "compute"
    assert H200.seconds(989e12, 0) == H200.seconds(0, 4.8e12) == 1.0


# -- kinds of layer


def test_layers_of_one_kind_are_one_table(report):
    found = {k.name: k for k in kinds(report)}
    assert list(found) == [f"{SWA}, moe", f"{HCA}, moe", AROUND]
    assert found[f"{SWA}, moe"].layers == ("layers.0", "layers.2") and found[f"{HCA}, moe"].layers == ("layers.1",)
    for kind in list(found.values())[:2]:
        rows = {r.op: r for r in kind.rows}
        assert rows["mhc_pre"].times == rows["mhc_post"].times == 2 and rows["attention"].rule.startswith(
            "fuse.attention/"
        )
        assert rows["moe"].by == "cpu" and rows["rms_norm"].by.startswith("inlined")
        assert rows["router"].where.startswith("model.py:") and rows["router"].rule == "fuse.router/learned"
    assert {r.op for r in found[AROUND].rows} == {"head", "linear_wide", "mhc_head", "rms_norm"}


def test_the_text_says_all_of_it(report):
    text = str(report)
    assert f"{SWA}, moe (2 layers: layers.0, layers.2)" in text and "least time of these ops on H200" in text
    assert "near misses" not in text  # nothing is missing
    assert {f: report.counts[f] for f in report.sites} == dict(report.sites)


def test_json_has_the_tables(report):
    told = json.loads(json.dumps(content(report)))
    assert (
        {f: told["counts"][f] for f in report.sites} == dict(report.sites)
        and told["machine"]["name"] == "H200"
        and told["misses"] == []
    )
    (two,) = [k for k in told["kinds"] if len(k["layers"]) == 2]
    assert two["seconds"] == pytest.approx(sum(r["seconds"] for r in two["ops"]))


# -- before and after


def test_a_pass_is_shown_line_by_line_and_only_if_asked(report):
    names, texts = zip(*report.diffs, strict=True)
    assert set(names) == {"fuse.router"} and len(texts) == len(report.graphs)
    for text in filter(None, texts):
        assert "-topk: (f32[14, 3], i64[14, 3]) = aten.topk.default(" in text
        assert "+router_default: (i64[14, 3], f32[14, 3]) = dsv4.router.default(" in text
    again = dsv4_compile.explain(F.silu, torch.randn(4))
    assert again.diffs == []
    (last,) = dsv4_compile.explain(F.silu, torch.randn(4), options={"diff": "lower"}).diffs
    assert "-silu_default: f32[4] = dsv4.silu.default(arg0_1)" in last[1] and "aten.exp" in last[1]


# -- near misses


class Alone(nn.Module):
    """The model's own router, with logits given."""

    def __init__(self, scoring):
        super().__init__()
        config = DSV4Config.tiny().replace(scoring_func=scoring)
        self.router, self.width = Router(config, "moe").requires_grad_(False), config.hidden_size

    def forward(self, x: Tensor):
        return self.router(x, x, None)


@pytest.mark.parametrize(("scoring", "stood"), [("softmax", "dsv4.softmax"), ("sigmoid", "aten.sigmoid")])
def test_another_score_is_a_near_miss_with_its_line(scoring, stood):
    model = Alone(scoring)
    report = dsv4_compile.explain(model, torch.randn(5, model.width))
    miss = next(m for m in report.misses if m.rule == "fuse.router/learned")
    assert (miss.expected, miss.found) == ("aten.sqrt", stood) and miss.progress > 0.7
    assert miss.where.startswith("model.py:") and "torch.softmax(logits, -1)" in miss.where


def sliced(X, fn, base, scale):
    """The collapse of mHC with slices in the place of `split`."""
    n, f = X.shape[-2], X.flatten(-2)
    mix = F.linear(f, fn) * torch.rsqrt(f.square().mean(-1, keepdim=True) + 1e-6)
    pre, post, comb = mix[..., :n], mix[..., n : 2 * n], mix[..., 2 * n :]
    pre = torch.sigmoid(pre * scale[0] + base[:n]) + 1e-5
    post = 2 * torch.sigmoid(post * scale[1] + base[n : 2 * n])
    c = torch.softmax((comb * scale[2] + base[2 * n :]).unflatten(-1, (n, n)), -1) + 1e-5
    c = c / (c.sum(-2, keepdim=True) + 1e-5)
    return (pre.unsqueeze(-1) * X).sum(-2), post, c


def test_slices_for_a_split_are_the_same_block():
    report = dsv4_compile.explain(sliced, torch.randn(7, 4, 6), torch.randn(24, 24), torch.randn(24), torch.randn(3))
    assert report.counts["mhc"] == 1 and report.rules["raise.sinkhorn"] == 1


def test_alignment_steps_over_what_is_missing_added_or_other():
    @op("dsv4::t_four")
    def t_four(x: Tensor) -> Tensor:
        """cos of tanh of sin, of exp."""
        return x.exp().sin().tanh().cos()

    @rule(t_four, name="fuse.t_four", anchor="cos", example={"x": T(5, 7)})
    def four(x):
        return x.exp().sin().tanh().cos()

    (pattern,) = front((four,), "cpu").patterns(four)

    def laid(f):
        from torch.fx.experimental.proxy_tensor import make_fx

        graph = make_fx(f, tracing_mode="fake")(torch.randn(3, 4)).graph
        (start,), anchor = pattern.anchors("aten.cos"), next(n for n in graph.nodes if "cos" in n.name)
        found = align(pattern, start, anchor)
        return found.share, found.expected, found.found

    assert laid(lambda x: x.exp().sin().tanh().cos()) == (1.0, "", "")
    assert laid(lambda x: x.exp().sin().cos()) == (0.75, "aten.tanh", "aten.sin")
    assert laid(lambda x: x.exp().sin().neg().tanh().cos()) == (1.0, "aten.sin", "aten.neg")
    assert laid(lambda x: x.exp().sin().relu().cos()) == (0.75, "aten.tanh", "aten.relu")


def test_with_one_stream_every_place_is_found():
    report = dsv4_compile.explain(small((SWA,), ("moe",), hc_mult=1), torch.arange(5).view(1, 5))
    assert report.sites["mhc"] == 5 and not report.missing, report


# -- strict


def strictly(model, *args, **options):
    chosen = {"inner": "eager", "strict": True, **options}
    return torch.compile(model, backend=partial(backend, options=chosen), fullgraph=True)(*args)


def test_strict_wants_every_site_of_the_reference_model():
    model = Alone("softmax")
    x = torch.randn(5, model.width)
    with pytest.raises(Exception, match=r"SitesMissing: strict: fuse.router found 0 of 1(.|\n)*expected aten.sqrt"):
        strictly(model, x)
    torch._dynamo.reset()
    strictly(model, x, disable="fuse.router")
    torch._dynamo.reset()
    strictly(Alone("sqrtsoftplus"), x)


@op("dsv4::t_kept")
def t_kept(x: Tensor) -> Tensor:
    """3 sin(x)."""
    return x.sin() * 3


@rule(t_kept, name="raise.t_kept", anchor="sin", example={"x": T(5, 7)}, check=lambda m: spoil_other(m))
def kept(x):
    return x.sin() * 3


def spoil_other(match) -> bool:
    """Damages a value that the rewrite itself does not read."""
    next(n for n in match.anchor.graph.nodes if "exp" in n.name).meta.pop("val")
    return True


def test_strict_names_the_rule_that_breaks_a_graph(rewritten_by):
    with pytest.raises(
        Exception, match=r"after rule raise.t_kept/kept \(.*test_explain.py:\d+\): node exp.* has no fake value"
    ):
        rewritten_by([kept], lambda x: (x.sin() * 3, x.exp()), torch.randn(3, 4))


# -- reports that are kept


def test_a_kept_report_says_the_same(report):
    again = stored.decoded(json.loads(json.dumps(stored.encoded(report))))
    assert again.counts == report.counts and again.runs == report.runs and again.sites == report.sites
    assert [k.rows for k in kinds(again)] == [k.rows for k in kinds(report)]


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", "null", '{"version": 1}', '{"version": 0, "graphs": []}', "cut", "bodies"]
)
def test_a_damaged_file_is_no_report(report, tmp_path, damage):
    file = tmp_path / "reports" / "a.json"
    stored.save(report, file)
    assert stored.load(file).stored and list(file.parent.iterdir()) == [file]
    text = file.read_text()
    broken = json.dumps(json.loads(text) | {"graphs": [{"bodies": {"7": 1}, "sites": [], "misses": [], "ran": []}]})
    file.write_text({"cut": text[: len(text) // 2], "bodies": broken}.get(damage, damage))
    assert stored.load(file) is None


def test_a_folder_that_cannot_be_written_costs_the_report_only(report, tmp_path):
    (tmp_path / "file").write_text("")
    stored.save(report, tmp_path / "file" / "a.json")
    assert stored.load(tmp_path / "file" / "a.json") is None


def test_the_place_follows_graph_inputs_and_options(tmp_path):
    files = []
    for f, x, config in [
        (F.silu, torch.randn(4), Config()),
        (F.silu, torch.randn(4), Config()),
        (F.silu, torch.randn(5), Config()),
        (F.gelu, torch.randn(4), Config()),
        (F.silu, torch.randn(4), Config(disable=("raise.silu",))),
    ]:
        torch._dynamo.reset()
        keep = lambda gm, inputs, c=config: files.append(stored.place(gm, inputs, c)) or gm.forward  # noqa: E731
        torch.compile(lambda x, f=f: f(x), backend=keep, dynamic=False)(x)
    assert files[0] == files[1] and len(set(files)) == 4
    torch._dynamo.reset()
    torch.compile(
        lambda x: x + 1,
        backend=lambda gm, i: files.append(stored.place(gm, i, Config(cache_dir=str(tmp_path)))) or gm.forward,
    )(torch.randn(4))
    assert files[-1].parent == tmp_path / "reports"


# -- the command


def call(*arguments: object):
    return CliRunner().invoke(cli.app, ["explain", *map(str, arguments)])


def test_the_command_prints_and_writes(tmp_path: Path):
    save(small((SWA,), ("moe",)), tmp_path / "model")
    file = tmp_path / "out.json"
    arguments = "--model", tmp_path / "model", "--phase", "decode", "--length", 9, "--device", "cpu", "--json", file
    result = call(*arguments, "--machine", "toy", "--tflops", 1, "--bandwidth", 0.01, "--disable", "fuse.moe")
    assert result.exit_code == 0, result.output
    assert "least time of these ops on toy" in result.stdout and "not found" not in result.stdout
    assert re.search(r"^fuse.moe +0 +1$", result.stdout, re.M)
    told = json.loads(file.read_text())
    assert told["machine"] == {"name": "toy", "flops": 1e12, "bandwidth": 1e10} and told["counts"]["moe"] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--phase", "prefil"), "unknown phase 'prefil'; did you mean 'prefill'?"),
        (("--length", 0), "--length 0: expected 1 to"),
        (("--tflops", 0), "expected positive numbers"),
        (("--diff", "fuse.mo"), "unknown pass 'fuse.mo'; did you mean 'fuse.moe'?"),
        (
            ("--json", "/no/such/folder/x.json"),
            "--json /no/such/folder/x.json: expected a file in a folder that exists",
        ),
    ],
)
def test_bad_input_is_one_line(arguments, words):
    result = call("--device", "cpu", *arguments)
    assert result.exit_code == 2 and words in " ".join(result.stderr.split()), result.output


def test_rules_of_one_name_stand_together():
    """A pass is shown before and after as a whole."""
    names = [r.name for r in RULES]
    assert all(names[names.index(n) : names.index(n) + names.count(n)] == [n] * names.count(n) for n in names)


# What no rewrite takes


def test_what_is_left_to_inductor_has_a_reason_or_is_told(rewritten):
    def f(x, table, ids, w, b, where):
        row = table[ids] + x @ w * 3.0  # a lookup, a product, a factor, a join
        angle = where.float().unsqueeze(-1) * b
        return torch.cat([row, row.mT.contiguous().mT]), angle.cos(), (where + 1) % 7 < 3, torch.erf(x)

    D = 8
    _, report = rewritten(
        f, torch.randn(5, D), torch.randn(9, D), torch.arange(5), torch.randn(D, D), torch.randn(D), torch.arange(5)
    )
    (graph,) = report.graphs
    found = {reason: set(ops) for reason, ops, _ in summed(graph.left)}
    found.pop("layout", None)
    assert found == {
        "product": {"aten.mm"},
        "lookup": {"aten.index"},
        "cache": {"aten.cat"},
        "positions": {"aten.add", "aten.remainder", "aten.lt"},
        "angles": {"aten.mul", "aten.cos", "prims.convert_element_type"},
        "join": {"aten.add"},
        "factor": {"aten.mul"},
        "": {"aten.erf"},
    }
    (erf,) = report.unexplained
    assert erf.op == "aten.erf" and "test_explain.py" in erf.where
