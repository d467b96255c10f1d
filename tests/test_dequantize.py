"""Dequantisation: the op against the formats' definitions, the CPU tables bit for bit, and what raises to it."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_compile.lowerings.dequantize import dequantize
from dsv4_compile.patterns import dequantize as rules
from dsv4_compile.reference_model import quant

E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
ALL = (rules.fp8, rules.fp8_indexed, rules.mxfp4, rules.nvfp4)


# The formats, number by number


def e4m3(byte: int) -> float:
    sign, exponent, mantissa = -1 if byte >> 7 else 1, byte >> 3 & 15, byte & 7
    if byte & 127 == 127:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def e8m0(byte: int) -> float:
    return math.nan if byte == 255 else 2.0 ** (byte - 127)


def e2m1(code: int) -> float:
    sign, exponent, mantissa = -1 if code >> 3 else 1, code >> 1 & 3, code & 1
    return sign * (mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))


def formula(weight, scale, scale_2):
    """fp64, one number after the other."""
    fp8 = weight.dtype == E4M3
    *lead, rows, columns = weight.shape
    columns *= 1 if fp8 else 2
    out = torch.empty(*lead, rows, columns, dtype=torch.float64)
    factor = scale.double()
    if scale.dtype != torch.float32:
        factor = torch.tensor(
            [{E8M0: e8m0, E4M3: e4m3}[scale.dtype](b) for b in scale.view(torch.uint8).flatten().tolist()]
        )
        factor = factor.double().view(scale.shape)
    for at in itertools.product(*map(range, lead)):
        whole = 1.0 if scale_2 is None else scale_2[at].item()
        for r, c in itertools.product(range(rows), range(columns)):
            if fp8:
                number = e4m3(weight.view(torch.uint8)[(*at, r, c)].item()) * factor[(*at, r // 128, c // 128)].item()
            else:
                byte = weight[(*at, r, c // 2)].item()
                block = columns // scale.shape[-1]
                number = e2m1(byte >> 4 if c % 2 else byte & 15) * factor[(*at, r, c // block)].item()
            out[(*at, r, c)] = number * whole
    return out


def stored(format, *shape, seed=0, nan=False):
    """Random bytes [..., N, K] in a format, scales near 1."""
    g = torch.Generator().manual_seed(seed)
    *lead, N, K = shape

    def bytes_(low, high, *size):
        return torch.randint(low, high, size, generator=g, dtype=torch.uint8)

    if format.startswith("fp8"):
        weight = bytes_(0, 256, *lead, N, K)
        weight = (weight if nan else weight.masked_fill(weight & 127 == 127, 0)).view(E4M3)
        grid = (*lead, -(-N // 128), -(-K // 128))
        fp32 = format == "fp8 fp32"
        return weight, torch.rand(grid, generator=g) + 0.5 if fp32 else bytes_(120, 130, *grid).view(E8M0), None
    codes = bytes_(0, 256, *lead, N, K // 2)
    if format == "mxfp4":
        return codes, bytes_(120, 256 if nan else 130, *lead, N, K // 32).view(E8M0), None
    return codes, bytes_(0, 120, *lead, N, K // 16).view(E4M3), torch.rand(lead, generator=g) + 0.5


FORMATS = ["fp8", "fp8 fp32", "mxfp4", "nvfp4"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", [(1, 32), (3, 64), (2, 2, 96), (0, 3, 32)], ids=str)
def test_meaning_and_cpu_say_what_the_formula_says(format, shape):
    args = stored(format, *shape)
    want = formula(*args)
    for run in (dequantize, dequantize.meaning):
        got = run(*args)
        assert got.dtype == torch.float32 and got.is_contiguous()
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)


def test_every_byte_and_ragged_blocks():
    bytes_ = torch.arange(256, dtype=torch.uint8)
    one = torch.tensor([[127]], dtype=torch.uint8).view(E8M0)
    torch.testing.assert_close(
        dequantize(bytes_[None].view(E4M3), one.expand(1, 2), None)[0].double(),
        torch.tensor([e4m3(b) for b in range(256)], dtype=torch.float64),
        equal_nan=True, rtol=0, atol=0,
    )  # fmt: skip
    got = dequantize(bytes_[None], one.expand(1, 16), None)[0].double()
    assert got.tolist() == [e2m1(c) for b in range(256) for c in (b & 15, b >> 4)]
    weight, scale, _ = stored("fp8", 130, 257)
    torch.testing.assert_close(dequantize(weight, scale, None).double(), formula(weight, scale, None), rtol=0, atol=0)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(FORMATS), st.integers(0, 3), st.integers(1, 140), st.integers(1, 5), st.integers(0, 99))
def test_cpu_equals_the_meaning_bit_for_bit(format, lead, N, K, seed):
    columns = K * 53 if format.startswith("fp8") else K * 32
    args = stored(format, *([lead] if lead else []), N, columns, seed=seed, nan=True)
    torch.testing.assert_close(dequantize(*args), dequantize.meaning(*args), rtol=0, atol=0, equal_nan=True)


def test_strided_inputs_and_other_default_dtypes():
    weight, scale, _ = stored("mxfp4", 2, 6, 64)
    want = dequantize.meaning(weight[:, ::2], scale[:, ::2], None)
    torch.set_default_dtype(torch.float64)
    try:
        got = dequantize(weight[:, ::2], scale[:, ::2], None)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, want) and got.dtype == torch.float32


@pytest.mark.parametrize("format", FORMATS)
def test_op_is_sound(format):
    checks = (
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    )  # test_schema negates its inputs
    torch.library.opcheck(dequantize.target, stored(format, 3, 5, 64), test_utils=checks)


def test_cost_counts_bytes():
    cost = dequantize.symbolic_cost().at(N=64, K=64, bits=4, block=32)
    assert (cost.flops, cost.read, cost.write) == (4096, 2048 + 128, 16384)


# What raises to it


STACKED, FLAT = [(3, 140, 288), (2, 128, 256)], [(140, 288)]
KINDS = [(f, s) for f in FORMATS for s in STACKED + FLAT if f != "nvfp4" or s in STACKED]  # NVFP4: stacked experts only


@pytest.mark.parametrize(("format", "shape"), KINDS, ids=str)
def test_the_reference_model_raises(rewritten_by, format, shape):
    args = stored(format, *shape)
    name = format.split()[0]
    got, report = rewritten_by(ALL, lambda w, s, t: quant.dequantize(w, s, t, name) + 1, *args)
    assert report.rules["raise.dequantize"] == 1 and report.runs["dequantize", "cpu"] == 1
    assert torch.equal(got, quant.dequantize(*args, name) + 1)


def test_rows_that_were_gathered_raise(rewritten_by):
    weight, scale, scale_2 = stored("nvfp4", 5, 64, 96)
    chosen = torch.tensor([3, 3, 0])
    got, report = rewritten_by(
        ALL, lambda w, s, t, i: quant.dequantize(w[i], s[i], t[i], "nvfp4"), weight, scale, scale_2, chosen
    )
    assert report.rules["raise.dequantize"] == 1
    assert torch.equal(got, dequantize.meaning(weight, scale, scale_2)[chosen])


def spread(scale, N, K):
    return scale.float().repeat_interleave(128, -2).repeat_interleave(128, -1)[..., :N, :K]


def tiled(w, s, t):
    return w.float() * s.float().repeat(128, 128)[: w.shape[0], : w.shape[1]]


def half_blocks(w, s, t):
    return w.float() * s.float().repeat_interleave(64, -2).repeat_interleave(64, -1)


def late_rows(w, s, t):
    return w.float() * spread(s, 256, 256)[1:, :][: w.shape[0], : w.shape[1]]


def commuted(w, s, t):
    return spread(s, *w.shape) * w.float()


def in_one_view(w, s, t):
    R, C = s.shape
    whole = s.float()[:, None, :, None].expand(R, 128, C, 128).reshape(R * 128, C * 128)
    return w.float() * whole[: w.shape[0], : w.shape[1]]


@pytest.mark.parametrize(
    ("f", "found"),
    [(commuted, 1), (in_one_view, 1), (tiled, 0), (half_blocks, 0), (late_rows, 0)],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_fp8_scales_lie_in_blocks_of_128(rewritten_by, f, found):
    weight, scale, _ = stored("fp8", *((128, 128) if f is half_blocks else (200, 140)))
    if f is half_blocks:
        scale = scale.view(torch.uint8).repeat(2, 2).view(E8M0)
    got, report = rewritten_by(ALL, f, weight, scale, None)
    assert torch.equal(got, f(weight, scale, None))
    assert report.rules["raise.dequantize"] == found
    assert found or "128" in str(report.misses[0]) or "cut at the end" in str(report.misses[0])


def decoded(
    w, s, low=lambda b: b & 15, high=lambda b: b >> 4, block=32, sign=7, scaled=lambda v, s: v * s.unsqueeze(-1)
):
    code = torch.stack((low(w), high(w)), -1).flatten(-2)
    m = (code & 7).float()
    magnitude = torch.maximum(torch.maximum(0.5 * m, m - 2), m * 2 - 8)
    value = torch.where(code > sign, -magnitude, magnitude)
    return scaled(value.unflatten(-1, (-1, block)), s.float()).flatten(-2)


PLANTED = {  # one thing wrong, and what the report says of it
    "high nibble first": (dict(low=lambda b: b >> 4, high=lambda b: b & 15), "bitwise_and"),
    "sign from 8 on": (dict(sign=8), "7"),
    "blocks of 16": (dict(block=16), "one scale for each 32 columns"),
    "scales across blocks": (dict(scaled=lambda v, s: v * s.unsqueeze(-2)), "shape"),
}


@pytest.mark.parametrize("name", ["nothing", *PLANTED])
def test_mxfp4_differences_do_not_raise(rewritten_by, monkeypatch, name):
    monkeypatch.setattr(
        "dsv4_compile.reporting.report.NEAR", 0.0
    )  # tell of every miss, also of a mismatch near the anchor
    change, reason = PLANTED.get(name, ({}, ""))
    K = {"blocks of 16": 64, "scales across blocks": 32 * 32}.get(name, 96)
    weight, scale, _ = stored("mxfp4", 3, 7, K)
    if name == "blocks of 16":
        scale = scale.view(torch.uint8).repeat_interleave(2, -1).view(E8M0)
    got, report = rewritten_by(ALL, lambda w, s: decoded(w, s, **change), weight, scale)
    assert torch.equal(got, decoded(weight, scale, **change))
    assert report.rules["raise.dequantize"] == (name == "nothing")
    assert name == "nothing" or any(reason in str(m) for m in report.misses)


@pytest.mark.parametrize("shape", [(96, 192), (24, 64, 192)], ids=str)
def test_stock_inductor_reads_blocks_that_are_cut_short(shape):
    """Blocks found by integer division gave it wrong addresses, so the model finds them in floats."""
    weight, scale, _ = quant.quantize(torch.randn(shape), "fp8")
    compiled = torch.compile(lambda w, s: quant.dequantize(w, s, None, "fp8"), backend="inductor")
    assert torch.equal(compiled(weight, scale), quant.dequantize(weight, scale, None, "fp8"))
