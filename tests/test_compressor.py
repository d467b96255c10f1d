"""The compressor: the op against the formula, the CPU implementation against the op."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_compile.lowerings.compressor import compressor


def case(B=2, S=13, n=3, m=4, d=10, dr=6, overlap=True, dtype=torch.float32, seed=0, open_windows=1, missing=2):
    """Random arguments; the last windows are open (all rows -1), the first lacks its oldest `missing` rows."""
    g = torch.Generator().manual_seed(seed)
    R, C = (1 + overlap) * m, (1 + overlap) * d
    c, z = torch.randn(B, S, C, generator=g, dtype=dtype), 2 * torch.randn(B, S, C, generator=g, dtype=dtype)
    index = torch.randint(0, S, (B, n, R), generator=g)
    index[:, 0, : min(missing, R - 1)] = -1
    index[:, n - open_windows :] = -1
    weight = 1 + torch.randn(d, generator=g, dtype=dtype) / 5
    angle = 3 * torch.randn(B, n, dr // 2, generator=g, dtype=dtype)
    return c, z, index, weight, angle.cos(), angle.sin(), 1e-6, overlap


def formula(c, z, index, weight, cos, sin, eps, overlap):
    """Channel by channel in fp64: e = sum_r softmax_r(z) c, RMSNorm, then pairs rotated by complex multiplication."""
    (B, n, R), d = index.shape, len(weight)
    out = torch.zeros(B, n, d, dtype=torch.float64)
    for b in range(B):
        for w in range(n):
            rows = [(r, i) for i, r in enumerate(index[b, w].tolist()) if r >= 0]
            if not rows:
                continue
            columns = [slice(0, d) if not overlap or i < R // 2 else slice(d, 2 * d) for _, i in rows]
            values = torch.stack([c[b, r, s].double() for (r, _), s in zip(rows, columns, strict=True)])
            gates = torch.stack([z[b, r, s].double() for (r, _), s in zip(rows, columns, strict=True)])
            e = (gates.exp() / gates.exp().sum(0) * values).sum(0)
            e = e / (e.pow(2).mean() + eps).sqrt() * weight.double()
            pairs = torch.view_as_complex(e[d - 2 * cos.shape[-1] :].reshape(-1, 2).clone())
            turned = pairs * torch.complex(cos[b, w].double(), sin[b, w].double())
            out[b, w] = torch.cat([e[: d - 2 * cos.shape[-1]], torch.view_as_real(turned).flatten()])
    return out


SHAPES = [
    dict(),
    dict(overlap=False),
    dict(B=1, n=1, open_windows=0),
    dict(B=1, n=1, open_windows=1),
    dict(m=1, d=3, dr=2, overlap=False),
    dict(m=128, S=150, d=33, dr=4, overlap=False, open_windows=2),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_meaning_and_cpu_say_what_the_formula_says(shape):
    args = case(**shape, dtype=torch.float64)
    want = formula(*args)
    torch.testing.assert_close(compressor.meaning(*args), want)
    torch.testing.assert_close(compressor(*args), want)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(3, 9),
    st.booleans(),
    st.integers(0, 9),
    st.integers(0, 99),
)
def test_cpu_equals_the_meaning_on_odd_shapes(B, n, m, d, overlap, missing, seed):
    args = case(B, 7, n, m, d, 2, overlap, seed=seed, open_windows=seed % (n + 1), missing=missing)
    torch.testing.assert_close(compressor(*args), compressor.meaning(*args), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("run", [compressor, compressor.meaning], ids=["cpu", "meaning"])
def test_an_open_window_gives_zeros_whatever_the_rows_hold(run):
    c, z, index, *rest = case(open_windows=3)
    assert run(c, z, index, *rest).abs().max() == 0
    unnamed = c.clone()
    unnamed[:, 1:] = float("nan")  # row 0 stands in for "none"
    assert run(unnamed, z, index, *rest).abs().max() == 0


def test_the_worked_example_of_overlapping_windows():
    """Values t (first half) and 100 + t (second), equal gates: entries 101.5, 53.5, 57.5 before the norm."""
    t = torch.arange(12.0, dtype=torch.float64)
    c = torch.stack([t, t, t, 100 + t, 100 + t, 100 + t], -1)[None]
    rows = torch.tensor([[-1, -1, -1, -1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7], [4, 5, 6, 7, 8, 9, 10, 11]])[None]
    one, zero = torch.ones(1, 3, 1, dtype=torch.float64), torch.zeros(1, 3, 1, dtype=torch.float64)
    huge = 1e12  # an eps that makes the norm a division by 1e6
    e = compressor(c, torch.zeros_like(c), rows, torch.ones(3, dtype=torch.float64), one, zero, huge, True)
    torch.testing.assert_close(
        e[0, :, 0] * 1e6, torch.tensor([101.5, 53.5, 57.5], dtype=torch.float64), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("overlap", [True, False])
def test_opcheck(overlap):
    torch.library.opcheck(compressor.target, case(overlap=overlap))


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        dict(B=1, S=9, n=1, d=512, dr=64, open_windows=0),
        dict(B=1, S=9, n=1, d=512, dr=64, open_windows=1),
        dict(B=3, S=40, n=7, d=128, dr=64, m=4),
        dict(B=2, S=300, n=3, d=512, dr=64, m=128, overlap=False, missing=77),
        dict(B=2, n=4, d=20, dr=6, m=3, missing=5),
        dict(B=1, n=2, d=132, dr=132, m=1, overlap=False),
        dict(B=2, n=0, d=20, dr=6, open_windows=0),
    ],
    ids=str,
)
def test_the_kernel_is_the_meaning(shape, weight, kernel_parity):
    def drawn(seed):
        args = list(case(**shape, seed=seed)) if shape.get("n") else empty(**shape)
        args[3] = args[3].to(weight)
        return args

    kernel_parity(compressor, *drawn(0), others=drawn(1), rtol=2e-4, atol=2e-4)


def empty(B, n, d, dr, open_windows):
    c, z, index, w, cos, sin, *rest = case(B=B, n=1, d=d, dr=dr)
    return [c, z, index[:, :0], w, cos[:, :0], sin[:, :0], *rest]
