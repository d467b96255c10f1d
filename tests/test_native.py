"""The C++ of the CPU: equal to PyTorch's calls, which run where there is no compiler or a layout that it does not take."""

import pytest
import torch

from dsv4_compile.lowerings import native
from dsv4_compile.lowerings.dequantize import dequantize
from dsv4_compile.lowerings.linear import grouped_linear, linear
from dsv4_compile.lowerings.mhc import mhc_pre
from dsv4_compile.lowerings.moe import moe
from dsv4_compile.reference_model.quant import quantize

FORMATS = ["none", "fp8", "mxfp4", "nvfp4"]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(format, *shape, seed=0):
    return quantize(random(*shape, seed=seed), format)


def experts(format, N=3, k=2, X=7, D=96, I=64):
    weights = [stored(format, *s, seed=i) for i, s in enumerate([(X, I, D), (X, I, D), (X, D, I)])]
    w, s, t = zip(*weights, strict=True)
    chosen = torch.randint(0, X, (N, k), generator=torch.Generator().manual_seed(3))
    return random(N, D), chosen, random(N, k, seed=5).abs(), *w, 1.0, *s, *t


def streams(n, D):
    m = (2 + n) * n
    return random(2, 3, n, D), random(m, n * D) / 9, random(m), random(3), 5, 1e-4, 1e-3


CALLS = {
    **{f"linear {f}": (linear, lambda f=f: (random(2, 160), *stored(f, 6, 160))) for f in FORMATS[1:]},
    **{f"grouped {f}": (grouped_linear, lambda f=f: (random(3, 2, 160), *stored(f, 6, 160))) for f in FORMATS[1:]},
    **{f"dequantize {f}": (dequantize, lambda f=f: stored(f, 2, 5, 96)) for f in FORMATS[1:]},
    **{f"moe {f}": (moe, lambda f=f: experts(f)) for f in FORMATS},
    **{f"mhc_pre {s}": (mhc_pre, lambda s=s: streams(*s)) for s in ((4, 192), (3, 5), (1, 1))},
}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("built", [True, False], ids=["C++", "calls"])
@pytest.mark.parametrize("call", CALLS)
def test_with_and_without_a_compiler(call, built, monkeypatch):
    op, make = CALLS[call]
    assert native.library() is not None
    if not built:
        monkeypatch.setattr(native, "library", lambda: None)
    args = make()
    got, want = (r if isinstance(r, tuple) else (r,) for r in (op(*args), op.meaning(*args)))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=2e-5, atol=2e-5 * float(w.abs().max()))


def test_a_compiler_that_fails_is_none(monkeypatch):
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.exc import CppCompileError

    def load(source):
        raise CppCompileError(["c++"], "no")

    monkeypatch.setattr(CppCodeCache, "load", load)
    assert native.library.__wrapped__() is None


def test_threads_change_nothing(monkeypatch):
    op, make = CALLS["moe mxfp4"]
    alone, plain = op(*make()), linear(random(2, 160), *stored("fp8", 6, 160))
    monkeypatch.setattr(native, "threads", lambda products: 3)
    assert torch.equal(op(*make()), alone)
    assert torch.equal(linear(random(2, 160), *stored("fp8", 6, 160)), plain)


def test_threads_are_for_large_products(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert [native.threads(n << 18) for n in (0, 1, 2, 3, 100)] == [1, 1, 2, 3, 4]


def test_what_the_functions_do_not_take():
    weight, scale, _ = stored("fp8", 2, 160, 130)
    assert native.described(weight, scale, None) is not None
    for w, s, t in [
        (weight.transpose(1, 2), scale, None),
        (weight, scale[:, :1], None),
        (weight, scale.bfloat16(), None),
        (weight, scale, torch.ones(2)),
        (weight.float().bfloat16(), None, None),
    ]:
        assert native.described(w, s, t) is None
    codes, blocks, whole = stored("nvfp4", 2, 5, 96)
    assert native.described(codes, blocks, whole) is not None
    assert native.described(codes, blocks, None) is None and native.described(codes, blocks, whole[:1]) is None


@pytest.mark.parametrize("expert", [-1, 7])
def test_an_expert_that_does_not_exist_is_an_error(expert):
    x, chosen, *rest = experts("mxfp4")
    chosen[1, 1] = expert
    with pytest.raises(IndexError):
        moe(x, chosen, *rest)


def test_a_second_scale_in_double_precision_is_not_read_as_floats():
    codes, scale, scale_2 = quantize(torch.randn(32, 64), "nvfp4")
    want = dequantize.meaning(codes, scale, scale_2)
    torch.testing.assert_close(dequantize(codes, scale, scale_2.double()).float(), want, rtol=1e-5, atol=1e-6)
