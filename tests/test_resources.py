"""What default configurations take of a processor, read from the binaries: a spill fails.

All launches of a decode step of 1 and 8 tokens at nano's and Flash's sizes are known; a few of their kernels, others every day,
are compiled here, with DSV4_TEST_CONFIGS=all each of them. Nothing is launched.
"""

import importlib
import json
import os
import random
import subprocess
import sys
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


def spilling(name):
    """Kinds of kernels that a model of this name launches, and what spills, of as many as are asked."""
    sys.path.insert(0, str(ROOT))
    found = importlib.import_module("benchmarks.once").launches(getattr(DSV4Config, name)(), SIZES)
    random.Random(datetime.now(UTC).date().toordinal()).shuffle(found)
    problems = []
    for kernel, shape, config in found if ALL else found[:FEW]:
        used = kernel.build(shape, config)[1]["kernels"]
        if not used or any(k["stack"] or k["registers"] > 255 or k["shared"] > 227 << 10 for k in used.values()):
            problems.append(f"{kernel.name} {shape} {config}: {used}")
    return sorted({kernel.name for kernel, _, _ in found}), problems


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize("name", ["nano", "flash"])
def test_default_configurations_do_not_spill(name, arch):
    """For sm_100a, where nobody has tried them, kernels compile and are not run; there none has products of a warpgroup. A
    process is of one architecture."""
    own = os.environ | {"DSV4_ARCH": arch}
    done = subprocess.run([sys.executable, __file__, name], env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kinds, problems = json.loads(done.stdout.splitlines()[-1])
    assert {"gemv", "linears", "experts", "attention", "indexer", "prologue", "mhc_boundary", "rms_norm"} <= {*kinds}
    assert "attention_wide" not in kinds or arch == "sm_90a"
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


if __name__ == "__main__":
    print(json.dumps(spilling(*sys.argv[1:])))
