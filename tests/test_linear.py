"""Linear layers over stored weights: the ops against the formula, and what raises to them."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dispatch.python import enable_python_dispatcher
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from dsv4_compile.config import Config
from dsv4_compile.lowerings.linear import columns_at_once, grouped_linear, linear, linear_wide
from dsv4_compile.passes import PassManager
from dsv4_compile.patterns import linear as patterns
from dsv4_compile.reference_model.layers import Linear
from dsv4_compile.reference_model.quant import dequantize, quantize
from dsv4_compile.tuning import FEW

FORMATS = ["fp8", "mxfp4", "nvfp4"]
OPS = [linear, grouped_linear]


def stored(format, N, K, seed=0):
    """A random weight [N, K] in a format, rows of very different size, and the numbers that it stands for, in fp64."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=g) * 2.0 ** torch.randint(-9, 9, (N, 1), generator=g)
    parts = quantize(weight, format)
    return parts, dequantize(*parts, format).double()


def case(op, format, M, G, R, K, dtype=torch.float32, seed=0):
    """Arguments of the op, what the formula says, and the sums of the magnitudes, by which errors are measured."""
    parts, W = stored(format, G * R, K, seed)
    g = torch.Generator().manual_seed(seed + 1)
    shape = (M, K) if op is linear else (G, M, K)
    x = torch.randn(shape, generator=g).to(dtype)
    groups = W.unflatten(0, (G, R)) if op is grouped_linear else W
    products = x.double().unsqueeze(-2) * groups.unsqueeze(-3)
    return (x, *parts), products.sum(-1), products.abs().sum(-1)


def close(got, want, size, tolerance):
    assert got.shape == want.shape and ((got.double() - want).abs() <= tolerance * size).all()


SHAPES = [(1, 3, 64, 96), (FEW + 1, 2, 100, 160), (3, 1, 1, 32), (2, 5, 51, 288), (0, 2, 3, 32)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("op", OPS, ids=lambda o: o.name)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_meaning_and_cpu_say_what_the_formula_says(op, format, shape):
    args, *want = case(op, format, *shape)
    for run in (op, op.meaning):
        got = run(*args)
        assert got.dtype == torch.float32 and got.is_contiguous()
        close(got, *want, 1e-6)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(OPS),
    st.integers(1, 2 * FEW),
    st.integers(1, 3),
    st.integers(1, 150),
    st.integers(1, 300),
    st.integers(0, 99),
)
def test_ragged_blocks(op, M, G, R, K, seed):
    args, *want = case(op, "fp8", M, G, R, K, seed=seed)
    close(op(*args), *want, 1e-6)
    close(op(args[0].double(), *args[1:]), *want, 1e-14)


@pytest.mark.parametrize("op", OPS, ids=lambda o: o.name)
@pytest.mark.parametrize("M", [1, FEW + 1])
def test_the_weight_is_rounded_to_the_dtype_of_x(op, M):
    args, *want = case(op, "fp8", M, 2, 70, 200, torch.bfloat16)
    for run in (op, op.meaning):
        got = run(*args)
        assert got.dtype == torch.bfloat16
        close(got, *want, 2**-7)


@pytest.mark.parametrize("M", [1, FEW + 1])
def test_a_number_that_is_none_stays_in_its_row_and_large_scales_do_not_overflow(M):
    for byte in (0x7F, 0xFF):
        (x, weight, scale, _), *_ = case(linear, "fp8", M, 1, 140, 130)
        weight.view(torch.uint8)[5, 7] = byte
        got = linear(x, weight, scale, None)
        assert got.isnan().any(0).nonzero().flatten().tolist() == [5]
    scale = torch.full_like(scale.view(torch.uint8), 254).view(scale.dtype)  # 2^127
    weight = torch.full_like(weight.view(torch.uint8), 1).view(weight.dtype)  # 2^-9
    x = torch.full_like(x, 2.0**-8)
    torch.testing.assert_close(linear(x, weight, scale, None), linear.meaning(x, weight, scale, None))


@pytest.mark.parametrize("op", OPS, ids=lambda o: o.name)
def test_strides_do_not_matter_and_the_op_is_sound(op):
    (x, *parts), *want = case(op, "mxfp4", 3, 2, 5, 64)
    spread = torch.stack([x, x], -1)[..., 0]
    close(op(spread, *parts), *want, 1e-6)
    checks = (
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    )  # test_schema negates inputs
    torch.library.opcheck(op.target, (x, *parts), test_utils=checks)


def test_costs_count_the_stored_bytes():
    (x, *parts), *_ = case(linear, "fp8", 3, 1, 140, 130)
    sizes = linear.bound_sizes(linear.arguments(x, *parts))
    cost = linear.symbolic_cost().at(**sizes)
    assert (cost.flops, cost.write) == (2 * 3 * 140 * 130 + 140 * 130, 2 * 3 * 140)
    assert 0 < cost.read - 140 * 130 - 2 * 3 * 130 < 5
    (x, *parts), *_ = case(grouped_linear, "mxfp4", 3, 2, 70, 64)
    assert grouped_linear.bound_sizes(grouped_linear.arguments(x, *parts)) == dict(
        G=2, M=3, R=70, K=64, bits=4, block=32
    )


# -- raising


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3)])
def test_the_models_layers_raise(rewritten, dtype, shape):
    first, grouped = Linear(96, 90, "fp8"), Linear(30, 42, "fp8")

    def projections(x):
        u = first(x).unflatten(-1, (3, -1))
        return torch.einsum("btgk,grk->btgr", u, grouped.dense(x.dtype).unflatten(0, (3, -1))).flatten(-2)

    x = torch.randn(*shape, 96).to(dtype)
    result, report = rewritten(projections, x)
    assert report.rules["fuse.linear"] == 2
    assert report.runs == {("linear", "cpu"): 1, ("grouped_linear", "cpu"): 1}
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(result, projections(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("M", [1, 3])
@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
def test_four_bits_raise(rewritten, format, M, dtype):
    """One matrix, and groups of its rows; NVFP4 has one second scale for all of it."""
    parts, _ = stored(format, 42, 64)
    x, groups = torch.randn(2, M, 64).to(dtype), torch.randn(2, M, 3, 64).to(dtype)

    def products(x, groups):
        w = dequantize(*parts, format).to(dtype)
        other = dequantize(parts[0] ^ 1, *parts[1:], format).to(dtype).unflatten(0, (3, -1))
        return F.linear(x, w), torch.einsum("btgk,grk->btgr", groups, other)

    result, report = rewritten(products, x, groups)
    assert report.rules["raise.dequantize"] == 2 and report.runs == {("linear", "cpu"): 1, ("grouped_linear", "cpu"): 1}
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for got, want in zip(result, products(x, groups), strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * want.abs().max().item())


def test_a_second_scale_for_each_row_is_no_format(rewritten):
    weight, scale, _ = stored("nvfp4", 40, 64)[0]
    f = lambda x, s: F.linear(x, dequantize(weight, scale, torch.ones(()), "nvfp4") * s)  # noqa: E731
    x, s = torch.randn(3, 64), torch.rand(40, 1)
    result, report = rewritten(f, x, s)
    assert report.rules["fuse.linear"] == 0
    torch.testing.assert_close(result, f(x, s))


def test_a_symbolic_length_stays_symbolic(rewritten):
    layer, x = Linear(64, 40, "fp8"), torch.randn(2, 5, 64)
    torch._dynamo.mark_dynamic(x, 1)
    result, report = rewritten(layer, x)
    assert report.rules["fuse.linear"] == 1
    torch.testing.assert_close(result, layer(x))


NOT_LINEAR = {
    "the weight is also read elsewhere": lambda x, w: (x @ w.t(), w.sum(0)),
    "not transposed": lambda x, w: x @ w,
    "a sum": lambda x, w: x + w,
    "groups of columns": lambda x, w: torch.einsum("mgk,rgk->gmr", x.view(40, 4, 10), w.view(40, 4, 10)),
    "groups that are not transposed": lambda x, w: torch.bmm(x.view(4, 10, 40)[..., :10], w.view(4, 10, 40)),
}


@pytest.mark.parametrize("wrong", NOT_LINEAR.values(), ids=NOT_LINEAR)
def test_what_is_no_linear_stays(rewritten, wrong):
    parts, _ = stored("fp8", 40, 40)
    f = lambda x: wrong(x, dequantize(*parts, "fp8"))  # noqa: E731
    x = torch.randn(40, 40)
    result, report = rewritten(f, x)
    assert report.rules["fuse.linear"] == 0 and report.rules["raise.dequantize"] == 1
    torch.testing.assert_close(result, f(x))


# -- plain weights, on a GPU


def raised_on_a_gpu(f, *args):
    """(report, graph) of f on fake tensors of a GPU, which need none: the rules of plain weights alone, the ops left as they
    are found."""
    manager = PassManager(
        Config(inner="eager", strict=True), (patterns.wide, patterns.plain, patterns.grouped_plain), ()
    )
    with FakeTensorMode(), enable_python_dispatcher():
        fakes = [torch.empty(a.shape, dtype=a.dtype, device="cuda") for a in args]
        traced = make_fx(f, select_decomp_table())(*fakes)
        manager(traced.graph)
    found = Counter(n.target for n in traced.graph.nodes if str(n.target).startswith("dsv4."))
    return {op.name: found[op.target] for op in (linear, grouped_linear, linear_wide) if found[op.target]}


def projected(x, weight, wide, blocks):
    y = F.linear(x, weight)
    scores = F.linear(x.float(), wide.float())
    groups = torch.einsum("btgk,grk->btgr", x.unflatten(-1, (4, -1)), blocks.unflatten(0, (4, -1)))
    return y, scores, groups


@pytest.mark.parametrize("tokens", [1, FEW, FEW + 1, 500])
def test_plain_weights_are_sites_on_a_gpu_for_few_rows(tokens):
    """Or for any number, where the result of 16 bits is wide: nobody makes a wide copy of them."""
    args = [torch.empty(s, dtype=torch.bfloat16) for s in ((1, tokens, 64), (40, 64), (24, 64), (20, 16))]
    narrow = {"linear": 1, "grouped_linear": 1} if tokens <= FEW else {}
    assert raised_on_a_gpu(projected, *args) == narrow | {"linear_wide": 1}


@pytest.mark.parametrize("tokens", [5 * FEW, 5 * FEW + 1])
def test_wide_results_of_other_numbers_are_sites_for_few_rows(tokens):
    """PyTorch's own way to them writes and reads wide copies of the weights: five times the bytes."""
    x, weight = torch.empty(tokens, 64, dtype=torch.bfloat16), torch.empty(24, 64, dtype=torch.float16)
    found = raised_on_a_gpu(lambda x, w: F.linear(x.float(), w.float()), x, weight)
    assert found == ({"linear_wide": 1} if tokens <= 5 * FEW else {})


def test_products_of_two_computed_sides_are_none():
    x, w, v = torch.empty(4, 64), torch.empty(40, 30), torch.empty(30, 64)
    assert raised_on_a_gpu(lambda x, w, v: x @ (w @ v).t(), x, w, v) == {}
    assert raised_on_a_gpu(torch.mm, x, torch.empty(64, 64)) == {}  # not transposed


def test_on_the_cpu_plain_weights_are_none(rewritten):
    x, weight = torch.randn(2, 64), torch.randn(40, 64)
    result, report = rewritten(lambda x: F.linear(x, weight), x)
    assert report.rules["fuse.linear"] == 0 and not report.runs
    torch.testing.assert_close(result, F.linear(x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_plain_weights_are_multiplied(dtype):
    x, weight = torch.randn(3, 64).to(dtype), torch.randn(12, 64).to(dtype)
    for run in (linear, linear.meaning):
        torch.testing.assert_close(run(x, weight), F.linear(x, weight))
    blocks = F.linear(x, weight[:6]), F.linear(2 * x, weight[6:])
    for run in (grouped_linear, grouped_linear.meaning):
        torch.testing.assert_close(run(torch.stack([x, 2 * x]), weight), torch.stack(blocks))
    wide = F.linear(x.double(), weight.double())
    got = linear_wide(x, weight)
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(got.double(), wide, rtol=1e-5, atol=1e-5)
    torch.library.opcheck(linear_wide.target, (x, weight))
    cost = linear.symbolic_cost().at(**linear.bound_sizes(linear.arguments(x, weight)))
    assert cost.read == 12 * 64 * dtype.itemsize + 2 * 3 * 64


MANY = [(16, 124, 4096), (64, 129, 1025), (9, 1, 8), (1000, 256, 200), (77, 33, 1024), (0, 5, 1000), (12, 7, 0)]


@pytest.mark.parametrize(("few", "most"), [(2**26, 2**28), (2**18, 2**28), (2**14, 2**16)])
@pytest.mark.parametrize(("M", "N", "K"), MANY)
def test_many_rows_are_multiplied_some_columns_at_a_time(M, N, K, few, most, monkeypatch):
    """By cuBLAS: here fp32 products stand in for its own."""
    by_cublas = next(i.run for i in linear_wide.implementations if i.arch is None)
    for product in (torch.mm, torch.bmm):
        wide = lambda a, b, out_dtype, product=product: product(a.to(out_dtype), b.to(out_dtype))  # noqa: E731
        monkeypatch.setattr(torch, product.__name__, wide)
    monkeypatch.setattr("dsv4_compile.lowerings.linear.FEW_SUMS", few)
    monkeypatch.setattr("dsv4_compile.lowerings.linear.MOST_SUMS", most)
    x, weight = torch.randn(M, K).bfloat16(), torch.randn(N, K).bfloat16()
    torch.testing.assert_close(by_cublas(x, weight), F.linear(x.float(), weight.float()), rtol=1e-5, atol=1e-4)


def test_the_more_partial_sums_the_more_columns_each_has():
    assert columns_at_once(64, 1024, 4096) == 128
    assert columns_at_once(512, 1024, 4096) == 256
    assert columns_at_once(4096, 1024, 4096) == columns_at_once(64, 129280, 4096) == 512


def test_operands_that_were_written_back_alike_are_told_apart(rewritten):
    """Two products of one shape, written back, are the operands of an op that is written back after them."""
    (a, a_scale, _), (b, b_scale, _) = (quantize(torch.randn(64, 192), "fp8") for _ in range(2))
    x = torch.randn(1, 192)

    def f(x, a, b):
        gate = F.linear(x, dequantize(a, a_scale, None, "fp8"))
        up = F.linear(x, dequantize(b, b_scale, None, "fp8"))
        return F.silu(gate.clamp(max=10.0)) * up.clamp(-10.0, 10.0)

    with torch.no_grad():
        result, report = rewritten(f, x, a, b, lowerings="none")
    assert report.counts["linear"] == 2
    torch.testing.assert_close(result, f(x, a, b))
