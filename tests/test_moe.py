"""Routed experts: the op against the formula, the CPU implementation against the op, and all forms of the model."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_compile.lowerings.grouped_mm import grouped_mm
from dsv4_compile.lowerings.moe import few_and_streamed, moe
from dsv4_compile.reference_model import DSV4Config, quant
from dsv4_compile.reference_model.model import Experts, MoE

FORMATS = ["none", "fp8", "mxfp4", "nvfp4"]
LIMIT = 0.7  # small enough to clamp many
RUNS = [moe, moe.meaning]


def case(N=3, k=2, X=5, D=7, I=5, dtype=torch.float64, format="none", seed=0):
    """Arguments of the op up to `limit`, and its scales; experts may repeat within a token."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    stored = [
        quant.quantize(normal(*s).mul(s[-1] ** -0.5).to(dtype), format) for s in ((X, I, D), (X, I, D), (X, D, I))
    ]
    weights, scales, scales_2 = zip(*stored, strict=True)
    expert = torch.randint(0, X, (N, k), generator=g)
    gate = normal(N, k).abs().to(torch.promote_types(dtype, torch.float32))
    return normal(N, D).to(dtype), expert, gate, *weights, LIMIT, *scales, *scales_2


def formula(x, expert, gate, w1, w3, w2, limit, s1, s3, s2, t1, t3, t2):
    """Token by token, choice by choice, in fp64."""
    plain = [
        w.double() if s is None else quant.dequantize(w, s, t, kind(w, t)).double()
        for w, s, t in ((w1, s1, t1), (w3, s3, t3), (w2, s2, t2))
    ]
    y = torch.zeros(x.shape, dtype=torch.float64)
    for n in range(expert.shape[0]):
        for j in range(expert.shape[1]):
            first, third, second = (w[expert[n, j]] for w in plain)
            a, b = (first @ x[n].double()).clamp(max=limit), (third @ x[n].double()).clamp(-limit, limit)
            y[n] += gate[n, j].double() * (second @ (a / (1 + (-a).exp()) * b))
    return y


def kind(weight, scale_2):
    return "fp8" if weight.dtype == torch.float8_e4m3fn else "mxfp4" if scale_2 is None else "nvfp4"


# The op


SHAPES = [
    dict(),
    dict(N=1, k=1),
    dict(N=1, k=4, X=3),  # an expert twice in a token for sure
    dict(N=5, k=1),  # N k = X
    dict(N=6, k=1),
    dict(N=70, k=3, X=4, D=33, I=9),
    dict(N=40, k=2, X=64),
    dict(N=0),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_meaning_and_cpu_say_what_the_formula_says(shape):
    args = case(**shape)
    want = formula(*args)
    for run in RUNS:
        got = run(*args)
        assert got.is_contiguous()
        torch.testing.assert_close(got, want)


def worth_it(N: int, format: str) -> bool:
    """Whether the CPU runs the op of fp32 activations, where nobody insists."""
    args = case(N=N, dtype=torch.float32, D=128, I=128, format=format)
    names = dict(zip(moe.signature.parameters, args, strict=True))
    return moe.claim(names, if_worth=True)[0] is not None


@pytest.mark.parametrize(
    ("format", "k", "most"), [("none", 6, 40), ("none", 40, 8), ("mxfp4", 6, 64), ("mxfp4", 32, 64)]
)
def test_kernels_on_a_gpu_take_tokens_as_long_as_that_reads_less(format, k, most):
    """256 experts: eight tokens read those of their choices; else all are read, or dequantised."""

    def verdict(N):
        args = case(N=N, k=k, X=256, D=64, I=32, dtype=torch.bfloat16, format=format)
        return few_and_streamed(SimpleNamespace(**moe.arguments(*args)))

    assert verdict(1) is True and verdict(most) is True
    assert f"more than {most} rows" in verdict(most + 1)


def test_plain_matrices_of_few_choices_are_left_to_inductor():
    """Which reads them as fast; it does not where they are stored narrow, or sorted by expert."""
    assert not worth_it(1, "none") and not worth_it(2, "none")  # of 2 choices each, among 5 experts
    assert worth_it(3, "none") and all(worth_it(1, format) for format in FORMATS[1:])


@pytest.mark.parametrize("N", [1, 2, 9])
@pytest.mark.parametrize("format", FORMATS[1:])
def test_stored_weights(format, N):
    args = case(N, D=96, I=160, dtype=torch.float32, format=format)
    for run in RUNS:
        torch.testing.assert_close(run(*args).double(), formula(*args), rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 9), st.integers(1, 4), st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99)
)
def test_cpu_equals_the_meaning_on_odd_shapes(N, k, X, D, I, seed):
    args = case(N, k, X, D, I, seed=seed)
    torch.testing.assert_close(moe(*args), moe.meaning(*args))


def test_a_slab_of_experts_at_a_time(monkeypatch):
    monkeypatch.setattr("dsv4_compile.lowerings.moe.SLAB", 2 * 3 * 7 * 5)  # two of five
    args = case(N=30)
    torch.testing.assert_close(moe(*args), formula(*args))


@pytest.mark.parametrize("N", [1, 9])
@pytest.mark.parametrize("format", ["none", "mxfp4"])
def test_bf16_is_computed_in_fp32(format, N):
    args = case(N, D=96, I=64, dtype=torch.bfloat16, format=format)
    got, want = moe(*args), formula(*args)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moe.meaning(*args).double(), want, rtol=3e-2, atol=3e-2)


def test_each_token_is_summed_in_the_order_of_its_choices():
    """Contributions 2^27, 1, -2^27 in fp32, whose products are exact: only one order of three loses the 1. The same
    alone and among others."""
    w = torch.tensor([2.0**27, 1.0, -(2.0**27)]).view(3, 1, 1)
    one = torch.ones(3, 1, 1)
    silu = F.silu(torch.ones(())).item()
    for choices, want in (([0, 1, 2], 0.0), ([0, 2, 1], silu), ([2, 0, 1], silu), ([1, 0, 2], 0.0)):
        for before in (0, 1, 40):
            expert = torch.cat([torch.randint(0, 3, (before, 3)), torch.tensor([choices])])
            y = moe(torch.ones(before + 1, 1), expert, torch.ones(before + 1, 3), one, one, w, 2.0, *[None] * 6)
            assert y[-1].item() == pytest.approx(want), (choices, before)


@pytest.mark.parametrize(("N", "format"), [(2, "none"), (9, "mxfp4")])
def test_op_is_sound(N, format):
    checks = ["test_autograd_registration", "test_faketensor"]
    if format == "none":
        checks += ["test_schema", "test_aot_dispatch_dynamic"]  # the first negates inputs, which 8-bit floats cannot
    torch.library.opcheck(moe.target, case(N, D=32, I=64, dtype=torch.float32, format=format), test_utils=checks)


def test_cost_reads_each_expert_once():
    cost = moe.symbolic_cost().at(N=2, k=3, X=8, D=64, I=32, hit=5, bits=16)
    assert cost.flops == 6 * 2 * 3 * 64 * 32 and cost.read == 5 * 3 * 64 * 32 * 2 + 2 * 2 * 64 + 12 * 6
    assert cost.write == 4 * 2 * 64


# Grouped products


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("counts", [[3, 0, 40, 1], [0, 0, 5], [33], [1, 32, 31]], ids=str)
def test_grouped_mm_multiplies_each_group_with_its_matrix(dtype, counts):
    M, X = sum(counts), len(counts)
    x, w = torch.randn(M, 9, dtype=dtype), torch.randn(X, 5, 9, dtype=dtype)
    ends = torch.tensor(counts).cumsum(0)
    rows = x.double().split(counts)
    want = torch.cat([r @ m.double().t() for r, m in zip(rows, w, strict=True)]).to(dtype)
    for run in (grouped_mm, grouped_mm.meaning):
        torch.testing.assert_close(run(x, w, ends), want)
    checks = "test_autograd_registration", "test_faketensor", "test_schema"
    torch.library.opcheck(grouped_mm.target, (x, w, ends), test_utils=checks)
    assert grouped_mm.symbolic_cost().at(M=M, J=5, K=9, X=X).flops == 2 * M * 5 * 9


# The reference model


def experts(format="none", dtype=torch.float32, **changes):
    config = replace(DSV4Config.tiny(), **changes)
    return Experts(config, format).to(dtype).requires_grad_(False)


def tokens(module, N, k=3):
    X, _, D = module.w1.weight.shape
    D = module.w2.weight.shape[1]
    dtype = module.w1.weight.dtype if module.w1.format == "none" else torch.float32
    exact = torch.promote_types(dtype, torch.float32)
    return torch.randn(N, D).to(dtype), torch.randint(0, X, (N, k)), torch.rand(N, k, dtype=exact)


def close(got, want, dtype):
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


MODELS = [
    (1, 3, torch.float32, {}),
    (3, 3, torch.float64, {}),
    (10, 1, torch.float32, {}),  # N k = X
    (11, 1, torch.float32, {}),
    (9, 3, torch.float64, dict(hidden_size=37, moe_intermediate_size=41)),
    (2, 3, torch.bfloat16, {}),
    (9, 3, torch.bfloat16, {}),
    (9, 3, torch.bfloat16, dict(hidden_size=97)),
    (9, 3, torch.bfloat16, dict(moe_intermediate_size=41)),
]


@pytest.mark.parametrize(("N", "k", "dtype", "changes"), MODELS, ids=str)
def test_the_model_fuses_in_all_dtypes_and_sizes(rewritten, N, k, dtype, changes):
    module = experts(dtype=dtype, num_experts_per_tok=k, **changes)
    args = tokens(module, N, k)
    got, report = rewritten(module, *args)
    assert report.counts["moe"] == 1 and report.runs == {("moe", "cpu"): 1}
    close(got, module(*args), dtype)


STORED = [(f, n, d) for f in FORMATS[1:] for n, d in ((2, torch.float32), (9, torch.bfloat16))]


@pytest.mark.parametrize(("format", "N", "dtype"), [*STORED, ("mxfp4", 9, torch.float32)], ids=str)
def test_stored_weights_fuse_with_their_dequantisation(rewritten, format, N, dtype):
    module = experts(format, moe_intermediate_size=64)
    x, expert, gate = tokens(module, N)
    got, report = rewritten(module, x.to(dtype), expert, gate)
    assert report.counts["moe"] == 1 and report.runs == {("moe", "cpu"): 1}
    close(got, module(x.to(dtype), expert, gate), dtype)


@pytest.mark.parametrize(("N", "dtype"), [(2, torch.float32), (9, torch.float32), (9, torch.bfloat16)], ids=str)
def test_inlined_back_it_says_the_same(rewritten, N, dtype):
    module = experts(dtype=dtype)
    args = tokens(module, N)
    got, report = rewritten(module, *args, lowerings="none")
    assert report.runs == {("moe", "inlined: no implementation"): 1}
    close(got, module(*args), dtype)


@pytest.mark.parametrize(("dtype", "lowerings"), [(torch.float32, "none"), (torch.bfloat16, "cpu")], ids=str)
def test_one_graph_for_all_lengths(rewritten, dtype, lowerings):
    """Without lowerings the meaning is traced with a symbolic length."""
    module = experts(dtype=dtype, moe_intermediate_size=41)

    def f(x):
        best = x[:, :10].float().softmax(-1).topk(3, -1)
        return module(x, best.indices, best.values)

    x = torch.randn(19, 96).to(dtype)
    torch._dynamo.mark_dynamic(x, 0)
    got, report = rewritten(f, x, lowerings=lowerings)
    assert report.counts["moe"] == 1
    close(got, f(x), dtype)


@pytest.mark.parametrize("kind", ["moe", "hash_moe"])
def test_the_whole_block_with_replayed_choices(rewritten, kind):
    config = DSV4Config.tiny()
    module = MoE(config, kind, "none").requires_grad_(False)
    x, token = torch.randn(2, 4, config.hidden_size), torch.randint(0, config.vocab_size, (2, 4))
    pick = torch.randint(0, config.n_routed_experts, (8, config.num_experts_per_tok))
    (got, chosen), report = rewritten(module, x, token, pick)
    want, _ = module(x, token, pick)
    assert report.counts["moe"] == 1 and torch.equal(chosen, pick)
    close(got, want, torch.float32)


# What is no mixture of experts


def swiglu(g, u, low=-LIMIT, top=LIMIT):
    return F.silu(g.clamp(max=top)) * u.clamp(low, top)


def few(x, expert, gate, w1, w3, w2, act=swiglu, rows=None, last=lambda y, g: (y * g.unsqueeze(-1)).sum(1)):
    k, chosen = expert.shape[-1], expert.flatten()
    m1, m3, m2 = (w[chosen].transpose(-1, -2) for w in (w1, w3, w2))
    x_k = (x.repeat_interleave(k, 0) if rows is None else rows(x, k)).unsqueeze(1)
    return last((act(x_k @ m1, x_k @ m3) @ m2).view(-1, k, x.shape[-1]), gate)


def tiled(x, k):
    return x.expand(k, *x.shape).reshape(-1, x.shape[-1])


PLANTED = {  # one thing wrong, and what the report says of it
    "gate applied twice": (dict(last=lambda y, g: (y * g.unsqueeze(-1) * g.unsqueeze(-1)).sum(1)), "aten.mul"),
    "no gate": (dict(last=lambda y, g: y.sum(1)), "aten.mul"),
    "mean of the choices": (dict(last=lambda y, g: (y * g.unsqueeze(-1)).mean(1)), "aten.sum"),
    "gate not clamped": (dict(act=lambda g, u: F.silu(g) * u.clamp(-LIMIT, LIMIT)), "dsv4.swiglu"),
    "up not clamped": (dict(act=lambda g, u: F.silu(g.clamp(max=LIMIT)) * u), "dsv4.swiglu"),
    "limit with the wrong sign": (dict(act=lambda g, u: swiglu(g, u, low=LIMIT)), "dsv4.swiglu"),
    "another limit for up": (dict(act=lambda g, u: swiglu(g, u, low=-2 * LIMIT)), "dsv4.swiglu"),
    "tokens not next to their copies": (dict(rows=tiled), "each token repeated in a row"),
}


@pytest.mark.parametrize("name", ["nothing", *PLANTED])
def test_differences_do_not_fuse(rewritten, name):
    change, reason = PLANTED.get(name, ({}, ""))
    args = case(N=3, k=2, X=8, dtype=torch.float32)[:6]
    got, report = rewritten(lambda *a: few(*a, **change), *args)
    close(got, few(*args, **change), torch.float32)
    assert report.counts["moe"] == (name == "nothing")
    assert name == "nothing" or any("fuse.moe" in m.rule and reason in str(m) for m in report.misses), report


def ends_of_sorted(chosen, order, X):
    return torch.searchsorted(chosen[order], torch.arange(X), right=True)


def ends_of_counts(chosen, order, X, first=0):
    chosen = chosen + 1 if first else chosen
    return torch.bincount(chosen, minlength=X + 1)[first : first + X].cumsum(0)


def many(
    x,
    expert,
    gate,
    w1,
    w3,
    w2,
    token=lambda order, k: order // k,
    back=lambda order: order.argsort(),
    ends=ends_of_sorted,
):
    k, chosen = expert.shape[-1], expert.flatten()
    order = chosen.argsort(stable=True)
    ends = ends(chosen, order, w1.shape[0])
    x_k = x[token(order, k)]
    h = swiglu(grouped_mm(x_k, w1, ends), grouped_mm(x_k, w3, ends))
    return (grouped_mm(h, w2, ends)[back(order)].view(-1, k, x.shape[-1]) * gate.unsqueeze(-1)).sum(1)


PLANTED_IN_MANY = {
    "left in the order of experts": (dict(back=lambda order: order), "aten.sort"),
    "tokens by remainder": (dict(token=lambda order, k: order % (order.shape[0] // k)), "aten.div"),
    "tokens of half as many choices": (dict(token=lambda order, k: order // (2 * k)), "[7, 2]"),
}


def test_counts_of_experts_that_only_the_data_knows(rewritten):
    """As many as the largest that was chosen: experts are not found then, and right."""
    args = case(N=7, k=2, X=4, dtype=torch.float32)[:6]
    f = lambda *a: many(*a, ends=lambda chosen, order, X: torch.bincount(chosen, minlength=X).cumsum(0))  # noqa: E731
    got, report = rewritten(f, *args)
    close(got, f(*args), torch.float32)
    assert report.counts["moe"] == 0


@pytest.mark.parametrize("first", [0, 1])
def test_counts_of_a_length_that_depends_on_data(rewritten, first):
    """Those of the first numbers are the op's."""
    args = case(N=7, k=2, X=4, dtype=torch.float32)[:6]
    f = lambda *a: many(*a, ends=lambda *b: ends_of_counts(*b, first))  # noqa: E731
    got, report = rewritten(f, *args)
    close(got, f(*args), torch.float32)
    assert report.counts["moe"] == (not first)


@pytest.mark.parametrize("name", ["nothing", *PLANTED_IN_MANY])
def test_differences_among_many_do_not_fuse(rewritten, monkeypatch, name):
    monkeypatch.setattr(
        "dsv4_compile.reporting.report.NEAR", 0.0
    )  # tell of every miss, also of a mismatch near the anchor
    change, reason = PLANTED_IN_MANY.get(name, ({}, ""))
    args = case(N=7, k=2, X=4, dtype=torch.float32)[:6]
    got, report = rewritten(lambda *a: many(*a, **change), *args)
    close(got, many(*args, **change), torch.float32)
    assert report.counts["moe"] == (name == "nothing")
    assert name == "nothing" or any("fuse.moe" in m.rule and reason in str(m) for m in report.misses), report
