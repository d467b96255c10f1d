"""Block quantisation against ml_dtypes, exhaustively where the codes are few, and through the tracer."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from functorch.compile import make_boxed_func
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from dsv4_compile.reference_model.quant import (
    MIDPOINTS,
    dequantize,
    dequantize_rows,
    mxfp4_to_nvfp4,
    pack_kv,
    quantize,
    quantize_rows,
    unpack_kv,
)

FP8, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
FORMATS = ("fp8", "mxfp4", "nvfp4")
ALL_BYTES = torch.arange(256, dtype=torch.uint8)


def decoded(t: torch.Tensor, dtype) -> np.ndarray:
    """What ml_dtypes says that the bytes of `t` mean."""
    return t.view(torch.uint8).numpy().view(dtype).astype(np.float32)


def same(ours: torch.Tensor, theirs: np.ndarray) -> None:
    """Equal bit by bit, except that all NaNs are one."""
    ours = ours.numpy()
    nan = np.isnan(theirs)
    assert ours.dtype == np.float32 and np.array_equal(np.isnan(ours), nan)
    assert np.array_equal(ours[~nan].view(np.uint32), theirs[~nan].view(np.uint32))


def random_weight(*shape: int) -> torch.Tensor:
    return torch.randn(shape) * torch.randn(shape[:-1]).exp2().unsqueeze(-1)


# Meaning of the stored bytes


def test_fp8_is_e4m3_times_e8m0_for_all_codes_and_scales():
    weight = ALL_BYTES.repeat(256, 1).repeat_interleave(128, 0).view(FP8)  # [256 * 128, 256]
    scale = ALL_BYTES.view(-1, 1).repeat(1, 2).view(E8M0)
    with np.errstate(all="ignore"):
        theirs = (
            decoded(weight, ml_dtypes.float8_e4m3fn) * decoded(scale, ml_dtypes.float8_e8m0fnu).repeat(128, 0)[:, :1]
        )
    same(dequantize(weight, scale, format="fp8"), theirs)


def test_mxfp4_is_e2m1_times_e8m0_for_all_bytes_and_scales():
    weight = ALL_BYTES.repeat(256, 1)  # [256, 256] bytes, 16 to a block
    scale = ALL_BYTES.view(-1, 1).repeat(1, 16).view(E8M0)
    codes = np.stack([ALL_BYTES.numpy() & 15, ALL_BYTES.numpy() >> 4], -1).reshape(-1)
    values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    with np.errstate(all="ignore"):
        theirs = values[None] * decoded(scale, ml_dtypes.float8_e8m0fnu)[:, :1]
    same(dequantize(weight, scale, format="mxfp4"), theirs)


def test_the_low_nibble_is_the_even_column():
    weight = torch.tensor([[0x21, 0x43, 0x65, 0x07, 0xA9, 0xCB, 0xED, 0x8F] + [0] * 8], dtype=torch.uint8)
    got = dequantize(weight, torch.tensor([[128]], dtype=torch.uint8).view(E8M0), format="mxfp4")
    assert (got[0, :8] / 2).tolist() == [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 0.0]
    assert (got[0, 8:16] / 2).tolist() == [-0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0, -0.0]


def test_nvfp4_is_e2m1_times_e4m3_times_one_fp32():
    weight, scale = torch.randint(0, 256, (3, 5, 32), dtype=torch.uint8), (torch.rand(3, 5, 4) * 448).to(FP8)
    scale_2 = torch.rand(3) * 1e-3
    value = dequantize(weight, torch.full((3, 5, 2), 127, dtype=torch.uint8).view(E8M0), format="mxfp4").numpy()
    theirs = value * decoded(scale, ml_dtypes.float8_e4m3fn).repeat(16, -1) * scale_2.numpy()[:, None, None]
    same(dequantize(weight, scale, scale_2, "nvfp4"), theirs)


def test_a_nan_scale_makes_its_block_nan():
    scale = torch.tensor([[127, 255]], dtype=torch.uint8).view(E8M0)
    assert dequantize(torch.ones(1, 256).to(FP8), scale, format="fp8").isnan().tolist() == [
        [False] * 128 + [True] * 128
    ]


@pytest.mark.parametrize("rows, columns", [(1, 1), (127, 129), (128, 128), (200, 320), (257, 96)])
def test_fp8_blocks_may_be_ragged(rows, columns):
    weight = torch.randn(rows, columns).to(FP8)
    scale = torch.rand(-(-rows // 128), -(-columns // 128))  # fp32 scales exist too
    theirs = weight.float() * scale[torch.arange(rows) // 128][:, torch.arange(columns) // 128]
    assert torch.equal(dequantize(weight, scale, format="fp8"), theirs)


@pytest.mark.parametrize("format", ["fp8", "mxfp4"])
def test_dequantise_as_transformers(format):
    weight, scale, _ = quantize(random_weight(256, 384), format)
    theirs = Fp8Dequantize(None)._dequantize_one(
        weight.view(torch.int8) if format == "mxfp4" else weight, scale, torch.float32
    )
    assert torch.equal(dequantize(weight, scale, format=format), theirs)


def test_format_none_is_the_weight_itself():
    weight = torch.randn(3, 5).bfloat16()
    assert dequantize(weight) is weight and quantize(weight, "none") == (weight, None, None)


# Quantising


def test_e2m1_rounds_as_ml_dtypes_ties_and_neighbours_too():
    middle = np.array(MIDPOINTS, np.float32)
    edges = np.concatenate([np.nextafter(middle, np.float32(0)), middle, np.nextafter(middle, np.float32(9))])
    rest = np.random.default_rng(0).uniform(0, 6, 31 * 130 - 24)
    x = np.concatenate([edges, [0.0, 6.0, 1e-30], rest]).astype(np.float32)
    x = np.concatenate([x, -x]).reshape(-1, 31)
    x = np.concatenate([x, np.full((len(x), 1), 6, np.float32)], 1)  # a 6 in each block makes its scale 1
    weight, scale, _ = quantize(torch.from_numpy(x), "mxfp4")
    assert (scale.view(torch.uint8) == 127).all()
    same(dequantize(weight, scale, format="mxfp4"), x.astype(ml_dtypes.float4_e2m1fn).astype(np.float32))


def test_e4m3_rounds_as_ml_dtypes():
    w = random_weight(130, 300)
    weight, scale, _ = quantize(w, "fp8")
    power = scale.float()[torch.arange(130) // 128][:, torch.arange(300) // 128]
    theirs = (w / power).numpy().astype(ml_dtypes.float8_e4m3fn)
    assert np.array_equal(weight.view(torch.uint8).numpy(), theirs.view(np.uint8))


@given(st.floats(2.0**-118, 2.0**126, width=32), st.sampled_from(["fp8", "mxfp4"]))
def test_power_of_two_scales_are_the_least_that_fit(amax, format):
    largest = 448.0 if format == "fp8" else 6.0
    weight, scale, _ = quantize(torch.tensor([[amax] + [0.0] * 31]), format)
    assert amax / scale.float().item() <= largest * (1 + 2**-23)
    assert amax / (scale.float().item() / 2) > largest * (1 - 2**-23)
    tolerance = {"fp8": 2**-4, "mxfp4": 0.25}[format]
    assert dequantize(weight, scale, format=format)[0, 0].item() == pytest.approx(amax, rel=tolerance)


@pytest.mark.parametrize("exponent", range(-100, 101, 25))
def test_scales_at_exact_powers(exponent):
    for largest, format in ((448.0, "fp8"), (6.0, "mxfp4")):
        amax = torch.tensor(largest) * 2.0**exponent
        above = torch.nextafter(amax * (1 + 2**-22), torch.tensor(torch.inf))
        bytes_ = [quantize(a.expand(1, 32), format)[1].view(torch.uint8).item() - 127 for a in (amax, above)]
        assert bytes_ == [exponent, exponent + 1]


def test_nvfp4_scales_are_two_levels():
    w = random_weight(2, 6, 64)
    weight, scale, scale_2 = quantize(w, "nvfp4")
    assert torch.equal(scale_2, w.abs().amax((-2, -1)) / 2688)
    blocks = w.unflatten(-1, (4, 16)).abs().amax(-1) / 6 / scale_2.view(2, 1, 1)
    assert torch.equal(scale.float(), blocks.to(FP8).float()) and scale.float().max() == 448
    assert weight.dtype == torch.uint8 and weight.shape == (2, 6, 32) and scale.shape == (2, 6, 4)


@pytest.mark.parametrize("format, error", [("fp8", 0.0266), ("mxfp4", 0.1155), ("nvfp4", 0.0951)])
def test_rms_error_on_gaussian_weights(format, error):
    w = torch.randn(512, 1024)
    got = dequantize(*quantize(w, format), format)
    assert (got - w).square().mean().sqrt() / w.square().mean().sqrt() == pytest.approx(error, abs=5e-4)


@pytest.mark.parametrize("format", FORMATS)
def test_values_that_fit_come_back_exactly(format):
    once = dequantize(*quantize(random_weight(2, 130, 320), format), format)
    assert torch.equal(dequantize(*quantize(once, format), format), once)


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_keep_their_sign_and_empty_blocks_are_finite(format):
    w = torch.zeros(4, 64)
    w[1] = -0.0
    w[3, 40] = 1e-42  # a denormal, alone in its block
    got = dequantize(*quantize(w, format), format)
    assert torch.equal(got[:3], w[:3]) and torch.equal(got[:3].signbit(), w[:3].signbit()) and got.isfinite().all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_value_does_not_vanish(format, bad):
    w = torch.randn(2, 64)
    w[1, 40] = bad
    assert dequantize(*quantize(w, format), format)[1, 40].isnan()


@pytest.mark.parametrize("format", FORMATS)
def test_a_stack_is_its_matrices(format):
    w = random_weight(3, 2, 130, 96)
    whole = quantize(w, format)
    for i in range(3):
        for part, stacked in zip(quantize(w[i], format), whole, strict=True):
            assert part is None or torch.equal(part.view(torch.uint8), stacked[i].view(torch.uint8))
        one = [t if t is None else t[i] for t in whole]
        assert torch.equal(dequantize(*one, format), dequantize(*whole, format)[i])


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="mxfp4 needs a multiple of 32 columns, got 48: choose format 'none' or 'fp8'"):
        quantize(torch.randn(2, 48), "mxfp4")
    with pytest.raises(ValueError, match="format 'int4': expected 'none', 'fp8', 'mxfp4' or 'nvfp4'"):
        quantize(torch.randn(2, 48), "int4")
    with pytest.raises(ValueError, match="format 'int4': expected"):
        dequantize(torch.zeros(2, 16, dtype=torch.uint8), torch.zeros(2, 1), format="int4")


# MXFP4 -> NVFP4


def test_mxfp4_becomes_nvfp4_exactly():
    weight = torch.randint(0, 256, (2, 9, 32), dtype=torch.uint8)
    scale = torch.randint(110, 128, (2, 9, 2), dtype=torch.uint8)
    scale[0, 0, 0], weight[0, 0, :16] = 20, 0x80  # far below the others, but only zeros
    new = mxfp4_to_nvfp4(weight, scale.view(E8M0))
    before, after = dequantize(weight, scale.view(E8M0), format="mxfp4"), dequantize(*new, "nvfp4")
    assert torch.equal(before, after) and torch.equal(before.signbit(), after.signbit())
    assert new[1].shape == (2, 9, 4) and new[2].tolist() == [2.0 ** (m - 135) for m in scale.amax((1, 2)).tolist()]


@pytest.mark.parametrize("low", [109, 255])
def test_mxfp4_that_does_not_fit_nvfp4_is_refused(low):
    scale = torch.tensor([[127, low]], dtype=torch.uint8).view(E8M0)
    with pytest.raises(ValueError, match="no exact NVFP4 form"):
        mxfp4_to_nvfp4(torch.full((1, 32), 0x11, dtype=torch.uint8), scale)


# Tracing


@pytest.mark.parametrize("format", FORMATS)
def test_dequantise_traces_to_one_graph_without_constants(format):
    arguments = [t for t in quantize(random_weight(2, 130, 320), format) if t is not None]
    graphs = []

    def keep(gm, inputs):
        graphs.append(gm.graph)
        return make_boxed_func(gm.forward)

    def f(weight, scale, scale_2=None):
        return dequantize(weight, scale, scale_2, format)

    compiled = torch.compile(f, backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    assert torch.equal(compiled(*arguments), f(*arguments))
    (graph,) = graphs
    assert not graph.find_nodes(op="get_attr")
    assert len(graph.find_nodes(op="placeholder")) == len(arguments)


@pytest.mark.parametrize("format", FORMATS)
def test_both_run_on_meta(format):
    real, meta = quantize(torch.randn(2, 130, 320), format), quantize(torch.empty(2, 130, 320, device="meta"), format)
    for a, b in zip(real, meta, strict=True):
        assert (a is None) == (b is None) and (a is None or (a.dtype, a.shape) == (b.dtype, b.shape))
    assert dequantize(*meta, format).shape == (2, 130, 320)


# Rows of a cache


def test_rows_have_the_least_power_of_two_that_fits_and_come_back_exactly_in_bf16():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, 32, generator=g) * 2.0 ** torch.randint(-90, 60, (500, 1), generator=g)
    x[0], x[1], x[2] = 0, 448.0 * 2.0**-20, torch.nextafter(torch.tensor(448.0), torch.tensor(1e9))
    codes, scale = quantize_rows(x)
    assert codes.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32 and scale.shape == (500, 1)
    exponent = torch.frexp(scale).exponent - 1
    assert torch.equal(scale, torch.ldexp(torch.ones(()), exponent)) and exponent[:3, 0].tolist() == [-100, -20, 1]
    share = x[1:].abs().amax(-1, keepdim=True) / scale[1:]
    assert bool((share <= 448).all() & (share > 224).all())
    back = dequantize_rows(codes, scale, torch.float32)
    assert torch.equal(back, dequantize_rows(codes, scale, torch.bfloat16).float())
    assert ((back - x).pow(2).sum() / x.pow(2).sum()).sqrt() < 0.03


def test_of_the_best_entries_nearly_all_stay_the_best():
    """Sizes of the published models: 512 of 4096 by 64 heads of 128 channels."""
    g = torch.Generator().manual_seed(0)
    keys, q = torch.randn(4096, 128, generator=g), torch.randn(8, 64, 128, generator=g)
    w = torch.randn(8, 64, generator=g)

    def best(keys):
        score = torch.einsum("th,the->te", w, (q @ keys.T).relu())
        return torch.zeros(score.shape).scatter_(1, score.topk(512).indices, 1.0)

    shared = (best(keys) * best(dequantize_rows(*quantize_rows(keys), torch.float32))).sum(-1) / 512
    assert shared.mean() > 0.96 and shared.min() > 0.94


# Rows of a cache, in bytes


def kv_by_hand(x, rope):
    """What rows in bytes hold, one number at a time."""
    plain, turned = x[..., :-rope], x[..., -rope:].bfloat16().float()
    size = math.gcd(plain.shape[-1], 64)
    blocks = plain.reshape(-1, size).clone()
    for block in blocks:
        exponent = math.ceil(math.log2(max(block.abs().max().item(), 1e-4) / 448))
        for i, value in enumerate((block / 2.0**exponent).tolist()):
            step = 2.0 ** (max(math.frexp(value)[1] - 1, -6) - 3)  # 3 bits behind the first
            block[i] = round(value / step) * step * 2.0**exponent
    return torch.cat([blocks.view_as(plain), turned], -1)


@pytest.mark.parametrize(("width", "rope", "size"), [(512, 64, 592), (48, 16, 80), (64, 16, 96), (22, 6, 32)])
def test_a_row_in_bytes_comes_back_as_the_formula_says(width, rope, size):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, width, generator=g) * 2.0 ** torch.randint(-30, 20, (2, 5, 1), generator=g)
    x[0, 0], x[0, 1, : width - rope] = 0, 448 * 2.0**-9
    rows = pack_kv(x, rope)
    assert rows.dtype == torch.uint8 and rows.shape == (2, 5, size) and size % 16 == 0
    back = unpack_kv(rows, width, rope)
    assert torch.equal(back, kv_by_hand(x, rope)) and torch.equal(back, back.bfloat16().float())
    assert torch.equal(unpack_kv(pack_kv(back, rope), width, rope), back)  # nothing is lost twice


def test_rows_in_bytes_lie_as_flashmla_has_them():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 512, generator=g)
    x[0, 64:128] *= 1000
    rows = pack_kv(x, 64)
    scale = rows[:, 576:583].view(torch.float8_e8m0fnu).float()
    codes = rows[:, :448].view(torch.float8_e4m3fn).float().unflatten(-1, (7, 64))
    assert torch.equal((codes * scale.unsqueeze(-1)).flatten(-2), unpack_kv(rows, 512, 64)[:, :448])
    assert torch.equal(rows[:, 448:576].contiguous().view(torch.bfloat16), x[:, 448:].bfloat16())
    assert not rows[:, 583:].any() and scale[0, 1] == scale[0, 0] * 1024
    error = (unpack_kv(rows, 512, 64) - x)[:, :448]
    assert error.pow(2).mean().sqrt() < 0.03 * x[:, :448].pow(2).mean().sqrt()


def test_what_is_not_finite_does_not_become_a_number():
    x = torch.ones(2, 512)
    x[0, 70], x[1, 0] = float("nan"), float("inf")
    back = unpack_kv(pack_kv(x, 64), 512, 64)
    assert back[0, 64:128].isnan().all() and back[1, :64].isnan().all()
    assert back[0, :64].isfinite().all() and back[:, 128:].isfinite().all()
