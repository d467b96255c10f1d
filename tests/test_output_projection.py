"""The grouped output projection: the op against sums, and the models' spellings with plain and stored weights."""

from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

from dsv4_compile.lowerings import gemv
from dsv4_compile.lowerings.output_projection import output_projection
from dsv4_compile.reference_model.quant import dequantize, quantize

G, K, R, D = 3, 14, 11, 13


def drawn(M=5, dtype=torch.float32):
    """x [G, M, K], a [G R, K], b [D, G R]."""
    return torch.randn(G, M, K).to(dtype), torch.randn(G * R, K).to(dtype), torch.randn(D, G * R).to(dtype)


@pytest.mark.parametrize("M", [1, 5])
def test_the_op_says_what_the_sums_say(M):
    x, a, b = drawn(M, torch.float64)
    u = torch.stack([x[g] @ a[g * R : (g + 1) * R].T for g in range(G)], 1)  # [M, G, R]
    torch.testing.assert_close(output_projection(x, a, b), u.reshape(M, G * R) @ b.T)


def test_opcheck():
    torch.library.opcheck(output_projection.target, (*drawn(), None, None, None, None))


FORMATS = [("fp8", "fp8"), ("bf16", "fp8"), ("nvfp4", "bf16")]


def kept(format, *shape):
    w = torch.randn(*shape) * shape[-1] ** -0.5
    return (w.to(torch.bfloat16), None, None) if format == "bf16" else quantize(w, format)


def given(M, formats, sizes, dtype=torch.bfloat16, seed=0):
    """All arguments, x as attention leaves it."""
    torch.manual_seed(seed)
    G, K, R, D = sizes
    (a, *a_scales), (b, *b_scales) = kept(formats[0], G * R, K), kept(formats[1], D, G * R)
    return torch.randn(M, G, K).to(dtype).transpose(0, 1), a, b, *a_scales, *b_scales


@pytest.mark.skipif(find_spec("cutlass") is None, reason="kernels need CuTeDSL")
@pytest.mark.parametrize("M", [1, 8, 19])
def test_two_products_are_launched_and_nothing_is_moved(M, monkeypatch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    from dsv4_compile import warm
    from dsv4_compile.kernel import collecting

    monkeypatch.setenv("DSV4_ARCH", "sm_90a")
    compacted = []
    monkeypatch.setattr(gemv, "compact", lambda x: compacted.append(x) or x)
    with FakeTensorMode(), collecting() as launches:
        output_projection.run(*map(warm.on_gpu, given(M, FORMATS[0], (3, 96, 64, 33))))
    turns = -(-M // 8)
    assert [kernel.name for kernel, *_ in launches] == ["gemv"] * 2 * turns
    assert [shape.by_token for _, shape, _ in launches] == [True] * turns + [False] * turns
    assert len(compacted) == 2 * turns and all(x.is_contiguous() for x in compacted)


@pytest.mark.skipif(find_spec("cutlass") is None, reason="kernels need CuTeDSL")
def test_where_one_product_has_too_many_vectors_its_parts_are_asked(monkeypatch):
    """Plain weights are read once."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from dsv4_compile import warm

    monkeypatch.setenv("DSV4_ARCH", "sm_90a")
    for M, formats in ((9, FORMATS[1]), (65, FORMATS[0])):
        arguments = output_projection.arguments(*given(M, formats, (3, 96, 64, 33)))
        with FakeTensorMode():
            claimed, reasons = output_projection.claim({n: warm.on_gpu(t) for n, t in arguments.items()})
        assert claimed is None and any("more than" in r for r in reasons), reasons


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(3, 96, 64, 33), (1, 64, 32, 40), (8, 512, 128, 260)], ids=str)
@pytest.mark.parametrize("formats", FORMATS, ids=str)
@pytest.mark.parametrize("M", [1, 3, 8])
def test_the_kernel_is_the_meaning(M, formats, sizes, kernel_parity):
    others = given(M, formats, sizes, seed=1)
    kernel_parity(output_projection, *given(M, formats, sizes), others=others, rtol=1e-2, atol=1e-2)


# Patterns: o [B, T, h, d], 6 heads of 7


def of_the_model(o, a, b):
    u = torch.einsum("btgk,grk->btgr", o.flatten(-2).unflatten(-1, (G, -1)), a.unflatten(0, (G, -1)))
    return F.linear(u.flatten(-2), b)


def of_hugging_face(o, a, b):
    grouped = o.reshape(*o.shape[:2], G, -1)
    w = a.view(G, -1, grouped.shape[-1]).transpose(1, 2)
    y = torch.bmm(grouped.reshape(-1, G, grouped.shape[-1]).transpose(0, 1), w).transpose(0, 1)
    return F.linear(y.reshape(*o.shape[:2], G, -1).flatten(2), b)


@pytest.mark.parametrize("sizes", [(2, 5), (1, 5), (2, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("f", [of_the_model, of_hugging_face])
def test_the_spellings(f, sizes, rewritten):
    _, a, b = drawn()
    o = torch.randn(*sizes, 6, 7)
    got, report = rewritten(f, o, a, b)
    assert report.counts["output_projection"] == 1
    torch.testing.assert_close(got, f(o, a, b), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("T", [1, 5])
def test_stored_weights(T, rewritten):
    (a, sa, _), (b, sb, _) = (quantize(w / 4, "fp8") for w in (torch.randn(3 * 130, 14), torch.randn(140, 390)))
    o = torch.randn(2, T, 6, 7)

    def f(o, a, sa, b, sb):
        return of_the_model(o, dequantize(a, sa, format="fp8"), dequantize(b, sb, format="fp8"))

    got, report = rewritten(f, o, a, sa, b, sb)
    assert report.counts["output_projection"] == 1 and report.counts["linear"] == 2
    torch.testing.assert_close(got, f(o, a, sa, b, sb), rtol=1e-4, atol=1e-4)


def channel_after_channel(o, a, b):
    u = torch.einsum("btgk,grk->btrg", o.flatten(-2).unflatten(-1, (G, -1)), a.unflatten(0, (G, -1)))
    return F.linear(u.flatten(-2), b)


def groups_of_neighbours(o, a, b):
    """Rows g, g + G ... belong to group g."""
    u = torch.einsum("btgk,rgk->btgr", o.flatten(-2).unflatten(-1, (G, -1)), a.unflatten(0, (-1, G)))
    return F.linear(u.flatten(-2), b)


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("f", [channel_after_channel, groups_of_neighbours])
def test_other_orders_stay(f, T, rewritten):
    _, a, b = drawn()
    o = torch.randn(2, T, 6, 7)
    got, report = rewritten(f, o, a, b)
    assert report.counts["output_projection"] == 0
    torch.testing.assert_close(got, f(o, a, b), rtol=1e-4, atol=1e-4)
