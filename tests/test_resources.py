"""What default configurations take of a processor, read from the binaries: a spill fails.

All launches of a decode step of 1 and 8 tokens at nano's and Flash's sizes are known; a few of their kernels, others every day,
are compiled here, with DSV4_TEST_CONFIGS=all each of them. Nothing is launched.
"""

import importlib
import os
import random
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from dsv4_compile.reference_model import DSV4Config

if find_spec("cutlass") is None:
    pytest.skip("GPU kernels need CuTeDSL, which has wheels for Linux only", allow_module_level=True)

ROOT = Path(__file__).resolve().parent.parent
ALL, FEW = os.environ.get("DSV4_TEST_CONFIGS") == "all", 1
SIZES = {(1, 1): (torch.bfloat16,), (8, 1): (torch.bfloat16,)}
PORTABLE = ("router", "rms_norm", "mhc_post")  # for architectures that nobody has tried: compiled, not run


@pytest.fixture
def launches(monkeypatch):
    """launches(config): kernel, shape and configuration of each."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setenv("DSV4_ARCH", "sm_90a")
    return lambda config: importlib.import_module("benchmarks.once").launches(config, SIZES)


@pytest.mark.parametrize("name", ["nano", "flash"])
def test_default_configurations_do_not_spill(name, launches):
    found = launches(getattr(DSV4Config, name)())
    assert {"gemv", "moe", "attention", "rms_norm", "router", "mhc_pre"} <= {kernel.name for kernel, _, _ in found}
    random.Random(datetime.now(UTC).date().toordinal()).shuffle(found)
    problems = []
    for kernel, shape, config in found if ALL else found[:FEW]:
        for target in ("sm_90a", *(["sm_100a"] if kernel.name in PORTABLE else [])):
            _, facts = kernel.build(shape, config, target)
            used = facts["kernels"]
            if not used or any(k["stack"] or k["registers"] > 255 or k["shared"] > 227 << 10 for k in used.values()):
                problems.append(f"{kernel.name} {shape} {config} {target}: {used}")
    assert not problems, "\n".join(problems)


def test_without_reuse_no_list_is_longer_than_the_ring_of_attention_by_warpgroups(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setenv("DSV4_ARCH", "sm_90a")
    once = importlib.import_module("benchmarks.once")
    over = {}
    for reuse in (True, False):
        over[reuse] = []
        for call in once.all_calls(torch.device("cpu"), reuse):
            launched = once.launches_of(lambda device, call=call: [call]) if call[1].name == "attention" else []
            rows = sum(call[2][name].shape[-1] for name in ("window", "index") if call[2].get(name) is not None)
            over[reuse] += [rows - c.rows * c.stages for k, _, c in launched if k.name == "attention_wide"]
    assert max(over[False]) <= 0 < max(over[True])
