"""The kernels that stream a matrix for few vectors: configurations on any machine; on a GPU, against fp64 and plain bf16."""

import os
from dataclasses import replace
from importlib.util import find_spec
from itertools import islice, product

import pytest
import torch

if find_spec("cutlass") is None:
    pytest.skip("GPU kernels need CuTeDSL, which has wheels for Linux only", allow_module_level=True)

from dsv4_compile.kernels import division, gemv, stream
from dsv4_compile.kernels import moe as experts
from dsv4_compile.lowerings.gemv import flat, rows_at_once, settled, words
from dsv4_compile.lowerings.linear import grouped_linear, linear, linear_wide
from dsv4_compile.lowerings.moe import moe
from dsv4_compile.reference_model.quant import quantize

STORED = ["fp8", "fp8, scales in fp32", "mxfp4", "nvfp4"]
FORMATS = ["bf16", "fp32", *STORED]
FP8 = gemv.Shape(1, 1, 4096, 4096, "fp8", True, "bf16", "bf16")
FLASH = [
    replace(FP8, R=1024),  # q_a
    replace(FP8, R=32768, K=1024),  # q_b
    replace(FP8, G=8, R=1024, format="bf16"),  # wo_a
    replace(FP8, K=8192),  # wo_b
    replace(FP8, M=8, K=8192),
    replace(FP8, R=129280, format="bf16"),  # head
    replace(FP8, R=256, format="bf16", out="fp32"),  # router
]
PRO = [replace(FP8, K=7168, R=1536), replace(FP8, M=4, K=16384, R=7168)]
NANO = [replace(FP8, K=192, R=64), replace(FP8, K=64, R=192, M=3, dtype="fp32", out="fp32")]
EXPERTS = {
    "flash": experts.Shape(1, 6, 256, 4096, 2048, "mxfp4", True, "bf16"),
    "flash fp8": experts.Shape(8, 6, 256, 4096, 2048, "fp8", True, "bf16"),
    "pro": experts.Shape(8, 6, 384, 7168, 3072, "nvfp4", True, "bf16"),
    "nano": experts.Shape(1, 4, 24, 192, 64, "mxfp4", True, "bf16"),
}


def works():
    for shape in FLASH + PRO + NANO:
        yield shape.work
    for shape in EXPERTS.values():
        yield from (shape.up, shape.down)


@pytest.mark.parametrize("work", list(works()), ids=str)
def test_every_configuration_fits_and_covers_all_columns(work):
    found = list(division.configs_of(work))
    assert len(set(found)) == len(found) > 2
    for config in found:
        assert config.resident * work.shared(config) <= stream.SHARED
        assert work.columns(config) >= work.part(config) and 1 <= work.grid(config) <= work.tiles(config)
        assert work.part(config) * config.split == work.K and work.grid(config) * work.turns(config) >= work.tiles(
            config
        )
    best = found[0]
    assert best.stages >= 3 and work.columns(best) < 2 * work.K + best.warps * work.stored.block


def test_what_the_launches_before_write_is_not_settled(monkeypatch):
    weight, scale, y = torch.nn.Parameter(torch.zeros(8)), torch.nn.Parameter(torch.zeros(2)), torch.zeros(4)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert not settled(y, weight), "outside of a graph somebody may write it at any time"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with torch.no_grad():
        assert settled(y, weight, scale, None) and settled(y, weight.view(2, 4), scale)
    assert not settled(y, weight, torch.zeros(2)), "computed"
    assert settled(weight.data, weight) and settled(y, scale)
    assert not settled(y, weight) and not settled(y, weight), "a launch of this graph has written it"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert not settled(y, weight)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert settled(y, weight), "the next graph"


def builds():
    """Two kernels; on demand, DSV4_TEST_CONFIGS=all, those of all shapes, some minutes on one core."""
    yield gemv.KERNEL, NANO[1]
    yield experts.KERNEL, EXPERTS["flash"]
    if os.environ.get("DSV4_TEST_CONFIGS") == "all":
        for shape in FLASH + PRO + NANO[:1]:
            formats = (
                ["bf16"] if shape.out == "fp32" or shape.R > 1 << 16 else ["bf16", "fp32", "fp8", "mxfp4", "nvfp4"]
            )
            yield from ((gemv.KERNEL, replace(shape, format=format)) for format in formats)
        for shape in EXPERTS.values():
            yield from ((experts.KERNEL, replace(shape, format=format)) for format in ("bf16", "fp8", "mxfp4", "nvfp4"))


@pytest.mark.parametrize("target", ["sm_90a", "sm_100a"])
@pytest.mark.parametrize(("kernel", "shape"), list(builds()), ids=lambda x: getattr(x, "name", None) or str(x))
def test_it_compiles_without_a_gpu_and_does_not_spill(kernel, shape, target, monkeypatch):
    monkeypatch.setattr(stream, "arch", lambda: target)
    found = list(islice(kernel.configs(shape), 1))
    if not found:  # vectors beyond shared memory: the lowering takes fewer at a time
        shape = replace(shape, M=rows_at_once(shape))
        found = list(islice(kernel.configs(shape), 1))
    _, facts = kernel.build(shape, found[0], target)
    assert facts["kernels"] and all(k["stack"] == 0 for k in facts["kernels"].values()), facts


def test_vectors_beyond_shared_memory_are_taken_in_turns():
    assert rows_at_once(FP8) == 1 and rows_at_once(replace(FP8, M=8)) == 8
    assert rows_at_once(replace(FP8, M=8, K=16384, R=7168)) == 8, "several blocks share the columns"
    wide = replace(FP8, M=8, K=16448, R=7168)
    assert not list(gemv.configs(wide)) and 4 <= rows_at_once(wide) < 8


# On a GPU


def matrix(format, *shape, seed=0):
    """A random weight as it is stored, whose products with standard normal vectors are about as large as these."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(*shape, generator=g) * shape[-1] ** -0.5
    if format in ("bf16", "fp32"):
        return w.to(torch.bfloat16 if format == "bf16" else torch.float32), None, None
    w, scale, scale_2 = quantize(w, format[:3] if format.startswith("fp8") else format)
    return w, scale.float() * 1.37 if format.endswith("fp32") else scale, scale_2


def vectors(*shape, dtype=torch.bfloat16, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


ODD = [(1, 16, 64), (2, 33, 192), (3, 130, 96), (5, 200, 1056), (8, 1000, 512), (8, 17, 2048)]
MORE = [(13, 130, 1024), (21, 33, 192)]  # vectors than a launch of plain weights takes


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", ODD, ids=str)
def test_linear_is_the_meaning(shape, format, dtype, kernel_parity):
    M, N, K = shape
    tolerance = 1e-2 if dtype == torch.bfloat16 else 2e-5
    args, others = ((vectors(M, K, dtype=dtype, seed=s), *matrix(format, N, K, seed=s + 2)) for s in (0, 7))
    kernel_parity(linear, *args, others=others, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("format", STORED)
@pytest.mark.parametrize("shape", MORE, ids=str)
def test_stored_weights_take_more_vectors(shape, format, kernel_parity):
    M, N, K = shape
    args, others = ((vectors(M, K, seed=s), *matrix(format, N, K, seed=s + 2)) for s in (0, 7))
    kernel_parity(linear, *args, others=others, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["bf16", "fp8", "mxfp4"])
@pytest.mark.parametrize(("G", "M", "R", "K"), [(2, 1, 48, 64), (3, 2, 51, 288), (8, 8, 64, 512)])
def test_grouped_linear_is_the_meaning(G, M, R, K, format, kernel_parity):
    x, weight = vectors(G, M, K), matrix(format, G * R, K)
    kernel_parity(grouped_linear, x, *weight, others=(vectors(G, M, K, seed=5), *weight), rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("format", STORED)
@pytest.mark.parametrize(("G", "M", "R", "K"), [(3, 21, 51, 288), (8, 40, 64, 512)])
def test_groups_take_more_vectors(G, M, R, K, format, kernel_parity):
    x, weight = vectors(G, M, K), matrix(format, G * R, K)
    kernel_parity(grouped_linear, x, *weight, others=(vectors(G, M, K, seed=5), *weight), rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("weight", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("x", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_a_wide_linear_is_exact(x, weight, kernel_parity):
    w = matrix("fp32", 256, 1024)[0].to(weight)
    kernel_parity(linear_wide, vectors(4, 1024, dtype=x), w, rtol=1e-5, atol=2e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("M", "N", "K"), [(9, 1, 8), (77, 33, 1024), (1000, 256, 200), (65, 40, 33), (600, 60000, 1100)]
)
def test_a_wide_linear_of_many_vectors_is_exact(M, N, K, dtype, kernel_parity):
    w, others = (matrix("fp32", N, K, seed=s)[0].to(dtype) for s in (0, 3))
    given = (vectors(M, K, dtype=dtype), w), (vectors(M, K, dtype=dtype, seed=5), others)
    kernel_parity(linear_wide, *given[0], others=given[1], rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8, 12, 64, 512])
def test_a_wide_linear_is_as_exact_as_products_in_fp32(rows):
    """Those of cuBLAS are off by 1e-7 to 6e-7, as it chooses their kernel; sums of all columns by tensor cores by 1e-6."""
    x, w = on_gpu(vectors(rows, 4096), matrix("fp32", 1024, 4096)[0].bfloat16())
    ours, _ = errors(linear_wide, x, w)
    assert ours <= 6e-7


def errors(op, *args):
    """Root mean square distance from fp64 of the kernel and of eager bf16."""
    wide = [a.double() if torch.is_tensor(a) and a.dtype in (torch.bfloat16, torch.float32) else a for a in args]
    want = op.meaning(*wide)
    return [(got.double() - want).square().mean().sqrt().item() for got in (op(*args), op.meaning(*args))]


def on_gpu(*args):
    return [a.cuda() if torch.is_tensor(a) else a for a in args]


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("M", [1, 8])
def test_no_more_error_than_eager(format, M):
    kernel, eager = errors(linear, *on_gpu(vectors(M, 4096), *matrix(format, 1024, 4096)))
    assert 0 < kernel <= 1.05 * eager


def choices(N, k, X, D, I, format, dtype=torch.bfloat16, seed=0):
    """Arguments of the op; the first token chooses one expert twice, and tokens share experts."""
    g = torch.Generator().manual_seed(seed)
    expert = torch.rand(N, X, generator=g).topk(k, -1).indices
    expert[0, 0] = expert[0, -1]
    gate = torch.rand(N, k, generator=g)
    (w1, s1, t1), (w3, s3, t3) = (matrix(format, X, I, D, seed=seed + i) for i in (1, 2))
    w2, s2, t2 = matrix(format, X, D, I, seed=seed + 3)
    x = vectors(N, D, dtype=dtype, seed=seed + 4)
    return x * 3, expert, gate, w1, w3, w2, 1.5, s1, s3, s2, t1, t3, t2


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("N", "k", "X", "D", "I"), [(1, 4, 24, 192, 64), (3, 6, 20, 160, 96), (8, 2, 3, 512, 256), (2, 1, 4, 32, 32)]
)
def test_experts_are_the_meaning(N, k, X, D, I, format, kernel_parity):
    args, others = choices(N, k, X, D, I, format), choices(N, k, X, D, I, format, seed=9)
    kernel_parity(moe, *args, others=others, rtol=1e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["bf16", "mxfp4", "nvfp4"])
def test_experts_in_single_precision(format, kernel_parity):
    kernel_parity(moe, *choices(2, 4, 24, 192, 64, format, torch.float32), rtol=1e-4, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["bf16", "fp8", "mxfp4", "nvfp4"])
def test_experts_have_no_more_error_than_eager(format):
    kernel, eager = errors(moe, *on_gpu(*choices(4, 6, 16, 1024, 512, format)))
    assert 0 < kernel <= 1.05 * eager


@pytest.mark.gpu
def test_strange_numbers_stay_where_they_are():
    x, (weight, scale, _) = vectors(3, 256).cuda(), on_gpu(*matrix("fp8", 160, 256))
    weight.view(torch.uint8)[5, 7] = 0x7F
    x[1, 9] = float("inf")
    got = linear(x, weight, scale, None)
    assert got[[0, 2]].isnan().any(0).nonzero().flatten().tolist() == [5]
    assert not got[1].isfinite().any() and got[[0, 2]][:, 6:].isfinite().all()
    huge = vectors(2, 256).cuda() * 2.0**60
    torch.testing.assert_close(
        linear(huge, *on_gpu(*matrix("mxfp4", 64, 256))) / 2.0**60,
        linear(huge / 2.0**60, *on_gpu(*matrix("mxfp4", 64, 256))),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("K", [64, 96, 192, 288])
@pytest.mark.parametrize("M", [1, 5, 21])
def test_scales_behind_those_of_a_row_are_not_its_own(M, K, format):
    """Its last block of columns is cut short: behind it lies the next row, which may be NaN, or memory of others."""
    x, (w, scale, scale_2) = vectors(M, K), matrix(format, 51, K)
    scale.view(torch.uint8)[7] = 0xFF
    space = torch.full((scale.numel() + 16,), 0xFF, dtype=torch.uint8, device="cuda")
    own = space[: scale.numel()].copy_(scale.view(torch.uint8).view(-1)).view(scale.dtype).view(scale.shape)
    y = linear(x.cuda(), w.cuda(), own, None if scale_2 is None else scale_2.cuda()).cpu()
    want = linear.meaning(x, w, scale, scale_2)
    assert want.isnan().sum() == M, "one row"
    torch.testing.assert_close(y, want, rtol=1e-2, atol=1e-2, equal_nan=True)


@pytest.mark.gpu
def test_the_kernels_write_their_outputs_alone():
    weight, scale, _ = on_gpu(*matrix("fp8", 33, 64))
    shape = gemv.Shape(2, 1, 33, 64, "fp8", True, "bf16", "bf16")
    y = torch.full((3, 2, 33), float("nan"), dtype=torch.bfloat16, device="cuda")
    gemv.launch(
        shape, vectors(1, 2, 64).cuda(), weight.view(torch.int32), scale.view(torch.uint8).view(-1), None, y[1:2]
    )
    assert y[[0, 2]].isnan().all() and y[1].isfinite().all()


def kinds(work):
    """The best configuration of each kind."""
    found = {(c.rows, c.split > 1, c.overlaps): c for c in reversed(list(division.configs_of(work))) if c.rows != 128}
    return list(found.values())


TWO = gemv.Shape(3, 2, 1090, 1024, "mxfp4", True, "bf16", "bf16")


def test_configurations_of_all_kinds_are_there():
    found, yes_no = kinds(TWO.work), (False, True)
    assert {(c.rows, c.split > 1, c.overlaps) for c in found} == set(product((16, 64, 256), yes_no, yes_no))
    assert any(c.split > 1 and TWO.work.turns(c) > 1 for c in found)
    assert {c.rows for c in kinds(replace(TWO, dtype="fp32").work)} == {16}


SCALED = "fp8, scales in fp32"


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("format", "M"),
    [
        ("bf16", 8),
        ("fp8", 1),
        ("fp8", 8),
        (SCALED, 3),
        ("mxfp4", 1),
        ("mxfp4", 8),
        ("nvfp4", 1),
        ("nvfp4", 5),
    ],
)
def test_every_configuration_says_the_same(format, M):
    shape = replace(TWO, M=M, format=format.split(",")[0], e8m0=format != SCALED)
    R, K = shape.R, shape.K
    x, (weight, scale, scale_2) = vectors(2, M, K).cuda(), on_gpu(*matrix(format, 2 * R, K))
    want = grouped_linear.meaning(x.double(), weight.double() if scale is None else weight, scale, scale_2)
    stored = words(weight), flat(scale), None if scale_2 is None else scale_2.view(1)
    for i, config in enumerate(kinds(shape.work)):
        y = torch.full((4, M, R), float("nan"), dtype=torch.bfloat16, device="cuda")
        launch = gemv.KERNEL.launcher(shape, config)
        for _ in range(3):
            launch(x, *stored, y[1:3], i % 2)
        torch.testing.assert_close(y[1:3].double(), want, rtol=1e-2, atol=1e-2, msg=str(config))
        error, rounded = (y[1:3].double() - want).norm(), (want.bfloat16().double() - want).norm()
        assert error < 1.05 * rounded and y[[0, 3]].isnan().all(), config


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["bf16", "fp8", "mxfp4"])
def test_launches_that_overlap_wait_for_each_other(format):
    """A chain of layers, each on what the one before writes, in eager mode and from a graph."""
    weights = [
        [None if t is None else torch.nn.Parameter(t, False) for t in on_gpu(*matrix(format, 1024, 1024, seed=s))]
        for s in range(6)
    ]
    x = vectors(2, 1024).cuda()

    def chain(op):
        y = x
        for w in weights * 4:
            y = op(y, *w)
        return y

    want = chain(linear.meaning)
    for _ in range(20):
        torch.testing.assert_close(chain(linear), want, rtol=0.1, atol=0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain(linear)
    first = chain(linear)
    for seed in range(2, 20):
        x.copy_(vectors(2, 1024, seed=seed))
        graph.replay()
        again = got.clone()
        assert torch.equal(again, chain(linear)) and not torch.equal(again, first)
