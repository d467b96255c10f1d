"""The router: the ops against the formula, ties, and the reference model's module, compiled, in all its kinds."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_compile.lowerings.router import expert_gates, router
from dsv4_compile.reference_model import DSV4Config
from dsv4_compile.reference_model.model import Router

SCALE, EPS = 1.5, 1e-3  # an eps large enough to be missed
RUNS = [router, router.meaning]
NAMES = ["cpu", "meaning"]


def formula(logits, bias, k, scale, eps):
    """Token by token: sort by falling biased score, then by index."""
    score = logits.double().exp().log1p().sqrt()
    experts, gates = [], []
    for row in score.tolist():
        order = sorted(range(len(row)), key=lambda e: (-(row[e] + bias[e].item()), e))[:k]
        total = sum(row[e] for e in order) + eps
        experts.append(order)
        gates.append([row[e] / total * scale for e in order])
    shape = len(logits), k
    return torch.tensor(experts, dtype=torch.int64).view(shape), torch.tensor(gates, dtype=torch.float64).view(shape)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("N", "X", "k"), [(1, 16, 4), (40, 10, 3), (3, 256, 6), (1, 1, 1), (50, 5, 5), (0, 8, 2)])
def test_meaning_and_cpu_say_what_the_formula_says(N, X, k):
    logits, bias = torch.randn(N, X, dtype=torch.float64) * 4, torch.randn(X, dtype=torch.float64)
    experts, gates = formula(logits, bias, k, SCALE, EPS)
    for run in RUNS:
        expert, gate = run(logits, bias, k, SCALE, EPS)
        assert torch.equal(expert, experts)
        torch.testing.assert_close(gate, gates)
    for run in (expert_gates, expert_gates.meaning):
        torch.testing.assert_close(run(logits, experts, SCALE, EPS), gates)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.data())
def test_ties_go_to_the_lower_expert(N, X, data):
    k, levels, seed = data.draw(st.integers(1, X)), data.draw(st.integers(1, 9)), data.draw(st.integers(0, 99))
    g = torch.Generator().manual_seed(seed)
    logits = torch.randint(levels, (N, X), generator=g).double()
    bias = torch.zeros(X, dtype=torch.float64)
    experts, gates = formula(logits, bias, k, SCALE, EPS)
    for run in RUNS:
        expert, gate = run(logits, bias, k, SCALE, EPS)
        assert torch.equal(expert, experts)
        torch.testing.assert_close(gate, gates)


@pytest.mark.parametrize("N", [1, 64])
@pytest.mark.parametrize("strange", [float("nan"), float("inf"), float("-inf")])
def test_strange_numbers_select_as_the_meaning_does(N, strange):
    logits = torch.randn(N, 8)
    logits[0, [2, 5]] = strange
    want = router.meaning(logits, torch.zeros(8), 3, SCALE, EPS)
    torch.testing.assert_close(router(logits, torch.zeros(8), 3, SCALE, EPS), want, equal_nan=True)


@pytest.mark.parametrize("run", RUNS, ids=NAMES)
def test_golden_numbers(run):
    logits, bias = torch.tensor([[0.3, -1, 2, 0.1]]), torch.tensor([0, 1.5, -1, 0.2])
    expert, gate = run(logits, bias, 2, 1.5, 1e-20)
    assert expert.tolist() == [[1, 3]]
    torch.testing.assert_close(gate, torch.tensor([[0.590199, 0.909802]]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("run", [expert_gates, expert_gates.meaning], ids=NAMES)
def test_golden_scores(run):
    """sqrt(softplus(x)); eps = 0 and a scale of their sum give them back."""
    logits = torch.tensor([[-20.0, -2, 0, 2, 20]])
    scores = torch.tensor([[4.54e-5, 0.3562696, 0.8325546, 1.4583992, 4.472136]])
    got = run(logits, torch.arange(5).view(1, 5), scores.sum().item(), 0.0)
    torch.testing.assert_close(got, scores, rtol=1e-4, atol=1e-7)


def test_a_table_may_name_an_expert_twice():
    logits, expert = torch.randn(3, 6, dtype=torch.float64), torch.tensor([[1, 1], [0, 5], [4, 4]])
    for run in (expert_gates, expert_gates.meaning):
        for table in (expert, expert.int()):
            gate = run(logits, table, SCALE, 0.0)
            torch.testing.assert_close(gate[[0, 2]], torch.full((2, 2), 0.75, dtype=torch.float64))


def test_half_precision_is_widened():
    logits, bias = torch.randn(5, 8).to(torch.bfloat16), torch.randn(8)
    experts, gates = formula(logits.float(), bias.double(), 3, SCALE, EPS)
    for run in RUNS:
        expert, gate = run(logits, bias, 3, SCALE, EPS)
        assert gate.dtype == torch.float32 and torch.equal(expert, experts)
        torch.testing.assert_close(gate.double(), gates, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("N", [1, 40])
@pytest.mark.parametrize("logits", ["random", "all equal"])
def test_outputs_are_contiguous(N, logits):
    x = torch.randn(N, 8) if logits == "random" else torch.zeros(N, 8)
    expert, gate = router(x, torch.zeros(8), 3, SCALE, EPS)
    assert expert.is_contiguous() and gate.is_contiguous()
    assert expert_gates(x, expert.t().contiguous().t(), SCALE, EPS).is_contiguous()


@pytest.mark.parametrize("N", [1, 20])
def test_opcheck(N):
    logits = torch.randn(N, 8)
    torch.library.opcheck(router.target, (logits, torch.randn(8), 3, SCALE, EPS))
    torch.library.opcheck(expert_gates.target, (logits, torch.randint(8, (N, 3)), SCALE, EPS))


def test_cost():
    assert router.symbolic_cost().at(N=1, X=256, k=6).read == 4 * 512
    assert expert_gates.symbolic_cost().at(N=10, X=256, k=6).write == 240


# -- raising


class Routed(torch.nn.Module):
    """The reference model's router and a reader of each of its outputs."""

    def __init__(self, kind, dtype, **changed):
        super().__init__()
        self.config = replace(DSV4Config.tiny(), **changed)
        self.router = Router(self.config, kind)
        if kind == "moe":
            self.router.bias.data.normal_()
        self.to(dtype).requires_grad_(False)

    def forward(self, x, token, pick=None):
        expert, gate = self.router(x, token, pick)
        return expert.flatten(), gate.unsqueeze(-1) * 2, expert.clone()


@pytest.mark.parametrize(
    ("kind", "replay", "dtype", "N"),
    [
        ("moe", False, torch.bfloat16, 1),
        ("moe", False, torch.float32, 20),
        ("moe", False, torch.float64, 1),
        ("moe", True, torch.bfloat16, 3),
        ("hash_moe", False, torch.bfloat16, 1),
        ("hash_moe", False, torch.float64, 20),
        ("hash_moe", True, torch.float32, 1),
    ],
)
def test_the_model_raises(rewritten, kind, replay, dtype, N):
    model = Routed(kind, dtype)
    config = model.config
    args = [torch.randn(N, config.hidden_size).to(dtype), torch.randint(config.vocab_size, (N,))]
    if replay:
        args.append(torch.randint(config.n_routed_experts, (N, config.num_experts_per_tok)))
    result, report = rewritten(model, *args)
    assert report.counts["router"] == 1
    assert report.runs == {("router" if kind == "moe" and not replay else "expert_gates", "cpu"): 1}
    torch.testing.assert_close(result, model(*args))


def test_a_symbolic_number_of_tokens_stays_symbolic(rewritten):
    model = Routed("moe", torch.bfloat16)
    args = torch.randn(7, model.config.hidden_size).to(torch.bfloat16), torch.zeros(7, dtype=torch.int64)
    for a in args:
        torch._dynamo.mark_dynamic(a, 0)  # an error if a rule made the number a constant
    result, report = rewritten(model, *args)
    assert report.runs == {("router", "cpu"): 1}
    torch.testing.assert_close(result, model(*args))


@pytest.mark.parametrize("lowerings", ["cpu", "none"])
def test_other_spellings_raise(rewritten, lowerings):
    def spelled(x, weight, bias, table):
        logits = x @ weight.t()
        score = torch.log1p(logits.float().exp())
        score = torch.where(logits.float() > 20, logits.float(), score).sqrt()
        best = torch.topk(bias + score, 3, dim=1, sorted=False)[1]
        gate = torch.gather(score, 1, best)
        gate = SCALE * (gate / (EPS + torch.sum(gate, dim=1, keepdim=True)))
        hashed = F.softplus(logits * 2).float().sqrt().gather(1, table.long())
        return best, gate.to(x.dtype), hashed / (hashed.sum(1, True) + EPS) * SCALE

    args = torch.randn(4, 16), torch.randn(9, 16), torch.randn(9), torch.randint(9, (4, 2), dtype=torch.int32)
    result, report = rewritten(spelled, *args, lowerings=lowerings)
    assert report.counts["router"] == 2
    expert, gate, hashed = spelled(*args)
    place = expert.sort().indices  # unsorted topk may give any order
    order = result[0].sort().indices
    assert torch.equal(result[0].gather(1, order), expert.gather(1, place))
    torch.testing.assert_close(result[1].gather(1, order), gate.gather(1, place))
    torch.testing.assert_close(result[2], hashed)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_other_scores_are_no_sites(rewritten, scoring):
    model = Routed("moe", torch.float32, scoring_func=scoring)
    args = torch.randn(4, model.config.hidden_size), torch.zeros(4, dtype=torch.int64)
    result, report = rewritten(model, *args, strict=False)
    assert report.counts["router"] == 0
    torch.testing.assert_close(result, model(*args))


def test_uniform_gates_are_no_site(rewritten):
    model = Routed("hash_moe", torch.float32, hash_gate="uniform")
    args = torch.randn(4, model.config.hidden_size), torch.arange(4)
    result, report = rewritten(model, *args)
    assert report.counts["router"] == 0
    torch.testing.assert_close(result, model(*args))


def shares(score, expert, biased):
    gate = score.gather(-1, expert)
    return gate / (gate.sum(-1, keepdim=True) + EPS) * SCALE


WRONG = {
    "no eps": (lambda s, e, b: (g := s.gather(-1, e)) / g.sum(-1, keepdim=True) * SCALE, "a use by aten.add"),
    "biased scores": (lambda s, e, b: shares(b, e, b), "a use by aten.gather"),
    "sum of all scores": (
        lambda s, e, b: s.gather(-1, e) / (s.sum(-1, keepdim=True) + EPS) * SCALE,
        "a use by aten.sum",
    ),
    "sum over tokens": (
        lambda s, e, b: (g := s.gather(-1, e)) / (g.sum(0, keepdim=True) + EPS) * SCALE,
        "dim -1",
    ),
    "the worst": (lambda s, e, b: shares(s, b.topk(3, -1, largest=False).indices, b), "a use by aten.gather"),
    "no scale": (lambda s, e, b: (g := s.gather(-1, e)) / (g.sum(-1, keepdim=True) + EPS), "a use by aten.mul"),
}


def test_what_is_not_the_router_stays_and_says_why(rewritten):
    def all_of_them(bias, *logits):
        out = []
        for (f, _), x in zip(WRONG.values(), logits, strict=True):
            score = F.softplus(x).sqrt()
            biased = score + bias
            expert = biased.topk(3, -1).indices
            out.append((expert, f(score, expert, biased)))
        return out

    args = torch.randn(8), *torch.randn(len(WRONG), 5, 8).unbind()
    result, report = rewritten(all_of_them, *args)
    assert report.counts["router"] == 0
    torch.testing.assert_close(result, all_of_them(*args))
    said = {m.expected for m in report.misses if m.rule == "fuse.router/learned" and not m.rough}
    assert said == {reason for _, reason in WRONG.values()}


# On a GPU


def few_values(N: int, X: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and biases of few values: many ties, and no two sums that only rounding tells apart."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-9, 10, (N, X), generator=g) / 2, torch.randint(0, 3, (X,), generator=g) / 7


@pytest.mark.gpu
@pytest.mark.parametrize(("X", "k"), [(256, 6), (384, 6), (24, 4), (7, 7), (33, 1), (1000, 32)])
@pytest.mark.parametrize("N", [0, 1, 2, 3, 5, 64, 1001])
def test_the_kernel_is_the_meaning(N, X, k, kernel_parity):
    numbers = k, 1.5, 1e-20
    args, others = (*few_values(N, X), *numbers), (*few_values(N, X, seed=1), *numbers)
    kernel_parity(router, *args, others=others, rtol=1e-6, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.parametrize(("X", "k"), [(256, 6), (24, 4), (7, 7), (2000, 32)])
@pytest.mark.parametrize("N", [0, 1, 3, 64])
def test_the_kernel_of_chosen_experts_is_the_meaning(N, X, k, kernel_parity):
    def given(seed):
        logits, _ = few_values(N, X, seed=seed)
        return logits, torch.randint(X, (N, k), generator=torch.Generator().manual_seed(seed)), 1.5, 1e-20

    kernel_parity(expert_gates, *given(0), others=given(1), rtol=1e-6, atol=1e-7)


@pytest.mark.gpu
def test_an_expert_that_there_is_not_has_no_gate():
    logits = torch.randn(2, 24, device="cuda")
    gates = expert_gates(logits, torch.tensor([[3, 24], [-1, 0]], device="cuda"), 1.5, 1e-20)
    assert gates.isnan().all()


@pytest.mark.gpu
def test_the_kernel_writes_its_outputs_alone():
    from dsv4_compile.kernels.router import launch

    N, X, k = 5, 24, 4
    logits, bias = (t.cuda() for t in few_values(N, X))
    experts = torch.full((N + 2, k), -7, device="cuda")
    gates = torch.full((N + 2, k), float("nan"), device="cuda")
    launch(logits, bias, experts[1:-1], gates[1:-1], 1.5, 0.0)
    assert (experts[[0, -1]] == -7).all() and gates[[0, -1]].isnan().all()
    assert (experts[1:-1] >= 0).all() and gates[1:-1].isfinite().all()
