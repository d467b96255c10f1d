"""Sinkhorn: the op against the definition in Python floats, and chains of every length in every spelling."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_compile.lowerings.sinkhorn import FEW, FEWEST, sinkhorn

RUNS = [sinkhorn, sinkhorn.meaning]
NAMES = ["cpu", "meaning"]


def definition(logits, iters, eps):
    """One matrix after the other, number by number."""
    rows, columns = logits.shape[-2:]
    done = []
    for matrix in logits.double().reshape(-1, rows, columns).tolist():
        c = []
        for row in matrix:
            e = [math.exp(x - max(row)) for x in row]
            c.append([x / sum(e) + eps for x in e])
        for step in range(2 * iters - 1):
            if step % 2:
                c = [[x / (sum(row) + eps) for x in row] for row in c]
            else:
                sums = [sum(row[j] for row in c) + eps for j in range(columns)]
                c = [[x / s for x, s in zip(row, sums, strict=True)] for row in c]
        done.append(c)
    return torch.tensor(done, dtype=torch.float64).view(logits.shape)


@pytest.fixture
def poisoned():
    """Memory that an implementation allocates and does not write is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


SHAPES = [
    (4, 4),
    (1, 1, 4, 4),
    (2, 3, 4, 4),
    (FEWEST, 4, 4),
    (FEW, 4, 4),
    (FEW + 1, 4, 4),
    (3, 1, 1),
    (0, 4, 4),
    (5, 2, 3),
    (40, 3, 2),
]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("iters", [1, 2, 20])
def test_meaning_and_cpu_say_what_the_definition_says(shape, iters):
    logits = torch.randn(*shape, dtype=torch.float64) * 2
    want = definition(logits, iters, 1e-6)
    for run in RUNS:
        torch.testing.assert_close(run(logits, iters, 1e-6), want, rtol=1e-12, atol=1e-14)
        single = run(logits.float(), iters, 1e-6)
        torch.testing.assert_close(single.double(), want, rtol=1e-5, atol=1e-6)
        assert single.is_contiguous() and single.dtype == torch.float32


def test_zeros_are_divided_by_as_tensors_divide():
    """Without eps a column that underflows gives inf and NaN, not an error."""
    logits = torch.tensor([[0.0, -200, 0, 0]]).expand(1, 4, 4)
    torch.testing.assert_close(sinkhorn(logits, 3, 0.0), sinkhorn.meaning(logits, 3, 0.0), equal_nan=True)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 2 * FEW), st.integers(1, 6), st.integers(1, 8), st.sampled_from([1e-6, 1e-2]), st.integers(0, 99))
def test_symmetries(N, n, iters, eps, seed):
    """Constants added to rows change nothing; rows and columns that change places do so in the result."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(N, n, n, generator=g, dtype=torch.float64) * 3
    c = sinkhorn(logits, iters, eps)
    assert (c > 0).all() and (c.sum(-2) < 1).all()  # eps in the last divisor keeps sums below 1
    torch.testing.assert_close(sinkhorn(logits + torch.arange(n).unsqueeze(-1), iters, eps), c)
    rows, columns = torch.randperm(n, generator=g), torch.randperm(n, generator=g)
    torch.testing.assert_close(sinkhorn(logits[:, rows][..., columns], iters, eps), c[:, rows][..., columns])


@pytest.mark.parametrize("run", RUNS, ids=NAMES)
def test_golden_numbers(run):
    logits = torch.tensor([[1, 0, -1, 2], [0.5, 0.5, 0, 0], [-2, 1, 3, 0], [0, 0, 0, 1]])
    want = [
        [0.353554, 0.133830, 0.023298, 0.489318],
        [0.379785, 0.390774, 0.112157, 0.117283],
        [0.010238, 0.211554, 0.739695, 0.038511],
        [0.256422, 0.263841, 0.124850, 0.354887],
    ]
    torch.testing.assert_close(run(logits, 20, 1e-6), torch.tensor(want), rtol=0, atol=1e-6)


@pytest.mark.parametrize("run", RUNS, ids=NAMES)
def test_half_precision_and_any_strides(run):
    logits = torch.randn(4, 5, 3, 4).permute(2, 1, 0, 3).to(torch.bfloat16)  # [3, 5, 4, 4]
    out = run(logits, 3, 1e-6)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), definition(logits, 3, 1e-6), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("run", RUNS, ids=NAMES)
def test_steep_logits_stay_finite(run):
    """Rows that all want one column: entries fall to eps and below, the two scaling vectors grow far apart."""
    logits = torch.tensor([[60.0, -60, 0, 0]] * 3 + [[-80.0, 90, 0, 0]]).expand(FEW + 1, 4, 4)
    for x in (logits[0], logits):
        torch.testing.assert_close(run(x, 20, 1e-6).double(), definition(x, 20, 1e-6), rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (40, 4, 4), (4, 4)], ids=str)
def test_opcheck(shape):
    torch.library.opcheck(sinkhorn.target, (torch.randn(shape), 3, 1e-6))


def test_cost_counts_every_half_step():
    cost = sinkhorn.symbolic_cost().at(N=2, n=4, iters=20)
    assert (cost.flops, cost.read, cost.write) == (2 * (80 + 39 * 36), 128, 128)


# -- raising


def spelled(logits, iters, eps):
    """Operands the other way round, dims from the left, softmax by hand."""
    e = (logits - logits.amax(2, keepdim=True)).exp()
    c = eps + e / e.sum(2, keepdim=True)
    for i in range(2 * iters - 1):
        c = torch.div(c, eps + torch.sum(c, (1 + i % 2,), keepdim=True))
    return c


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_chains_of_any_length_and_spelling_raise(rewritten, dtype):
    def four(a, b, c, d):
        chains = [sinkhorn.meaning(x, iters, 1e-6) for iters, x in ((1, a), (2, b), (6, c[:1]))]
        return *chains, spelled(d if d.dtype == torch.float64 else d.float(), 3, 1e-3)

    args = [torch.randn(5, 4, 4).to(dtype) for _ in range(4)]
    result, report = rewritten(four, *args)
    assert report.rules["raise.sinkhorn"] == 4
    assert report.runs == {("sinkhorn", "cpu"): 4}
    torch.testing.assert_close(result, four(*args))


def test_an_unclaimed_chain_is_put_back(rewritten):
    logits = torch.randn(2, 1, 4, 4)
    result, report = rewritten(lambda x: sinkhorn.meaning(x, 3, 1e-6), logits, lowerings="none")
    assert report.runs["sinkhorn", "inlined: no implementation"] == 1
    torch.testing.assert_close(result, sinkhorn.meaning(logits, 3, 1e-6))


def steps(c, *dims, eps=1e-6):
    for dim in dims:
        c = c / (c.sum(dim, keepdim=True) + eps)
    return c


WRONG = {
    "rows first": (
        lambda x: steps(torch.softmax(x, -1) + 1e-6, -1, -2, -1, -2),
        "division 1 of 4 over columns (it is over rows)",
    ),
    "rows last": (
        lambda x: steps(torch.softmax(x, -1) + 1e-6, -2, -1),
        "columns divided last (division 2 is over rows)",
    ),
    "columns twice": (
        lambda x: steps(torch.softmax(x, -1) + 1e-6, -2, -2, -1, -2),
        "division 2 of 4 over rows (it is over columns)",
    ),
    "no eps once": (
        lambda x: steps(steps(torch.softmax(x, -1) + 1e-6, -2, -1), -2, eps=0.0),
        "eps 1e-06 in division 3 of 3 (it is 0.0)",
    ),
    "another eps": (
        lambda x: steps(steps(torch.softmax(x, -1) + 1e-6, -2), -1, -2, eps=1e-5),
        "eps 1e-06 in division 2 of 3 (it is 1e-05)",
    ),
    "no eps at the start": (
        lambda x: steps(torch.softmax(x, -1), -2, -1, -2),
        "softmax of the rows plus eps before the first division (it is dsv4.softmax)",
    ),
    "softmax of columns": (
        lambda x: steps(torch.softmax(x, -2) + 1e-6, -2, -1, -2),
        "softmax of the rows plus eps before the first division (it is aten.add)",
    ),
    "no softmax": (
        lambda x: steps(torch.sigmoid(x) + 1e-6, -2, -1, -2),
        "softmax of the rows plus eps before the first division (it is aten.add)",
    ),
}


def test_what_is_not_sinkhorn_stays_and_says_why(rewritten):
    def all_of_them(*xs):
        return [f(x) for (f, _), x in zip(WRONG.values(), xs, strict=True)]

    xs = torch.randn(len(WRONG), 3, 4, 4).unbind()
    result, report = rewritten(all_of_them, *xs)
    assert report.rules["raise.sinkhorn"] == 0
    torch.testing.assert_close(result, all_of_them(*xs))
    said = [m.expected for m in report.misses if m.rule == "raise.sinkhorn/chain"]
    assert sorted(set(said)) == sorted({reason for _, reason in WRONG.values()})


@pytest.mark.parametrize("kept", [True, False])
def test_sums_must_lie_beside_their_rows(rewritten, kept):
    """Of a square matrix without batch axes, c / c.sum(-1) divides column j by the sum of row j: only the first division is
    one of a chain."""

    def chain(x):
        c = torch.softmax(x, -1) + 1e-6
        c = c / (c.sum(0, keepdim=True) + 1e-6)
        rows = c.sum(-1) + 1e-6
        c = c / (rows.unsqueeze(-1) if kept else rows)
        return c / (c.sum(0, keepdim=True) + 1e-6)

    x = torch.randn(4, 4)
    result, report = rewritten(chain, x)
    assert report.rules["raise.sinkhorn"] == 1
    assert report.graphs[0].nodes_after == (3 if kept else 10)  # with placeholder and output
    torch.testing.assert_close(result, chain(x))


def test_divisions_by_sums_are_not_near(rewritten):
    def shares(x, y):
        return (
            x / (x.sum(-1, keepdim=True) + 1e-20) * 1.5,
            y / y.sum(-2, keepdim=True),
            x / (y.sum(-1, keepdim=True) + 1),
        )

    _, report = rewritten(shares, torch.rand(3, 4), torch.rand(3, 4))
    assert report.rules["raise.sinkhorn"] == 0 and not report.misses


def test_a_matrix_that_is_read_half_way_refuses(rewritten):
    def leaks(x):
        half = steps(torch.softmax(x, -1) + 1e-6, -2)
        return steps(half, -1, -2), half.exp()

    _, report = rewritten(leaks, torch.randn(3, 4, 4))
    assert report.rules["raise.sinkhorn"] == 0
    assert any("is also read by" in m.found for m in report.misses)
