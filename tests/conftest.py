"""Fixtures that all tests share."""

from functools import partial

import pytest
import torch

torch.set_num_threads(1)  # small tensors: threads would only wait for each other, most of all beside other processes


@pytest.fixture(autouse=True)
def fresh():
    """Every test compiles anew and draws the same numbers."""
    torch.manual_seed(0)
    torch._dynamo.reset()


@pytest.fixture
def poisoned():
    """Memory that an implementation allocates and does not write is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def rewritten():
    """rewritten(f, *args, **options) -> (result, Report): f compiled without code generation, as one graph, under strict,
    with the ops left to whoever can run them at all."""
    from dsv4_compile.backend import backend

    def run(f, *args, **options):
        reports = []
        chosen = {"inner": "eager", "strict": True, "lowerings": "c*"} | options
        compiled = torch.compile(f, backend=partial(backend, options=chosen, observe=reports.append), fullgraph=True)
        result = compiled(*args)
        (report,) = reports
        return result, report

    return run


@pytest.fixture
def rewritten_by():
    """rewritten_by(rules, f, *args, **config) -> (result, Report): as `rewritten`, with these rules alone."""
    from dsv4_compile.backend import build
    from dsv4_compile.config import Config
    from dsv4_compile.lowerings import OPS
    from dsv4_compile.passes import PassManager

    def run(rules, f, *args, **config):
        manager = PassManager(
            Config(**({"inner": "eager", "strict": True, "lowerings": ("cpu", "cuda")} | config)),
            tuple(rules),
            tuple({*OPS, *(r.op for r in rules)}),
        )
        compiled = torch.compile(f, backend=lambda gm, inputs: build(gm, inputs, manager), fullgraph=True)
        return compiled(*args), manager.report

    return run
