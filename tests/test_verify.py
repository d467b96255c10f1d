"""verify and shadow on small functions: what they let pass, what they refuse, and what they say; the numerics contract."""

import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv4_compile.accuracy.shadow import shadow
from dsv4_compile.accuracy.verify import difference
from dsv4_compile.config import Config
from dsv4_compile.errors import DSV4Warning
from dsv4_compile.identity import identity
from dsv4_compile.lowerings import CONTRACTS, OPS, TOLERANCE, Contract, numerics
from dsv4_compile.match import Scalar, T, rule
from dsv4_compile.op import acc, op
from dsv4_compile.patterns import RULES, norm


@op("dsv4::v_scaled")
def v_scaled(x: Tensor, by: float) -> Tensor:
    """by tanh(x) in at least fp32, of x's dtype."""
    return (acc(x).tanh() * by).to(x.dtype)


@v_scaled.on("cpu")
def _(x, by):
    return (acc(x).tanh() * by).to(x.dtype).contiguous()


def emits(implementation, name="raise.v_scaled", factor=1.0):
    """A rule for by * tanh(x) whose op runs `implementation` on the CPU, and which gets `by` wrong by `factor`."""
    number = len(MADE)

    def meaning(x: Tensor, by: float) -> Tensor:
        return v_scaled.meaning(x, by)

    made = op(f"dsv4::v_scaled_{number}")(meaning)
    made.on("cpu")(implementation)
    MADE.append(made)

    def check(match):
        match.arguments["by"] *= factor
        return True

    @rule(made, name=name, anchor="tanh", example={"x": T(5, 7)}, check=check)
    def scaled(x, by: Scalar):
        return x.tanh() * by

    return scaled


MADE: list = []


def right(x, by):
    return v_scaled.meaning(x, by).contiguous()


def f(x):
    return F.silu(x.tanh() * 3.0)


def test_a_right_rewrite_stays_and_is_listed(rewritten_by):
    scaled = emits(right)
    _, report = rewritten_by([scaled], f, torch.randn(3, 8), verify=True)
    (check,) = report.checks
    assert check.checked and not check.failed and check.error < check.allowed and report.mismatches == []
    assert check.layer == "root" and "test_verify.py" in check.where and check.site == report.graphs[0].sites[0].id
    assert "verify: 1 rewrites tried, 0 left out" in str(report)


WRONG = {
    "a factor": (
        emits(right, factor=1.01),
        r"in float32 it is off by 1\.0e-02 of the largest number, 2\.0e-05 are allowed",
    ),
    "a small factor, seen in fp64": (emits(right, factor=1 + 1e-6), r"in float64 it is off by 1\.0e-06"),
    "another formula": (emits(lambda x, by: x.atan() * by), r"in float32 it is off by"),
    "not a number": (emits(lambda x, by: x.log() * by), r"in float32 it is off by inf"),
    "another dtype": (
        emits(lambda x, by: right(x, by).double()),
        r"it returns torch.float64 .*, its meaning torch.float32",
    ),
    "strides": (emits(lambda x, by: right(x, by).mT.contiguous().mT), r"it returns strides \(1, 3\)"),
    "an error": (emits(lambda x, by: right(x[:, 9:], by).view(3, 8)), r"in float32 it raises RuntimeError"),
    "it writes to its input": (emits(lambda x, by: x.tanh_() * by), r"in float32 it is off by"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_rewrite_is_left_out_with_a_warning(rewritten_by, wrong):
    scaled, reason = WRONG[wrong]
    x = torch.randn(3, 8)
    with pytest.warns(DSV4Warning, match=reason) as caught:
        result, report = rewritten_by([scaled], f, x, verify=True, strict=False)
    torch.testing.assert_close(result, f(x))
    (message,) = [str(w.message) for w in caught if w.category is DSV4Warning]
    assert (
        "raise.v_scaled/scaled" in message and "test_verify.py" in message and "'disable': 'raise.v_scaled'" in message
    )
    assert report.rules["raise.v_scaled"] == 0 and len(report.mismatches) == 1
    assert "1 left out as wrong" in str(report)


def test_strict_makes_it_an_error(rewritten_by):
    scaled, _ = WRONG["a factor"]
    with pytest.raises(Exception, match=r"WrongRewrite: rule raise\.v_scaled/scaled .* Leave it out with options="):
        rewritten_by([scaled], f, torch.randn(3, 8), verify=True, strict=True)


def test_without_the_option_nothing_is_tried(rewritten_by):
    scaled, _ = WRONG["a factor"]
    _, report = rewritten_by([scaled], f, torch.randn(3, 8))
    assert report.checks == [] and report.rules["raise.v_scaled"] == 1


def test_half_precision_is_tried_in_all_three(rewritten_by):
    x = torch.randn(3, 8, dtype=torch.bfloat16)
    _, report = rewritten_by([emits(right)], f, x, verify=True)
    assert not report.checks[0].failed
    rounds = emits(lambda x, by: (x.tanh() * 3.0).to(x.dtype))  # right in bf16, and 3 in place of `by`
    _, report = rewritten_by([rounds], f, x, verify=True)
    assert not report.checks[0].failed
    off = emits(right, factor=1.001)  # lost in bf16's rounding
    with pytest.warns(DSV4Warning, match=r"in float32 it is off by 1\.0e-03"):
        rewritten_by([off], f, x, verify=True, strict=False)


class Layer(nn.Module):
    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return x + x.tanh() * 3.0


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_body_is_tried_once_and_equal_layers_too(rewritten_by):
    calls = []

    def counted(x, by):
        calls.append(1)
        return right(x, by)

    x = torch.randn(3, 8)
    _, report = rewritten_by([emits(counted)], Stack(), x, verify=True)
    assert len(report.checks) == 1 and report.rules["raise.v_scaled"] == 3
    calls.clear()
    _, report = rewritten_by([emits(counted)], Stack(), x, verify=True, regions=False)
    assert [c.layer for c in report.checks] == [f"layers.{i}" for i in range(3)]
    assert len(calls) == 2 + 3  # once in fp32 and once in fp64 for all three, and one run of the model


def test_symbolic_sizes_are_tried_as_they_were_captured(rewritten_by):
    x = torch.randn(6, 8)
    torch._dynamo.mark_dynamic(x, 0)
    _, report = rewritten_by(
        [emits(right), norm.weighted], lambda x: F.rms_norm(f(x), (8,), torch.ones(8)), x, verify=True
    )
    assert len(report.checks) == 2 and all(c.checked and not c.failed for c in report.checks)


def test_a_precision_that_torch_lacks_is_passed_over(rewritten):
    x, w = torch.randn(24, 16).bfloat16(), torch.randn(3, 8, 16).bfloat16()
    ends = torch.tensor([5, 5, 24], dtype=torch.int32)  # aten._grouped_mm knows no fp64
    _, report = rewritten(lambda x, w: F.grouped_mm(x, w.transpose(-1, -2), offs=ends), x, w, verify=True)
    (check,) = report.checks
    assert check.op == "grouped_mm" and check.checked and not check.failed


def test_inputs_that_do_not_fit_are_left_alone(rewritten_by, monkeypatch):
    monkeypatch.setattr("dsv4_compile.accuracy.verify.LIMIT", 8)
    _, report = rewritten_by([emits(right)], f, torch.randn(3, 8), verify=True)
    (check,) = report.checks
    assert not check.checked and not check.failed and report.rules["raise.v_scaled"] == 1
    assert "not tried, its inputs take" in str(report)


def test_difference():
    nan, inf = float("nan"), float("inf")
    a = torch.tensor([1.0, 2.0, -4.0])
    assert difference(a, a) == 0 and difference(a + 1, a) == 0.25
    assert difference(torch.tensor([nan, 1.0]), torch.tensor([nan, 1.0])) == 0
    assert difference(torch.tensor([inf, 1.0]), torch.tensor([inf, 1.0])) == 0
    assert difference(torch.tensor([nan, 1.0]), torch.tensor([0.0, 1.0])) == inf
    assert difference(torch.tensor([inf, 1.0]), torch.tensor([-inf, 1.0])) == inf
    assert difference(a[:2], a) == inf
    assert difference(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 4, 3])) == 0.5


# Shadow


def test_shadow_tries_every_rewrite_on_what_it_meets():
    scaled, _ = WRONG["a factor"]
    x = torch.randn(3, 8)
    found = shadow(Stack(), x, rules=[scaled], ops=[scaled.op])
    assert [c.layer for c in found.checks] == [f"layers.{i}" for i in range(3)] and len(found.failed) == 3
    assert found.table() == {f"layers.{i}": {"raise.v_scaled/scaled": pytest.approx(0.01, rel=1e-3)} for i in range(3)}
    assert found.error > 0.01 and "layers.1" in str(found) and "3 of 3 above tolerance" in str(found)


def test_shadow_of_a_right_model_and_its_state():
    def write(x, seen):
        seen.add_(F.softmax(x, -1))
        return F.rms_norm(seen, (8,), torch.ones(8))

    seen = torch.zeros(3, 8)
    found = shadow(write, torch.randn(3, 8), seen)
    assert {c.rule for c in found.checks} == {"raise.softmax/last_axis", "raise.rms_norm/weighted"}
    assert found.failed == [] and found.error < 1e-5 and not seen.any()


# The contract


def test_every_op_has_a_contract():
    assert {o.name for o in OPS} <= CONTRACTS.keys(), "say in lowerings/numerics.py what the new op promises"
    parameters = {o.name: set(o.signature.parameters) for o in OPS}
    for name in parameters:
        contract = CONTRACTS[name]
        used = {word for text in contract.outputs for word in re.findall(r"[a-z]\w*", text)}
        used -= {"acc", "if", "int64", "float32", "uint8"}
        assert used | contract.draws.keys() | contract.ties_draws.keys() <= parameters[name], name
        assert len(contract.outputs) == len(next(o for o in OPS if o.name == name).outputs)


WEIGHTS = {"w1", "w2", "w3"}  # not their scales
EXTRA = {
    "dim": -1,
    "sink_on_window": False,
    "entries": None,
    "index": None,
    "inverse": False,
    "weight": None,
    "exact": False,
    "e_scale": None,
    "h_scale": None,
    "rope": 6,
    "width": 36,
}


def arguments(pattern, dtype):
    """Inputs of the sizes in a rule's example, drawn as its op's contract says."""
    contract, g = CONTRACTS[pattern.op.name], torch.Generator().manual_seed(0)
    spelling = pattern.spellings[-1]
    tensors = {n: e for n, e in spelling.example.items() if (isinstance(e, T) and not n[1:].isdigit()) or n in WEIGHTS}
    given = {n: e for n, e in spelling.example.items() if isinstance(e, int)} | dict.fromkeys(spelling.scalars, 1e-3)
    sizes = {n: t.shape for n, t in tensors.items()} | {n: (EXTRA[n],) for n in ("rope", "width")}
    for name, e in tensors.items():
        x = contract.draws.get(name, numerics.Normal()).draw(e.shape, g, sizes)
        given[name] = x.to(dtype if e.dtype == torch.float32 else e.dtype)
    wanted = pattern.op.signature.parameters
    return pattern.op.arguments(
        **{n: v for n, v in (EXTRA | {"overlap": "overlap" in pattern.label} | given).items() if n in wanted}
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_declared_dtypes_are_true(dtype):
    tried = set()
    for pattern in RULES:
        wanted = set(pattern.op.signature.parameters)
        told = {n for s in pattern.spellings[-1:] for n in s.example}
        if pattern.op.name in tried or not told or not told <= wanted | {"k", "block", "top", "last"}:
            continue
        if pattern.op.name == "dequantize" and dtype != torch.float32:
            continue
        given = arguments(pattern, dtype)
        try:
            got = pattern.op.meaning(**given)
        except RuntimeError:  # an example in the layout of some model, not in the op's
            continue
        got = got if isinstance(got, tuple) else (got,)
        assert tuple(x.dtype for x in got) == CONTRACTS[pattern.op.name].output_dtypes(given), pattern.qualified
        tried.add(pattern.op.name)
    found_by_hand = {
        "dequantize",
        "sinkhorn",
        "linear",
        "grouped_linear",
        "linear_wide",
        "dense_attention",
        "output_projection",
        "shared_expert",
        "experts",
        *(o.name for o in OPS if "linears" in o.name or "prologue" in o.name),
    }
    assert tried >= {o.name for o in OPS} - found_by_hand


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_declared_dtypes_of_layers_that_share_vectors_are_true(dtype):
    x, w, norm = torch.randn(3, 8, dtype=dtype), torch.randn(5, 8, dtype=dtype), torch.ones(8)
    wide = torch.promote_types(dtype, torch.float32)
    for each in (o for o in OPS if "linears" in o.name or o.name == "shared_expert"):
        if each.name == "shared_expert":
            given = each.arguments(x, x, w, torch.randn(3, 5, dtype=wide), 1.0)
        else:
            in_front = (norm, 1e-6) if each.name.startswith("normed") else ()
            given = each.arguments(x, *in_front, *[w] * int(each.name.split("_")[-1]), 1)
        got = each.meaning(**given)
        got = got if isinstance(got, tuple) else (got,)
        assert tuple(y.dtype for y in got) == CONTRACTS[each.name].output_dtypes(given), each.name


def test_the_contract_is_part_of_the_identity(monkeypatch):
    before = identity(Config())
    monkeypatch.setitem(CONTRACTS, "softmax", Contract(("x",), tolerance={torch.float32: 1e-3}))
    assert identity(Config()) != before
    monkeypatch.undo()
    assert identity(Config()) == before and set(TOLERANCE) == set(numerics.PLAIN)


def test_the_option_reaches_the_passes(monkeypatch):
    monkeypatch.setenv("DSV4_VERIFY", "1")
    from dsv4_compile import explain

    with warnings.catch_warnings():
        warnings.simplefilter("error", DSV4Warning)
        report = explain(lambda x: F.softmax(x, -1), torch.randn(3, 8))
    assert len(report.checks) == 1 and not report.mismatches
