"""The end of the shared expert: what is found on a GPU, and on one the numbers."""

import os
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from torch.nn import functional as F

from dsv4_compile.config import Config
from dsv4_compile.lowerings import OPS
from dsv4_compile.lowerings.shared_expert import shared_expert
from dsv4_compile.passes import PassManager
from dsv4_compile.patterns import RULES
from dsv4_compile.reference_model.quant import quantize


def found(end, x, *args):
    """Whether the rule finds a function of meta tensors."""
    from dsv4_compile.warm import look

    manager = PassManager(Config(inner="eager"), RULES, OPS)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(end, backend=partial(look, manager), fullgraph=True, dynamic=False)(x, *args)
    return [site.op for graph in manager.report.graphs for site in graph.sites].count("shared_expert")


def product(x, w1, w3, w2):
    g, u = F.linear(x, w1).float(), F.linear(x, w3).float()
    h = F.silu(g.clamp(max=10.0)) * u.clamp(-10.0, 10.0)
    return F.linear(h.to(x.dtype), w2).float()


def end(x, w1, w3, w2, routed):
    return (routed + product(x, w1, w3, w2)).to(x.dtype)


def read_twice(x, w1, w3, w2, routed):
    y = product(x, w1, w3, w2)
    return (routed + y).to(x.dtype), y * 2


def arguments(M=1, K=32, N=48, device="meta", dtype=torch.bfloat16):
    matrices = [torch.randn(*s, device=device, dtype=dtype) for s in ((K, N), (K, N), (N, K))]
    return torch.randn(M, N, device=device, dtype=dtype), *matrices, torch.randn(M, N, device=device)


def test_it_is_found_where_its_vectors_are_few():
    assert found(end, *arguments()) == 1 and found(end, *arguments(M=9)) == 0


def test_a_product_that_somebody_else_reads_is_left_alone():
    assert found(read_twice, *arguments()) == 0


def test_the_streams_that_it_goes_into_are_found():
    def layer(x, w1, w3, w2, routed, X, post, comb):
        y = end(x, w1, w3, w2, routed).view(1, -1, x.shape[-1])
        mixed = torch.einsum("btjk,btjd->btkd", comb, X.float())
        return (post.unsqueeze(-1) * y.float().unsqueeze(-2) + mixed).to(X.dtype)

    x, *rest = arguments(M=3)
    X = torch.randn(1, 3, 4, x.shape[1], device="meta", dtype=x.dtype)
    post, comb = torch.randn(1, 3, 4, device="meta"), torch.randn(1, 3, 4, 4, device="meta")
    assert found(layer, x, *rest, X, post, comb) == 2, "without the streams, then with them"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_meaning_is_the_formula(dtype):
    gate, up, w, routed = (torch.randn(*s, dtype=dtype) * 3 for s in ((3, 32), (3, 32), (7, 32), (3, 7)))
    routed = routed.to(torch.promote_types(dtype, torch.float32))
    h = F.silu(gate.double().clamp(max=2.0)) * up.double().clamp(-2.0, 2.0)
    want = routed.double() + (h.to(dtype) @ w.T).double()
    got = shared_expert(gate, up, w, routed, 2.0)
    assert got.dtype == dtype
    torch.testing.assert_close(got, want.to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    torch.library.opcheck(shared_expert.target, (gate, up, w, routed, 2.0, *[None] * 5))
    X, post, comb = (
        torch.randn(3, 2, 7, dtype=dtype),
        torch.rand(3, 2).to(routed.dtype),
        torch.rand(3, 2, 2).to(routed.dtype),
    )
    mixed = shared_expert(gate, up, w, routed, 2.0, None, None, X, post, comb)
    want = post.double().unsqueeze(-1) * got.double().unsqueeze(-2) + comb.double().mT @ X.double()
    torch.testing.assert_close(mixed, want.to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    torch.library.opcheck(shared_expert.target, (gate, up, w, routed, 2.0, None, None, X, post, comb))


@pytest.mark.skipif(find_spec("cutlass") is None, reason="GPU kernels need CuTeDSL")
@pytest.mark.parametrize(
    "target", ["sm_90a", "sm_100a"] if os.environ.get("DSV4_TEST_CONFIGS") == "all" else ["sm_90a"]
)
def test_it_compiles_without_a_gpu_and_does_not_spill(target, monkeypatch):
    from dsv4_compile.kernels import shared_expert as kernel
    from dsv4_compile.kernels import stream

    monkeypatch.setattr(stream, "arch", lambda: target)
    shape = kernel.Shape(2, 40, 256, "fp8", True, "bf16", 4)
    _, facts = kernel.KERNEL.build(shape, next(kernel.configs(shape)), target)
    assert facts["kernels"] and all(k["stack"] == 0 for k in facts["kernels"].values()), facts


# On a GPU


def given(format, M, N, K, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    gate, up = (torch.randn(2, M, K, generator=g) * 3).to(dtype).unbind(0)
    w = torch.randn(N, K, generator=g) * K**-0.5
    scales = ()
    if format == "bf16":
        w = w.bfloat16()
    else:
        w, *scales = quantize(w, format)
    return gate, up, w, torch.randn(M, N, generator=g), 4.0, *scales


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("format", ["bf16", "fp8", "mxfp4", "nvfp4"])
@pytest.mark.parametrize(("M", "N", "K"), [(1, 4096, 2048), (1, 17, 64), (3, 200, 1056), (4, 33, 512)])
def test_the_kernel_is_the_meaning(M, N, K, format, dtype, kernel_parity):
    # the product is rounded before the sum, which may cancel
    rtol, atol = (1e-2, 6e-2) if dtype == torch.bfloat16 else (2e-5, 2e-5)
    args, others = (given(format, M, N, K, dtype, seed) for seed in (0, 1))
    kernel_parity(shared_expert, *args, others=others, rtol=rtol, atol=atol)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("M", "N", "K", "n"), [(1, 4096, 2048, 4), (2, 17, 64, 1), (4, 200, 1056, 3)])
def test_into_streams_the_kernel_is_the_meaning(M, N, K, n, dtype, kernel_parity):
    def with_streams(seed):
        g = torch.Generator().manual_seed(seed)
        X = torch.randn(M, n, N, generator=g).to(dtype)
        return (
            *given("bf16", M, N, K, dtype, seed),
            None,
            None,
            X,
            *(torch.rand(M, *s, generator=g) for s in ((n,), (n, n))),
        )

    rtol, atol = (1e-2, 6e-2) if dtype == torch.bfloat16 else (2e-5, 2e-5)
    kernel_parity(shared_expert, *with_streams(0), others=with_streams(1), rtol=rtol, atol=atol)


@pytest.mark.gpu
@pytest.mark.parametrize("strange", [float("nan"), float("inf"), float("-inf")])
def test_strange_numbers_stay(strange):
    gate, up, w, routed, limit, *_ = (
        t.cuda() if torch.is_tensor(t) else t for t in given("bf16", 2, 64, 64, torch.bfloat16, 0)
    )
    gate[1, 3] = strange
    torch.testing.assert_close(
        shared_expert(gate, up, w, routed, limit), shared_expert.meaning(gate, up, w, routed, limit), equal_nan=True,
        rtol=2e-2, atol=2e-2,
    )  # fmt: skip
