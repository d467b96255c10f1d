"""Several linear layers of the same vectors in one launch: what is found on a GPU, and on one the numbers."""

import os
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from torch.nn import functional as F

from dsv4_compile.config import Config
from dsv4_compile.lowerings import OPS
from dsv4_compile.lowerings.linears import LINEARS, NORMED
from dsv4_compile.passes import PassManager
from dsv4_compile.patterns import RULES
from dsv4_compile.reference_model.quant import quantize


def traced(f, *args):
    """What the rules make of a function of meta tensors: (rule, op) of each site."""
    from dsv4_compile.warm import look

    manager = PassManager(Config(inner="eager"), RULES, OPS)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(f, backend=partial(look, manager), fullgraph=True, dynamic=False)(*args)
    return [site.op for graph in manager.report.graphs for site in graph.sites if site.fusion == "fuse.linears"]


def weights(*rows, K=64, dtype=torch.bfloat16):
    return [torch.empty(r, K, dtype=dtype, device="meta") for r in rows]


def wide(x, w):
    return F.linear(x.float(), w.float())


def test_all_readers_of_the_same_vectors_are_one_op():
    a, b, c, other = weights(48, 16, 24, 40)
    x, z = torch.empty(1, 1, 64, dtype=torch.bfloat16, device="meta"), torch.empty(1, 64, device="meta")
    readers = lambda x, z, a, b, c, other: (  # noqa: E731
        F.linear(x, a), wide(x, b), F.linear(x.view(1, 64), c), F.linear(z.to(x.dtype), other)
    )  # fmt: skip
    assert traced(readers, x, z, a, b, c, other) == ["linears_3"]


def test_a_norm_in_front_is_made_on_the_way_if_nobody_else_reads_it():
    def layers(x, weight, a, b, more):
        y = x.float()
        y = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6) * weight).to(x.dtype)
        return F.linear(y.view(1, 64), a), F.linear(y, b), y * 2 if more else None

    (a, b), weight = weights(48, 16), torch.empty(64, device="meta")
    x = torch.empty(1, 1, 64, dtype=torch.bfloat16, device="meta")
    assert traced(layers, x, weight, a, b, False) == ["normed_linears_2"]
    assert traced(layers, x, weight, a, b, True) == ["linears_2"]


def test_more_than_one_launch_takes_are_two():
    many = weights(*range(16, 16 * 11, 16))
    x = torch.empty(2, 64, dtype=torch.bfloat16, device="meta")
    assert traced(lambda x, many: [F.linear(x, w) for w in many], x, many) == ["linears_7", "linears_3"]


def of(rows, dtypes):
    """Matrices of these dtypes, and so many vectors."""
    x = torch.empty(rows, 64, dtype=torch.float32 if torch.float32 in dtypes else torch.bfloat16, device="meta")
    each = [weights(32 + 8 * i, dtype=dtype)[0] for i, dtype in enumerate(dtypes)]
    return traced(lambda x, each: [wide(x, w) for w in each], x, each)


def test_two_formats_are_one_launch():
    assert of(2, [torch.bfloat16, torch.float32, torch.bfloat16]) == ["linears_3"]
    assert of(9, [torch.bfloat16, torch.bfloat16]) == [], "many vectors"


def test_the_meaning_is_each_of_them():
    x, (a, b) = torch.randn(3, 64, dtype=torch.float64), torch.randn(2, 5, 64, dtype=torch.float64)
    codes, scale, _ = quantize(torch.randn(7, 64), "fp8")
    got = LINEARS[3](x, a, b, codes, 0b010, None, None, scale)
    want = x @ a.T, x @ b.T, x @ (codes.double() * scale.double().repeat_interleave(128, 0)[:7, :1]).T
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-6, atol=1e-6)
    weight = torch.rand(64, dtype=torch.float64) + 0.5
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3) * weight
    torch.testing.assert_close(NORMED[1](x, weight, 1e-3, a, 0), y @ a.T)
    torch.library.opcheck(
        NORMED[2].target, (x.bfloat16(), weight.float(), 1e-3, a.bfloat16(), b.bfloat16(), 1, None, None)
    )
    narrow = LINEARS[2](x.bfloat16(), a.bfloat16(), b.bfloat16(), 0b10)
    assert [y.dtype for y in narrow] == [torch.bfloat16, torch.float32]
    torch.library.opcheck(LINEARS[2].target, (x.bfloat16(), a.bfloat16(), b.bfloat16(), 0b10, None, None))


kernels = pytest.mark.skipif(find_spec("cutlass") is None, reason="GPU kernels need CuTeDSL")


@kernels
@pytest.mark.parametrize(
    "target", ["sm_90a", "sm_100a"] if os.environ.get("DSV4_TEST_CONFIGS") == "all" else ["sm_90a"]
)
def test_it_compiles_without_a_gpu_and_does_not_spill(target, monkeypatch):
    from dsv4_compile.kernels import linears, stream

    monkeypatch.setattr(stream, "arch", lambda: target)
    one = linears.Shape(2, (40, 64, 24), 256, "fp8", True, "bf16", ("bf16", "bf16", "bf16"))
    other = linears.Shape(2, (40, 17), 256, "bf16", True, "bf16", ("fp32", "bf16"))
    for shape in (one, linears.Mixed(one, other)):
        _, facts = linears.KERNEL.build(shape, next(linears.configs(shape)), target)
        assert facts["kernels"] and all(k["stack"] == 0 for k in facts["kernels"].values()), facts


# On a GPU


def stored(format, rows, K, seed):
    """Weights and scales."""
    g = torch.Generator().manual_seed(seed)
    each = [torch.randn(r, K, generator=g) * K**-0.5 for r in rows]
    if format == "bf16":
        return [w.bfloat16() for w in each], [None] * len(rows)
    return map(list, zip(*(quantize(w, format)[:2] for w in each), strict=True))


ODD = [((64, 512, 256, 256, 1024, 1024, 1024), 1024), ((1, 17), 128), ((15, 16, 33), 192), ((300, 3, 130, 47), 2048)]


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["bf16", "fp8", "mxfp4"])
@pytest.mark.parametrize("M", [1, 3, 8])
@pytest.mark.parametrize(("rows", "K"), ODD, ids=str)
def test_they_are_the_meaning(rows, K, M, format, kernel_parity):
    g, n = torch.Generator().manual_seed(M), len(rows)
    x, z = torch.randn(2, M, K, generator=g).bfloat16().unbind(0)
    (ws, ss), (vs, ts) = stored(format, rows, K, 3), stored(format, rows, K, 4)
    flags = 0b1010101 & ((1 << n) - 1) if format == "bf16" else 0
    kernel_parity(LINEARS[n], x, *ws, flags, *ss, others=(z, *vs, flags, *ts), rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("formats", [("fp8", "bf16"), ("bf16", "mxfp4"), ("mxfp4", "fp8")], ids=" ".join)
@pytest.mark.parametrize("M", [1, 3, 8])
@pytest.mark.parametrize(("rows", "K"), [*ODD, ((1024, 64, 512, 256, 256, 1024, 1024), 4096)], ids=str)
def test_of_two_formats_they_are_the_meaning(rows, K, M, formats, kernel_parity):
    def given(seed):
        g, ws, ss = torch.Generator().manual_seed(seed), [], []
        for i, r in enumerate(rows):
            (w,), (s,) = stored(formats[i % 2], (r,), K, seed + i)
            ws, ss = [*ws, w], [*ss, s]
        wide = sum(1 << i for i in range(len(rows)) if formats[i % 2] == "bf16" and i % 3)
        return torch.randn(M, K, generator=g).bfloat16(), *ws, wide, *ss

    kernel_parity(LINEARS[len(rows)], *given(M), others=given(M + 9), rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("weight", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("format", ["bf16", "fp8"])
@pytest.mark.parametrize(
    ("M", "rows", "K"), [(1, (640, 256), 1024), (3, (100,), 72 * 16), (8, (4096,), 1024), (2, (33, 5), 96)]
)
def test_a_norm_in_front_is_the_meaning(M, rows, K, format, weight, kernel_parity):
    def given(seed):
        g = torch.Generator().manual_seed(seed)
        x, norm = torch.randn(M, K, generator=g) * 3, torch.rand(K, generator=g) + 0.5
        ws, ss = stored(format, rows, K, seed)
        return x.bfloat16(), norm.to(weight), 1e-6, *ws, 0, *ss

    kernel_parity(NORMED[len(rows)], *given(0), others=given(1), rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 2, 8])
@pytest.mark.parametrize("format", ["bf16", "fp8"])
def test_each_is_as_exact_as_eager(format, M):
    rows, K = (1024, 512, 256), 4096
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(M)).bfloat16().cuda()
    ws, ss = stored(format, rows, K, 5)
    ws, ss = ([None if t is None else t.cuda() for t in ts] for ts in (ws, ss))
    meaning = LINEARS[3].meaning
    want = meaning(x.double(), *(w.double() if s is None else w for w, s in zip(ws, ss, strict=True)), 0, *ss)
    for kernel, eager, exact in zip(LINEARS[3](x, *ws, 0, *ss), meaning(x, *ws, 0, *ss), want, strict=True):
        error, bound = ((y.double() - exact).square().mean().sqrt() for y in (kernel, eager))
        assert error <= 1.05 * bound
