"""scripts/gpu-check: what it starts, what becomes of it, what it leaves. Nothing here needs a GPU."""

import json
import sys
from argparse import Namespace
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def script():
    loader = SourceFileLoader("gpu_check", str(ROOT / "scripts" / "gpu-check"))
    loaded = module_from_spec(spec_from_loader("gpu_check", loader))
    sys.modules["gpu_check"] = loaded  # where dataclasses look for it
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    loader.exec_module(loaded)
    sys.dont_write_bytecode = before
    return loaded


@pytest.fixture
def check(script, tmp_path):
    def made(**given):
        usual = dict(report=tmp_path / "report", budget=60.0, packages=None, cache=None, most=512.0, layers="", ops="")
        return script.Check(Namespace(**(usual | dict(only=script.STAGES) | given)))

    return made


def test_jobs_succeed_fail_and_run_out_of_time(script, check):
    run = check()
    jobs = [
        script.Job("facts", name, c, 0.5)
        for name, c in dict(good="echo 7 passed", bad="exit 3", slow="sleep 9").items()
    ]
    assert [run.run(job) for job in jobs] == [True, False, False]
    assert [j.result for j in jobs] == ["ok", "failed (3)", "ran out of time"] and jobs[0].last == "7 passed"
    assert "| good | ok |" in run.summary() and (run.report / "good.log").read_text() == "7 passed\n"
    layer = {"layer": "CSA", "us": 300.4, "launches": 50}
    arm = {"format": "bf16", "arm": "ours", "step_us": 1500.2, "launches": 203, "error": 0.01, "layers": [layer]}
    (run.report / "layers.json").write_text(json.dumps({"results": [arm]}))
    assert "| bf16 ours | 1500 | 203 | 0.0100 | CSA 300 / 50 |" in run.summary()
    late = check(budget=0.0)
    assert not late.run(script.Job("facts", "late", "true")) and late.jobs[0].result == "no time was left"


def test_a_sanitizer_that_does_not_run_here_is_told_apart_from_one_that_found_something(script, check):
    run = check()
    said = {"none": "echo Device not supported; exit 1", "found": "echo ======== ERROR SUMMARY: 2 errors; exit 1"}
    for name, command in said.items():
        tool = f"compute-sanitizer() {{ {command}; }}; compute-sanitizer"
        run.run(script.Job("memcheck", name, tool))
    run.run(script.Job("memcheck", "launch", "exit 1"))
    assert {j.name: (j.result, j.last) for j in run.jobs} == {
        "none": ("refused by this machine", "Device not supported"),
        "found": ("failed (1)", "ERROR SUMMARY: 2 errors"),
        "launch": ("failed (1)", ""),
    }


def test_what_waits_for_a_failed_job_does_not_run(script, check):
    run = check()
    run.chain([script.Job("memcheck", "first", "false"), script.Job("racecheck", "second", "true")])
    assert [j.name for j in run.jobs] == ["first"]


def test_what_is_carried_is_bounded(check, tmp_path, capsys):
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "large.whl").write_bytes(bytes(3 << 20))
    run = check(packages=tmp_path / "packages", most=2.0)
    assert not run.install() and not run.jobs
    assert "MiB, at most 2.0" in capsys.readouterr().out


def test_packages_of_a_folder_are_found_wheels_or_not(script, check, tmp_path, monkeypatch):
    """As `pip install --target` leaves them: a .pth file may name further folders."""
    packages = tmp_path / "packages"
    (packages / "inner").mkdir(parents=True)
    (packages / "more.pth").write_text("inner\n")
    (packages / "inner" / "carried_module.py").write_text("print('carried')\n")
    run, commands = check(packages=packages), []
    with monkeypatch.context() as patch:
        patch.setattr(run, "run", lambda job: commands.append(job.command) or True)
        assert run.install()
        (packages / "a.whl").touch()
        assert run.install()
    assert "--target" not in commands[0] and f"--target {run.site} {packages}/*.whl" in commands[1]
    job = script.Job("install", "look", f"{script.PYTHON} -c 'import carried_module'")
    assert run.run(job) and job.last == "carried"


@pytest.mark.parametrize(("built", "result"), [(0, "ok"), (3, "failed (1)")])
def test_a_kernel_that_was_not_carried_is_a_failure(built, result, check, tmp_path):
    run = check(cache=tmp_path / "flash.tar", only=["keys"])
    command = tmp_path / "dsv4"
    command.write_text(
        f"#!/bin/sh\n[ $1 = warm ] && echo '28 kernels: {built} built, 25 in the cache, 0 failed'; exit 0\n"
    )
    command.chmod(0o755)
    run.env["PATH"] = f"{tmp_path}:{run.env['PATH']}"
    ((job,),) = filter(None, run.together())
    run.run(job)
    assert job.result == result, (run.report / "keys.log").read_text()


def test_every_file_with_gpu_tests_and_every_stage_is_run(script, check, tmp_path):
    run = check(cache=tmp_path / "flash.tar")
    jobs = [job for chain in run.together() for job in chain] + run.alone()
    assert {j.stage for j in jobs} == set(script.STAGES) - {"install"}
    found = {j.name.removeprefix("parity_") for j in jobs if j.stage == "parity"}
    assert {"gemv", "golden", "decode", "attention_kernel"} <= found and not {"gpu_check", "model"} & found
    few = check(only=["ops"])
    assert [j for chain in few.together() for j in chain] == [] and [j.name for j in few.alone()] == ["ops"]
