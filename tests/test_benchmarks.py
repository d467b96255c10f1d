"""The benchmarks measure what they say: every op, equal inputs, a cold cache. Here on a CPU, where the same code runs."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from dsv4_compile.commands import bench, cli
from dsv4_compile.lowerings import OPS
from dsv4_compile.reference_model import DSV4Config

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def module(monkeypatch):
    """module("timing"): that module of the benchmarks, which are not installed."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


@pytest.mark.parametrize(("B", "T"), [(2, 1), (1, 9)])
def test_every_op_has_a_call_whose_numbers_are_finite(B, T, module):
    cases = list(module("cases").Cases(DSV4Config.nano(), B, T, torch.device("cpu")))
    assert {c.op for c in cases} == set(OPS)
    for case in cases:
        args = case.make()
        got = case.op.meaning(*args)
        for out in got if isinstance(got, tuple) else (got,):
            assert out.double().isfinite().all(), case.what
        assert case.op.bound_sizes(case.op.arguments(*args)) is not None, case.what


def test_samples_are_the_first_rows(module):
    """Of calls too large for fp64: eager's error against it is that of rounding."""
    arm, errors = module("__main__").arm, module("__main__").errors
    sampled = [c for c in module("cases").Cases(DSV4Config.nano(), 9, 1, torch.device("cpu")) if c.sample is not None]
    assert len(sampled) > 4
    for case in sampled:
        args = module("__main__").inputs_of(case)
        small, rows = case.sample(args)
        assert 0 < rows < len(case.op(*args)) and rows == len(case.op(*small)), case.what
        assert errors(case, {"eager": arm("eager", case.op, args)}, args)["eager"] < 2e-2, case.what


def test_a_table_with_errors_ceilings_and_what_was_left_out(module, tmp_path, capsys):
    main, file = module("__main__").main, tmp_path / "found.json"
    few = ["--ops", "router", "rms_norm", "moe", "--tokens", "2", "--prefill", "--arms", "eager", "ours", "torch"]
    assert main([*few, "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert {r["op"] for r in found["rows"]} == {"router", "rms_norm", "moe"} and not found["failed"] + found["left"]
    assert found["ceilings"]["read"] > 0 and found["ceilings"]["gap"] > 0
    for row in found["rows"]:
        assert all(0 < us for us in row["us"].values()) and max(row["error"].values()) < 1e-2 and row["least_us"] > 0
    norm, *_ = (r for r in found["rows"] if r["op"] == "rms_norm")
    assert norm["us"].keys() == {"eager", "torch"} and norm["by"] == "nobody"  # nothing of ours runs it on a CPU
    said = capsys.readouterr().out
    assert "mHC" not in said and "share" in said
    assert main([*few, "--budget", "0", "--json", str(file)]) == 0
    assert len(json.loads(file.read_text())["left"]) == len(found["rows"])
    assert "no time was left: 5\n  nano, norm, 2x1" in capsys.readouterr().out


def test_what_runs_out_of_memory_is_told_and_the_rest_is_measured(module, tmp_path, capsys, monkeypatch):
    """Whether at once or when all its calls are to be captured. Ops have their implementations again after it."""
    main, file, arm = module("__main__"), tmp_path / "found.json", module("__main__").arm

    def full(*given):
        with module("ops").plain():
            raise torch.OutOfMemoryError

    def later(call, seen):
        return lambda *given: seen.append(1) or (call(*given) if len(seen) < 2 else full())

    def arms(name, op, args):
        if name == "eager":
            return full
        return later(arm("eager", op, args), []) if name == "inductor" else arm("eager", op, args)

    before = {op: op.implementations[:] for op in OPS}
    monkeypatch.setattr(main, "arm", arms)
    few = ["--ops", "router", "--tokens", "2", "--prefill", "--arms", "eager", "inductor", "ours"]
    assert main.main([*few, "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["rows"] and not found["failed"]
    for row in found["rows"]:
        assert row["lost"] == ["eager", "inductor"] and row["us"].keys() == {"ours"}
        assert row["error"].keys() == {"inductor", "ours"}
    said = capsys.readouterr().out
    assert "eager runs out of memory; inductor runs out of memory" in said and "no memory" in said
    assert {op: op.implementations for op in OPS} == before


def test_cells_that_ours_loses(module):
    loses = module("__main__").loses
    assert loses({"us": {"eager": 3.0, "torch": 1.0, "ours": 1.1}})
    assert not loses({"us": {"eager": 1.0, "ours": 1.01}})  # noise
    assert not loses({"us": {"eager": 1.0}})


def test_of_integers_the_error_is_the_share_that_another_has_not(module):
    wrong, want = module("__main__").wrong, torch.tensor([[5, 1, 9, -1], [2, 3, 4, 7]])
    assert wrong(want[:, [2, 0, 3, 1]], want) == 0
    assert wrong(torch.tensor([[0, 1, 9, 5], [2, 3, 4, 8]]), want) == 2 / 8


def test_an_arm_that_changes_the_inputs_is_refused(module):
    timing = module("timing")
    inputs = [(torch.ones(3),), (torch.ones(3),)]
    with pytest.raises(timing.Refused, match="'bad' changes its inputs"):
        timing.microseconds({"good": torch.neg, "bad": torch.Tensor.neg_}, inputs)


def test_inputs_that_stay_in_the_cache_are_refused(module, monkeypatch):
    timing = module("timing")
    monkeypatch.setattr(timing, "on_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1000))
    x = torch.ones(400, dtype=torch.uint8)
    same, own = [(x, 1)] * 9, [(x.clone(), 1) for _ in range(5)]
    with pytest.raises(timing.Refused, match="stay in L2"):
        timing.microseconds({"": torch.neg}, same)
    assert not timing.beyond_l2(same) and timing.beyond_l2(own)


def test_the_picture(module, tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `bench` brings it")
    row = {"flops": 1e9, "bytes": 1e6, "us": {"eager": 9.0, "ours": 2.0}}
    limits = module("timing").Ceilings(4e12, 2e12, 8e14, 1e15, 1e-6)
    module("picture").roofline([row], limits, "a machine", tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").stat().st_size > 10_000


def test_the_command_is_the_module(monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr(bench.runpy, "run_module", lambda name, run_name: called.append((name, run_name, sys.argv[1:])))
    monkeypatch.setattr(sys, "argv", ["dsv4"])
    monkeypatch.setattr(sys, "path", sys.path[:])
    assert CliRunner().invoke(cli.app, ["bench", "--ops", "router", "--help"]).exit_code == 0
    assert called == [("benchmarks", "__main__", ["--ops", "router", "--help"])]
    assert CliRunner().invoke(cli.app, ["bench", "--layer", "--model", "pro"]).exit_code == 0
    assert called[1:] == [("benchmarks.layer", "__main__", ["--model", "pro"])]
    monkeypatch.setattr(bench, "CHECKOUT", tmp_path)
    result = CliRunner().invoke(cli.app, ["bench"])
    assert result.exit_code == 2 and "run it in a checkout" in result.output
