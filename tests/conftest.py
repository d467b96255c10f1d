"""Fixtures that all tests share."""

from functools import partial

import pytest
import torch

PLAIN = torch.bfloat16, torch.float32  # what is widened for an oracle; stored weights are not
torch.set_num_threads(1)  # small tensors: threads would only wait for each other, most of all beside other processes


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` are skipped where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


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


@pytest.fixture
def kernel_parity(poisoned):
    """kernel_parity(op, *args, rtol, atol): the op's kernel, on a GPU, against its meaning in fp64 on the CPU: three launches
    in a row, then captured, with other inputs at replay. Integers must be equal."""

    def several(result):
        return result if isinstance(result, tuple) else (result,)

    def moved(args, device, wide=False):
        return [
            (a.double() if wide and a.dtype in PLAIN else a).to(device, copy=True) if torch.is_tensor(a) else a
            for a in args
        ]

    def check(op, *args, rtol, atol, others=None):
        def compare(got, args):
            for g, w in zip(several(got), several(op.meaning(*moved(args, "cpu", wide=True))), strict=True):
                assert g.shape == w.shape and g.is_contiguous()
                if g.is_floating_point():
                    torch.testing.assert_close(g.cpu().double(), w.double(), rtol=rtol, atol=atol)
                else:
                    assert torch.equal(g.cpu(), w)

        here = moved(args, "cuda")
        implementation, reasons = op.claim(op.arguments(*here))
        assert implementation is not None and implementation.device == "cuda", reasons
        for _ in range(3):
            compare(op(*here), args)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = op(*here)
        for static, other in zip(here, args if others is None else others, strict=True):
            if torch.is_tensor(static):
                static.copy_(other)
        graph.replay()
        compare(got, args if others is None else others)

    return check
