"""mHC: the ops against the formula in fp64, and the reference model's modules, compiled, in all dtypes and shapes."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dsv4_compile.lowerings.mhc import mhc_head, mhc_post, mhc_pre
from dsv4_compile.lowerings.sinkhorn import sinkhorn
from dsv4_compile.reference_model import DSV4Config
from dsv4_compile.reference_model.layers import RMSNorm
from dsv4_compile.reference_model.model import HyperConnection, HyperHead, reconnect

ITERS, EPS, RMS_EPS = 4, 1e-4, 1e-3  # large enough to be missed


def weights(n, D, m, scales, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    fn = torch.randn(m, n * D, generator=g, dtype=torch.float64) * (n * D) ** -0.5
    base, scale = (torch.randn(k, generator=g, dtype=torch.float64) for k in (m, scales))
    return [w.to(dtype) for w in (fn, base, scale)]


def coefficients(X, fn):
    """Rows of X [N, n, D] over their root mean square, times fn, stream by stream."""
    N, n, D = X.shape
    mix = sum(X[:, j] @ fn[:, j * D : (j + 1) * D].t() for j in range(n))
    return mix / (X.pow(2).sum((1, 2)) / (n * D) + RMS_EPS).sqrt().view(N, 1)


def pre_formula(X, fn, base, scale):
    X, fn, base, scale = (t.double() for t in (X, fn, base, scale))
    N, n, D = X.shape
    z = coefficients(X, fn)
    gate = lambda i, s: 1 / (1 + (-(z[:, i] * scale[s] + base[i])).exp())  # noqa: E731
    x = sum((gate(j, 0) + EPS).view(N, 1) * X[:, j] for j in range(n)) + torch.zeros(N, D, dtype=torch.float64)
    post = torch.stack([2 * gate(n + j, 1) for j in range(n)], -1)
    c = [[z[:, (2 + i) * n + j] * scale[2] + base[(2 + i) * n + j] for j in range(n)] for i in range(n)]
    c = torch.stack([torch.stack(row, -1) for row in c], 1).exp()
    c = c / c.sum(2, keepdim=True) + EPS
    for step in range(2 * ITERS - 1):
        c = c / (c.sum(1 + step % 2, keepdim=True) + EPS)
    return x, post, c


def post_formula(X, y, post, comb):
    X, y, post, comb = (t.double() for t in (X, y, post, comb))
    n = X.shape[1]
    rows = [post[:, k, None] * y + sum(comb[:, j, k, None] * X[:, j] for j in range(n)) for k in range(n)]
    return torch.stack(rows, 1)


def head_formula(X, fn, base, scale):
    X, fn, base, scale = (t.double() for t in (X, fn, base, scale))
    pre = 1 / (1 + (-(coefficients(X, fn) * scale + base)).exp()) + EPS
    return torch.stack([(pre * X[:, :, d]).sum(1) for d in range(X.shape[2])], 1)


def cases(N, n, D, dtype=torch.float64, seed=0):
    """(op, arguments, what the formula says) of each of the three ops."""
    g = torch.Generator().manual_seed(seed)
    X, y = (torch.randn(*s, generator=g).to(dtype) for s in ((N, n, D), (N, D)))
    exact = torch.promote_types(dtype, torch.float32)
    post, comb = (torch.rand(*s, generator=g).to(exact) for s in ((N, n), (N, n, n)))
    wide, narrow = weights(n, D, (2 + n) * n, 3, exact, seed), weights(n, D, n, 1, exact, seed)
    yield mhc_pre, (X, *wide, ITERS, EPS, RMS_EPS), pre_formula(X, *wide)
    yield mhc_post, (X, y, post, comb), post_formula(X, y, post, comb)
    yield mhc_head, (X, *narrow, EPS, RMS_EPS), head_formula(X, *narrow)


def parts(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", [(1, 4, 192), (33, 4, 10), (1, 1, 1), (3, 2, 1), (2, 5, 7), (0, 4, 6)], ids=str)
def test_meaning_and_cpu_say_what_the_formula_says(shape):
    for op, args, want in cases(*shape):
        for run in (op, op.meaning):
            for got, w in zip(parts(run(*args)), parts(want), strict=True):
                torch.testing.assert_close(got, w, rtol=1e-11, atol=1e-12)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 20), st.integers(1, 5), st.integers(1, 9), st.integers(0, 99))
def test_single_precision_on_odd_shapes(N, n, D, seed):
    for op, args, want in cases(N, n, D, torch.float32, seed):
        for run in (op, op.meaning):
            for got, w in zip(parts(run(*args)), parts(want), strict=True):
                torch.testing.assert_close(got.double(), w, rtol=1e-4, atol=1e-5)


def test_streams_are_rounded_once_and_coefficients_stay_exact():
    for op, args, want in cases(9, 4, 64, torch.bfloat16):
        for run in (op, op.meaning):
            got = parts(run(*args))
            assert [g.dtype for g in got] == [torch.bfloat16, torch.float32, torch.float32][: len(got)]
            assert all(g.is_contiguous() for g in got)
            torch.testing.assert_close(got[0].double(), parts(want)[0], rtol=2**-8, atol=1e-5)
            for g, w in zip(got[1:], parts(want)[1:], strict=True):
                torch.testing.assert_close(g.double(), w, rtol=1e-5, atol=1e-5)


def test_leading_axes_and_strides_do_not_matter():
    for op, args, want in cases(6, 4, 8):
        split = [a.unflatten(0, (2, 3)) if isinstance(a, torch.Tensor) and len(a) == 6 else a for a in args]
        split = [strided(a) if isinstance(a, torch.Tensor) else a for a in split]
        for run in (op, op.meaning):
            for got, w in zip(parts(run(*split)), parts(want), strict=True):
                torch.testing.assert_close(got.flatten(0, 1), w)


def strided(x):
    """The same numbers with gaps between them."""
    return torch.stack([x, x], -1)[..., 0]


@pytest.mark.parametrize("run", [mhc_post, mhc_post.meaning], ids=["cpu", "meaning"])
def test_golden_numbers(run):
    logits = torch.tensor([[1, 0, -1, 2], [0.5, 0.5, 0, 0], [-2, 1, 3, 0], [0, 0, 0, 1]])
    comb = sinkhorn(logits, 20, 1e-6)
    X, y = torch.arange(1.0, 9).view(4, 2), torch.tensor([10.0, -10])
    want = [[8.33905, -0.66095], [14.21081, -4.78919], [19.93219, -9.06781], [23.51793, -15.48207]]
    got = run(X, y, torch.tensor([0.5, 1, 1.5, 2]), comb)
    torch.testing.assert_close(got, torch.tensor(want), rtol=0, atol=1e-5)
    other_way = run(X, y, torch.tensor([0.5, 1, 1.5, 2]), comb.t())
    torch.testing.assert_close(other_way[0], torch.tensor([9.29676, 0.29676]), rtol=0, atol=1e-5)


def test_opcheck():
    for op, args, _ in cases(3, 4, 6, torch.bfloat16):
        torch.library.opcheck(op.target, args)


def test_costs_are_those_of_the_products():
    """Flash: 4 streams of 4096 channels, 24 coefficients."""
    pre = mhc_pre.symbolic_cost().at(N=1, n=4, D=4096, iters=20)
    assert 2 * 24 * 16384 < pre.flops < 1.15 * 2 * 24 * 16384
    assert pre.read == 2 * 16384 + 4 * (24 * 16384 + 24)
    post = mhc_post.symbolic_cost().at(N=7, n=4, D=4096)
    assert (post.flops, post.write) == (7 * 2 * 20 * 4096, 7 * 2 * 16384)
    assert mhc_head.symbolic_cost().at(N=1, n=4, D=4096).write == 2 * 4096


# -- raising

CONFIG = replace(DSV4Config.tiny(), hc_sinkhorn_iters=3)


class Site(nn.Module):
    """A block with its connections, as in the reference model."""

    def __init__(self, dtype, n=CONFIG.hc_mult):
        super().__init__()
        config = replace(CONFIG, hc_mult=n)
        self.connection, self.head, self.norm = (
            HyperConnection(config),
            HyperHead(config),
            RMSNorm(CONFIG.hidden_size, 1e-6),
        )
        self.block = nn.Linear(CONFIG.hidden_size, CONFIG.hidden_size, bias=False)
        self.to(dtype).requires_grad_(False)

    def forward(self, X):
        x, post, comb = self.connection(X)
        X = reconnect(X, self.block(self.norm(x)), post, comb)
        return X, self.head(X[:, -1:])


@pytest.mark.parametrize(
    ("dtype", "B", "T"),
    [
        (torch.bfloat16, 1, 1),
        (torch.bfloat16, 2, 3),
        (torch.float32, 3, 1),
        (torch.float32, 1, 3),
        (torch.float64, 1, 1),
    ],
)
def test_the_model_raises(rewritten, dtype, B, T):
    site, X = Site(dtype), torch.randn(B, T, CONFIG.hc_mult, CONFIG.hidden_size).to(dtype)
    result, report = rewritten(site, X)
    assert report.counts["mhc"] == 3
    assert {name for name, how in report.runs if how == "cpu"} >= {"mhc_pre", "mhc_post", "mhc_head"}
    assert not [m for m in report.misses if "mhc" in m.rule]
    tolerance = {torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(result, site(X), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_any_number_of_streams_raises(rewritten, n):
    """With one, nothing is summed and no product of matrices is left."""
    site, X = Site(torch.bfloat16, n), torch.randn(2, 1, n, CONFIG.hidden_size).bfloat16()
    result, report = rewritten(site, X)
    assert report.counts["mhc"] == 3 and report.rules["fuse.mhc"] == 3
    torch.testing.assert_close(result, site(X), rtol=2e-2, atol=2e-2)


ONE = {  # spellings of the mixture of one stream, and whether it is one
    "products": (lambda X, y, p, c: p.unsqueeze(-1) * y.unsqueeze(-2) + c.mT @ X, True),
    "a sum": (lambda X, y, p, c: (c.unsqueeze(-1) * X.unsqueeze(-2)).sum(-3) + y.unsqueeze(-2) * p.unsqueeze(-1), True),
    "without views": (lambda X, y, p, c: (p * y + c[:, 0] * X[:, 0]).unsqueeze(1), True),
    "einsum": (lambda X, y, p, c: p.unsqueeze(-1) * y.unsqueeze(-2) + torch.einsum("nij,nid->njd", c, X), True),
    "einsums": (lambda X, y, p, c: torch.einsum("nij,nid->njd", c, X) + torch.einsum("ni,nd->nid", p, y), True),
    "another number's factor": (lambda X, y, p, c: p * y.unsqueeze(-2) + c.mT @ X, False),
    "another stream": (lambda X, y, p, c: p.unsqueeze(-1) * y.unsqueeze(-2) + c.mT @ (X + 1), False),
    "less": (lambda X, y, p, c: c.mT @ X - p.unsqueeze(-1) * y.unsqueeze(-2), False),
}


def test_what_is_the_mixture_of_one_stream_and_what_is_not(rewritten):
    """As many tokens as channels, so that a factor fits either."""
    N = CONFIG.hidden_size
    connections = nn.ModuleList(Site(torch.float32, 1).connection for _ in ONE)

    def all_of_them(*args):
        for X, connection, (mixture, _) in zip(args, connections, ONE.values(), strict=True):
            x, post, comb = connection(X)
            yield x, mixture(X, X[:, 0].sin(), post, comb)

    args = torch.randn(len(ONE), N, 1, N).unbind()
    result, report = rewritten(lambda *args: tuple(all_of_them(*args)), *args, strict=False)
    assert report.runs["mhc_pre", "cpu"] == len(ONE)
    assert report.runs["mhc_post", "cpu"] == sum(right for _, right in ONE.values())
    torch.testing.assert_close(result, tuple(all_of_them(*args)))


def test_the_mixture_gets_the_streams_as_they_are_stored(rewritten, monkeypatch):
    """The product that it is found by reads a view of widened streams: kernels take the stored ones."""
    seen, implementations = [], mhc_post.implementations

    def claims(a):
        seen.append((a.X.dtype, a.y.dtype))
        return "not here"

    monkeypatch.setattr(mhc_post, "implementations", [replace(i, when=claims) for i in implementations])
    rewritten(Site(torch.bfloat16), torch.randn(1, 1, CONFIG.hc_mult, CONFIG.hidden_size).bfloat16())
    assert seen == [(torch.bfloat16, torch.bfloat16)]


def test_a_block_that_is_called_twice_is_two_sites(rewritten):
    """Equal parts of the weights are one node of the graph, read by both calls."""
    site, (X, Y) = Site(torch.float32), torch.randn(2, 1, 2, CONFIG.hc_mult, CONFIG.hidden_size)
    twice = lambda: (site(X), site(Y))  # noqa: E731
    result, report = rewritten(twice)
    assert report.counts["mhc"] == 6
    torch.testing.assert_close(result, twice())


def test_a_symbolic_length_stays_symbolic(rewritten):
    site, X = Site(torch.bfloat16), torch.randn(2, 5, CONFIG.hc_mult, CONFIG.hidden_size).to(torch.bfloat16)
    torch._dynamo.mark_dynamic(X, 1)  # an error if a rule made the length a constant
    result, report = rewritten(site, X)
    assert report.counts["mhc"] == 3
    torch.testing.assert_close(result, site(X), rtol=2e-2, atol=2e-2)


def pre(X, fn, base, scale, **changed):
    """The formula with places to change; as it stands it is spelled differently from the model: commuted, x * x, and the
    norm before the product."""
    c = {"post": 2.0, "eps": EPS, "axes": (-2, -1), "over": -2, "comb_eps": EPS} | changed
    n = X.shape[-2]
    f = X.float()
    f = torch.rsqrt(RMS_EPS + torch.mean(f * f, c["axes"], keepdim=True)) * f if len(c["axes"]) == 1 else f.flatten(-2)
    if len(c["axes"]) == 2:
        f = torch.rsqrt(RMS_EPS + torch.mean(f * f, -1, keepdim=True)) * f
    mix = F.linear(f.reshape(*X.shape[:-2], -1), fn)
    p, q, m = mix.split([n, n, n * n], -1)
    pb, qb, mb = base.split([n, n, n * n])
    ps, qs, ms = scale.unbind(0)
    p, q = torch.sigmoid(pb + ps * p), torch.sigmoid(qb + qs * q) * c["post"]
    p = p if c["eps"] is None else c["eps"] + p
    comb = sinkhorn.meaning(mb.view(n, n) + ms * m.view(*m.shape[:-1], n, n), ITERS, c["comb_eps"])
    return (X * p.unsqueeze(-1)).sum(c["over"]).to(X.dtype), q, comb


@pytest.mark.parametrize(
    ("dtype", "T", "n"), [(torch.bfloat16, 3, 4), (torch.float32, 3, 4), (torch.float32, 1, 1)], ids=str
)
def test_the_norm_before_the_product_raises(rewritten, dtype, T, n):
    def model(X, y, Z, fn, base, scale):
        x, post, comb = pre(X, fn, base, scale)
        mixed = post.to(X.dtype).unsqueeze(-1) * y.unsqueeze(-2) + torch.matmul(comb.to(X.dtype).mT, X)
        f = Z.float().flatten(2)
        f = f * torch.rsqrt(f.square().mean(-1, keepdim=True) + RMS_EPS)
        last = torch.sigmoid(F.linear(f, fn[:n]) * scale[:1] + base[:n]) + EPS
        return x, post, comb, mixed, (last.unsqueeze(-1) * Z).sum(2).to(Z.dtype)

    X, y, Z = torch.randn(2, T, n, 6).to(dtype), torch.randn(2, T, 6).to(dtype), torch.randn(2, T, n, 6).to(dtype)
    args = X, y, Z, *weights(n, 6, (2 + n) * n, 3, torch.float32)
    result, report = rewritten(model, *args)
    assert report.counts["mhc"] == 3
    assert report.runs["mhc_pre", "cpu"] == report.runs["mhc_post", "cpu"] == report.runs["mhc_head", "cpu"] == 1
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(result, model(*args), rtol=tolerance, atol=tolerance)


FIRST = {
    "einsum": lambda p, X: torch.einsum("...n,...nd->...d", p, X),
    "from the right": lambda p, X: (X.mT @ p.unsqueeze(-1)).squeeze(-1),
}


@pytest.mark.parametrize(("spelling", "length"), [("einsum", 1), ("einsum", 3), ("from the right", 3)])
def test_the_first_collapse_raises_as_a_product(rewritten, spelling, length):
    """Its streams are one embedding, repeated: products turn them on the way, and repeat the turned."""

    def first(tokens, table, fn, base, scale):
        X = table[tokens].unsqueeze(2).expand(-1, -1, 4, -1)
        f = X.flatten(2)
        r = torch.rsqrt(f.square().mean(-1, keepdim=True) + RMS_EPS)
        coefficients = torch.sigmoid(F.linear(f, fn) * r * scale + base) + EPS
        return FIRST[spelling](coefficients, X)

    args = torch.randint(7, (2, length)), torch.randn(7, 6), *weights(4, 6, 4, 1, torch.float32)
    result, report = rewritten(first, *args)
    assert report.runs == {("mhc_head", "cpu"): 1}
    torch.testing.assert_close(result, first(*args))


def test_the_mixture_as_a_sum_raises(rewritten):
    def mixed(X, y, post, comb):
        return y.unsqueeze(2) * post.unsqueeze(-1) + torch.sum(X.unsqueeze(3) * comb.unsqueeze(-1), dim=2)

    args = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 6), torch.rand(2, 3, 4), torch.rand(2, 3, 4, 4)
    result, report = rewritten(mixed, *args)
    assert report.runs == {("mhc_post", "cpu"): 1}
    torch.testing.assert_close(result, mixed(*args))


def test_what_is_unclaimed_is_put_back(rewritten):
    site, X = Site(torch.float32), torch.randn(1, 1, CONFIG.hc_mult, CONFIG.hidden_size)
    result, report = rewritten(site, X, lowerings="none")
    assert report.counts["mhc"] == 3 and all("inlined" in how for _, how in report.runs)
    assert (
        report.runs["sinkhorn", "inlined: no implementation"] == 1
    )  # mhc_pre means sinkhorn, which is asked in its turn
    torch.testing.assert_close(result, site(X))


WRONG_PRE = {
    "post is tripled": ({"post": 3.0}, "value 2"),
    "no eps": ({"eps": None}, "aten.mul of aten.add, placeholder"),
    "a norm for each stream": (
        {"axes": (-1,)},
        "",
    ),  # differs near the anchor: too little is found to speak of a near miss
    "channels are collapsed": ({"over": -1}, "dim -2"),
    "two eps": ({"comb_eps": 2 * EPS}, "value eps"),
}


def test_what_is_not_the_collapse_stays_and_says_why(rewritten):
    def all_of_them(*args):
        pairs = zip(WRONG_PRE.values(), args, strict=True)
        return [pre(X, *w, **wrong) for (wrong, _), (X, *w) in pairs]

    args = [(X, *weights(4, 6, 24, 3, torch.float32)) for X in torch.randn(len(WRONG_PRE), 2, 4, 6)]
    result, report = rewritten(all_of_them, *args)
    assert report.counts["mhc"] == 0 and report.rules["raise.sinkhorn"] == len(WRONG_PRE)
    torch.testing.assert_close(result, all_of_them(*args))
    said = {m.expected for m in report.misses if m.rule == "fuse.mhc/pre_of_normed" and not m.rough}
    assert said == {reason for _, reason in WRONG_PRE.values() if reason}


WRONG_POST = {
    "comb is not transposed": lambda X, y, p, c: p.unsqueeze(-1) * y.unsqueeze(-2) + c @ X,
    "summed over the second index": lambda X, y, p, c: (
        p.unsqueeze(-1) * y.unsqueeze(-2) + (c.unsqueeze(-1) * X.unsqueeze(-3)).sum(-2)
    ),
    "streams along the wrong axis": lambda X, y, p, c: (
        p.unsqueeze(-1) * y.unsqueeze(-2) + (c.unsqueeze(-1) * X.unsqueeze(-3)).sum(-3)
    ),
    "y for every stream": lambda X, y, p, c: y.unsqueeze(-2) + c.mT @ X,
    "less": lambda X, y, p, c: c.mT @ X - p.unsqueeze(-1) * y.unsqueeze(-2),
}


@pytest.mark.parametrize("D", [4, 6])
def test_what_is_not_the_mixture_stays(rewritten, D):
    """With D = n, sizes alone cannot tell streams from channels."""

    def all_of_them(*args):
        return [f(*args) for f in WRONG_POST.values()]

    args = torch.randn(2, 3, 4, D), torch.randn(2, 3, D), torch.rand(2, 3, 4), torch.rand(2, 3, 4, 4)
    result, report = rewritten(all_of_them, *args)
    assert report.counts["mhc"] == 0
    torch.testing.assert_close(result, all_of_them(*args))


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("n", "D"), [(4, 192), (4, 4096), (4, 7168), (3, 40), (2, 4), (5, 1028)])
@pytest.mark.parametrize("lead", [(0, 3), (1, 1), (3,), (2, 33)], ids=str)
def test_the_kernels_are_the_meaning(lead, n, D, dtype, kernel_parity):
    tolerance = dict(rtol=1e-2, atol=2e-2) if dtype == torch.bfloat16 else dict(rtol=1e-4, atol=1e-4)
    drawn = (cases(torch.Size(lead).numel(), n, D, dtype, seed) for seed in (0, 1))
    for (op, args, _), (_, others, _) in zip(*drawn, strict=True):
        rows = [name in ("X", "y", "post", "comb") for name in op.arguments(*args)]
        args, others = (
            [a.view(*lead, *a.shape[1:]) if of_rows else a for a, of_rows in zip(given, rows, strict=True)]
            for given in (args, others)
        )
        kernel_parity(op, *args, others=others, **tolerance)
