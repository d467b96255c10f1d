"""A second process with the same caches: no pass runs, Inductor compiles nothing, no kernel is built, and the report says
what it said. This file is also what both processes run."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor import cpp_builder, cpu_vec_isa

import dsv4_compile
from dsv4_compile.backend import chosen_inner
from dsv4_compile.kernel import MONITOR
from dsv4_compile.passes import PassManager
from dsv4_compile.reference_model.layers import RMSNorm


class Layer(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = RMSNorm(width, 1e-6)

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(x)


class Stack(nn.Module):
    """Layers that share a body, and something behind them: two graphs."""

    def __init__(self, layers: int, width: int):
        super().__init__()
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return torch.softmax(x, -1)


def start() -> dict[str, Any]:
    """Compile and run; what that took, and the report."""
    done = dict.fromkeys(("passes", "builds"), 0)

    def counted(name: str, f: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            done[name] += 1
            return f(*args, **kwargs)

        return call

    counters.clear()
    MONITOR.compiled.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PassManager, "__call__", counted("passes", PassManager.__call__))
        patch.setattr(cpp_builder.CppBuilder, "build", counted("builds", cpp_builder.CppBuilder.build))
        patch.setattr(cpu_vec_isa, "valid_vec_isa_list", list)  # else the processor is tried out, by compiling for it
        patch.setattr(inductor, "cpp_cache_precompile_headers", False)  # they pay for more kernels than these
        model, x = Stack(3, 8).requires_grad_(False), torch.linspace(-1, 1, 40).view(5, 8)
        result = torch.compile(model, backend="dsv4", fullgraph=True)(x)
    torch.testing.assert_close(result, model(x))
    report = dsv4_compile.reports()[-1]
    text = str(report).splitlines()
    return done | {
        "kernels": len(MONITOR.compiled),
        "misses": counters["inductor"]["fxgraph_cache_miss"] + counters["inductor"]["fxgraph_cache_bypass"],
        "hits": counters["inductor"]["fxgraph_cache_hit"],
        "rules": dict(report.rules),
        "stored": report.stored,
        "text": [line for line in text[1:] if "loaded from cache" not in line],  # the first tells nodes and seconds
    }


def again() -> dict[str, Any]:
    """`start` in a process of its own: keys of Inductor differ between pytest's and others."""
    done = subprocess.run([sys.executable, "-P", Path(__file__)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(chosen_inner(None, [torch.empty(0)]) == "eager", reason="no C++ compiler")
def test_a_second_process_does_nothing_again(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    cold, warm = (again() for _ in range(2))
    assert cold["passes"] == cold["misses"] == 2 and cold["builds"] and not cold["hits"] and not cold["stored"]
    assert (cold["rules"]["raise.rms_norm"], cold["rules"]["raise.softmax"]) == (3, 1)
    assert warm["passes"] == warm["misses"] == warm["builds"] == warm["kernels"] == 0
    assert warm["hits"] == cold["misses"] and warm["stored"]
    assert warm["rules"] == cold["rules"] and warm["text"] == cold["text"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(start()))
