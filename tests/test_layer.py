"""Layers launch by launch: who each launch belongs to, what it adds, its floor; from made-up profiles, as on a GPU."""

import importlib
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from dsv4_compile.lowerings.norm import rms_norm
from dsv4_compile.reference_model import DSV4Config
from dsv4_compile.reference_model.schedule import HCA, SWA

ROOT = Path(__file__).resolve().parent.parent
kernels = pytest.mark.skipif(find_spec("cutlass") is None, reason="GPU kernels need CuTeDSL")


@pytest.fixture
def module(monkeypatch):
    """module("waterfall"): that module of the benchmarks, which are not installed."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def ours(body, entry="kernel"):
    """A kernel's name as a profile of an H200 has it."""
    return f"kernel_cutlass_{entry}_dsv4_compilekernels{body}_object_at__tensorptrbf16_gmem_align16_o_1409640961_0"


MARK = "Memcpy DtoD (Device -> Device)", "void at::native::bessel_j0_forward_vectorized4_kernel<4>(int)"
LAYER = [  # kernel, start, end; the last two overlap their neighbours
    ("triton_poi_fused_cos_0", 0, 1),
    (ours("mhc_boundaryBoundary"), 1, 8),
    (ours("streamLinears"), 2, 11),
    (ours("indexerProgram", "write_scores"), 12, 15),
    (ours("indexerProgram", "select"), 14, 20),
    (ours("attentionAttention"), 20, 30),
    (ours("attentionAttention", "add_up"), 30, 32),
    (ours("streamLinear"), 28, 40),
    (ours("streamLinear"), 38, 44),
    (ours("mhc_boundaryBoundary"), 44, 50),
    (ours("routerProgram"), 50, 52),
    (ours("streamGateUp"), 51, 70),
    (ours("streamDown"), 68, 80),
    (ours("mhcPost"), 79, 79.5),
]


def step(Span):
    """Spans of a step of one layer, which begins at 100."""
    inner = [Span(name, 100 + a, 100 + b) for name, a, b in LAYER]
    marks = [[Span(MARK[0], at, at + 1), Span(MARK[1], at + 1, at + 2)] for at in (97.5, 181)]
    return [
        Span("triton_poi_fused_embedding_0", 90, 92),
        *marks[0],
        *inner,
        *marks[1],
        Span("nvjet_tst(int)", 184, 190),
    ]


def notes(attribution):
    made = [
        ("mhc_enter", 1e6, ["mhc_boundary"]),
        ("normed_linears_2", 2e6, ["linears"]),
        ("indexer", 3e6, ["indexer"]),
        ("attention", 4e6, ["attention"]),
        ("grouped_linear", 5e6, ["gemv"]),
        ("linear", None, ["gemv"]),
        ("mhc_boundary", 6e6, ["mhc_boundary"]),
        ("router", 7e6, ["router"]),
        ("moe", 8e6, ["moe"]),
        ("mhc_post", 9e6, ["mhc"]),
    ]
    return attribution.Notes([[], [attribution.Call(*call) for call in made], []], True)


@kernels
@pytest.mark.parametrize(
    ("where", "body"),
    [
        ("attention", "attentionAttention"),
        ("attention_exact", "attention_exactAttention"),
        ("compressor", "compressorCompressor"),
        ("compressor_append", "compressor_appendStep"),
        ("gemv", "streamLinear"),
        ("indexer", "indexerProgram"),
        ("linears", "streamLinears"),
        ("mhc", "mhcPre"),
        ("mhc", "mhcPost"),
        ("mhc_boundary", "mhc_boundaryBoundary"),
        ("moe", "streamGateUp"),
        ("moe", "streamDown"),
        ("norm", "normRMSNorm"),
        ("router", "routerProgram"),
        ("shared_expert", "streamSharedExpert"),
    ],
)
def test_a_kernels_name_says_which_program_it_is_of(where, body, module):
    attribution = module("attribution")
    assert attribution.body(ours(body)) == ("kernel", body) and body in attribution.classes(where)
    wrong = {m for m in ("attention", "gemv", "router", "indexer", "moe", "norm", "linears") if m != where}
    assert not any(body in attribution.classes(m) for m in wrong)


@kernels
def test_launches_by_op_what_they_add_and_their_floors(module):
    attribution, waterfall, Span = module("attribution"), module("waterfall"), module("clock").Span
    begin, layer, end = waterfall.parts_of(step(Span), ["CSA"], notes(attribution), 1e12, scale=2.0)
    assert [x.op for x in begin.launches] == ["triton_poi_fused_embedding_0"]
    assert [(x.op, x.by) for x in end.launches] == [("nvjet_tst", "torch")]
    calls = ["mhc_enter", "normed_linears_2", *["indexer"] * 2, *["attention"] * 2, "grouped_linear", "linear"]
    calls += ["mhc_boundary", "router", "moe", "moe", "mhc_post"]
    assert [x.op for x in layer.launches] == ["triton_poi_fused_cos_0", *calls]
    floors = [x.floor for x in layer.launches]
    assert floors == pytest.approx([None, 1, 2, 3, None, 4, None, 5, None, 6, 7, 8, None, 9])
    assert layer.us == pytest.approx(160) and layer.launches[3].start == 24 and layer.launches[4].adds == 10
    assert layer.launches[-1].adds == 0 and layer.busy == pytest.approx(2 * sum(b - a for _, a, b in LAYER))
    said = waterfall.text([begin, layer, end], {"CSA": 80.0})
    assert "CSA: 160.0 us, 14 launches, 80.0 us to read, 0.50 of the time" in said and "do not fit" not in said
    assert "attention (attentionAttention.add_up)" in said and "Memcpy" not in said


@kernels
def test_calls_whose_kernels_may_be_of_one_launch_are_told_apart(module):
    attribution, Span = module("attribution"), module("clock").Span
    calls = [
        ("linears_3", ["linears"]),
        ("normed_linears_1", ["linears"]),
        ("experts", ["experts"]),
        ("linear", ["gemv"]),
    ]
    bodies = "linearsTwoFormats", "streamLinears", "expertsUp", "streamDown", "streamEnd", "streamLinear"
    spans = [Span(ours(body), 10 * i, 10 * i + 9) for i, body in enumerate(bodies)]
    found = attribution.attributed(spans, [attribution.Call(op, 1e6, modules) for op, modules in calls])
    names = ["linears_3", "normed_linears_1", *["experts"] * 3, "linear"]
    assert [None if call is None else call.op for call in found] == names


@kernels
@pytest.mark.parametrize("change", ["a call more", "a call less", "another kernel"])
def test_where_calls_and_launches_do_not_fit_kernels_have_their_own_names(change, module):
    attribution, waterfall, Span = module("attribution"), module("waterfall"), module("clock").Span
    noted = notes(attribution)
    if change == "a call more":
        noted.parts[1].append(attribution.Call("router", 1e6, ["router"]))
    elif change == "a call less":
        del noted.parts[1][-1]
    else:
        noted.parts[1][0].modules = ["router"]
    _, layer, _ = waterfall.parts_of(step(Span), ["CSA"], noted, 1e12)
    assert not layer.fits and all(x.floor is None for x in layer.launches)
    assert layer.launches[1].op == "mhc_boundaryBoundary" and layer.us == pytest.approx(80)
    assert "do not fit" in waterfall.text([layer], {})


def test_one_call_of_several_is_the_median(module):
    waterfall, Span = module("waterfall"), module("clock").Span
    calls = [[Span("a", t, t + 1), Span("b", t + d, t + d + 2)] for t, d in ((5, 3), (50, 1), (90, 2))]
    assert waterfall.typical(calls) == [Span("a", 0, 1), Span("b", 2, 4)]
    calls[1][0] = Span("c", 50, 51)
    assert waterfall.typical(calls) == [Span("a", 0, 1), Span("b", 3, 5)]


@kernels
def test_calls_and_launches_are_noted_as_they_run(module, monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    from dsv4_compile.kernel import collecting
    from dsv4_compile.lowerings.mhc import mhc_head
    from dsv4_compile.warm import on_gpu

    attribution, model = module("attribution"), module("layer_model")
    monkeypatch.setenv("DSV4_ARCH", "sm_90a")
    with FakeTensorMode(), collecting(), attribution.recording() as recorder:
        x, weight = (on_gpu(torch.empty(*s, dtype=torch.bfloat16)) for s in ((3, 64), (64,)))
        streams = on_gpu(torch.empty(3, 4, 64))
        wide = [on_gpu(torch.empty(s)) for s in ((4, 256), (4,), (1,))]
        for _ in range(2):  # the notes are of the latest step
            recorder.begin()
            rms_norm.run(x, weight, 1e-6)
            model.mark(torch.ones(1))
            mhc_head.run(streams, *wide, 1e-6, 1e-6)
        kept = recorder.notes
    norm, head = kept.parts
    assert [(c.op, c.modules, c.moved) for c in norm] == [("rms_norm", ["norm"], 4 * 3 * 64 + 4 * 64)]
    assert [(c.op, c.modules) for c in head] == [("mhc_head", ["mhc"])] and not kept.captured
    recorder.begin()
    assert recorder.notes is kept, "a replay runs nothing from Python"
    recorder.mark()
    assert recorder.notes.parts == [[], []], "a step without ops of ours"


@kernels
def test_cells_have_bars_at_flash_alone(module):
    attribution, waterfall, bars = module("attribution"), module("waterfall"), module("bars")
    parts = waterfall.parts_of(step(module("clock").Span), ["CSA"], notes(attribution), 1e12)
    about = dict(model="flash", format="fp4", batch=1, arm="ours", context=8192)
    row = dict(layer="CSA", us=80.0, floor_us=40.0, experts_floor_us=15.0)
    row |= dict(rows="attention, 128 + 512 rows, turned back", entries="indexer, 2048 entries")
    found = list(bars.cells(about | {"layers": [row]}, parts))
    values = {x["cell"]: (x["value"], x["floor"], bars.bounds(x)) for x in found}
    assert values["CSA layer, us"] == (80.0, 40.0, (125, 85))
    assert values["CSA layer, launches"] == (14, None, (14, 9))
    assert values["mHC boundary, us"] == (6.0, pytest.approx(6.0), (8, 4.5))
    assert values["experts, router and shared expert, us"] == (30.0, 15.0, (45, 33))
    assert values["attention, 128 + 512 rows, turned back, us"] == (12.0, pytest.approx(4.0), (10, 6))
    assert values["indexer, 2048 entries, us"][2] is None
    later = [x | dict(context=1 << 17, value=x["value"] + 7.0, floor=(x["floor"] or 0) + 1) for x in found]
    (more,) = bars.longer(later + found)
    assert more["cell"] == "CSA layer at 131072, us more than at 8192"
    assert (more["value"], more["floor"], bars.bounds(more)) == (7.0, 1.0, (8, 4))
    assert bars.bounds(later[0]) is None and all(bars.bounds(x | {"model": "pro"}) is None for x in found)
    assert len(bars.table(found).columns) == 10
    assert len(bars.table([x | {"model": "nano"} for x in found]).columns) == 8
    beside = bars.table(found + [x | dict(arm="invariant", value=x["value"] * 1.1) for x in found])
    last = beside.columns[-1]
    assert (last.header, beside.row_count) == ("invariant", len(found)) and "88.0 (+10.0%)" in last.cells
    assert bars.table([x | {"arm": "invariant"} for x in found]).row_count == len(found), "by itself"


@kernels
def test_the_waterfall_is_drawn(module, tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `bench` brings it")
    parts = module("waterfall").parts_of(step(module("clock").Span), ["CSA"], notes(module("attribution")), 1e12)
    module("picture").launches(parts, {"CSA": 40.0}, "a machine", tmp_path / "layers.png")
    assert (tmp_path / "layers.png").stat().st_size > 10_000


def test_it_runs_on_a_cpu(module, monkeypatch, tmp_path, capsys):
    layer, model = module("layer"), module("layer_model")
    small = DSV4Config.tiny().replace(hc_sinkhorn_iters=2, num_nextn_predict_layers=0)
    monkeypatch.setitem(model.CONFIGS, "nano", lambda: small)
    monkeypatch.setattr(layer, "STEPS", 2)
    file = tmp_path / "layers.json"
    assert layer.main(["--model", "nano", "--formats", "bf16", "--arms", "eager", "--context", "32,64", "--batch", "2",
                       "--json", str(file)]) == 0  # fmt: skip
    assert layer.main(["--model", "nano", "--formats", "bf16", "--arms", "eager", "--context", "64", "--index-keys", "fp8",
                       "--kv", "fp8", "--json", str(tmp_path / "fp8.json")]) == 0  # fmt: skip
    (stored,) = json.loads((tmp_path / "fp8.json").read_text())["results"]
    assert stored["index_keys"] == stored["kv"] == "fp8"
    assert "index keys fp8, KV fp8, eager" in capsys.readouterr().out
    one, two = json.loads(file.read_text())["results"]
    assert (one["context"], two["context"]) == (32, 64) and one["step_us"] > 0 and one["parts"] == []
    floors = [[x["floor_us"] for x in r["layers"]] for r in (one, two)]
    assert all(a <= b for a, b in zip(*floors, strict=True)) and floors[0][1] < floors[1][1]
    assert [x["layer"] for x in one["layers"]] == ["SWA, hash", "CSA", "HCA", "CSA again"]
    net = model.model_of(model.config_of("nano", "bf16"), torch.device("cpu"))
    kept = ("bf16", "bf16"), ("fp8", "bf16"), ("bf16", "fp8")
    many, less, least = ([x["floor_us"] for x in layer.floors_of(net, 8, 2000, k, 1e6)] for k in kept)
    bytes_of = [x - y for x, y in zip(many, less, strict=True)]
    read = 8 * 500 * (2 * small.index_head_dim - small.index_head_dim - 4)
    assert bytes_of[0] == bytes_of[2] == 0 and bytes_of[1] == bytes_of[3] == pytest.approx(read)
    of_hca, row = many[2] - least[2], 2 * small.head_dim - 80
    entries = 2000 // small.rate(HCA)
    assert of_hca == pytest.approx(8 * (entries + small.sliding_window) * row)


def test_what_a_profile_says_is_told_drawn_and_written(module, monkeypatch, tmp_path, capsys):
    """A whole run, with a made-up profile in the place of a GPU's."""
    pytest.importorskip("matplotlib", reason="the extra `bench` brings it")
    layer, Span = module("layer"), module("clock").Span

    def spans(self, work, calls=6):
        found, at = [], 0.0
        for names in (["a"], *[MARK, ["triton_b", "c"]] * 4, MARK, ["d"]):
            for name in names:
                found.append(Span(name, at, at + 2))
                at += 3
        return [found] * calls

    small = DSV4Config.tiny().replace(hc_sinkhorn_iters=2, num_nextn_predict_layers=0)
    monkeypatch.setitem(module("layer_model").CONFIGS, "flash", lambda: small)
    monkeypatch.setattr(module("clock").Clock, "spans", spans)
    monkeypatch.setattr(layer, "STEPS", 1)
    monkeypatch.setattr(layer, "OURS", ("eager",))
    file, picture = tmp_path / "layers.json", tmp_path / "layers.png"
    given = ["--model", "flash", "--formats", "bf16", "--arms", "eager", "--context", "64", "--launches"]
    assert layer.main([*given, "--json", str(file), "--picture", str(picture)]) == 0
    found = json.loads(file.read_text())
    (one,) = found["results"]
    assert [p["count"] for p in one["parts"]] == [1, 2, 2, 2, 2, 1] and [x["us"] for x in one["layers"]] == [5.0] * 4
    assert {x["cell"]: x["value"] for x in found["cells"]}["CSA layer again, launches"] == 2
    assert (tmp_path / "layers-bf16-64-1-eager.png").stat().st_size > 10_000
    said = capsys.readouterr().out
    assert "HCA: 5.0 us, 2 launches" in said and "stretch" in said and "bessel" not in said


def test_any_config_and_the_kinds_of_layer_that_it_has(module, tmp_path, capsys):
    model, layer = module("layer_model"), module("layer")
    kinds = SWA, HCA
    tiny = DSV4Config.tiny().replace(num_hidden_layers=2, layer_types=kinds, mlp_layer_types=("moe", "moe"))
    fields = tiny.to_hf_dict()
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = model.config_of(str(tmp_path), "bf16")
    assert (
        model.names_of(config) == [model.SHORT[k] for k in model.LAYERS if k in kinds]
        and config.linear_format == "none"
    )
    assert model.names_of(model.config_of("pro", "fp4")) == ["HCA, hash", "CSA", "CSA again"]
    kinds = [model.SWA, model.SWA, model.CSA, model.CSA, model.CSA]
    names = ["SWA, hash", "SWA, hash again", "CSA", "CSA again", "CSA again, 3"]
    assert model.names_of(model.config_of("flash", "fp4", kinds)) == names
    assert layer.parsed(["--model", "flash", "--layers", "HCA,SWA"]).configs["fp4"].layer_types == (
        model.HCA,
        model.SWA,
    )
    for wrong, said in (("elsewhere", "expected flash"), (str(tmp_path), "must be a multiple of 32")):
        with pytest.raises(SystemExit):
            layer.parsed(["--model", wrong, "--formats", "fp4"])
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        layer.parsed(["--model", "pro", "--layers", "SWA"])
    assert "pro has no layers of sliding_attention" in capsys.readouterr().err


def test_what_a_layer_must_read(module):
    model = module("layer_model")
    config = model.config_of("nano", "bf16")
    with torch.device("meta"):
        layer = model.Marked(torch.nn.Linear(4, 8, bias=False), False)
    assert model.weights_read(layer, config, 1) == 128
    layer.layer.experts = torch.nn.Linear(6, 10, bias=False, device="meta")
    share = config.num_experts_per_tok / config.n_routed_experts
    assert model.weights_read(layer, config, 1) == 128 + round(240 * share)
    assert model.weights_read(layer, config, 3) == 128 + round(240 * (1 - (1 - share) ** 3))
