"""Ops: declared by their meaning, claimed by implementations, sound for torch."""

import pytest
import sympy
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dsv4_compile.errors import BadOp
from dsv4_compile.lowerings import OPS
from dsv4_compile.op import Cost, op, runs_on


@op("dsv4::t_split", outputs=("low", "high"))
def t_split(x: Tensor, bias: Tensor | None, at: int, gain: float = 1.0, swap: bool = False) -> tuple[Tensor, Tensor]:
    """x * gain + bias, cut in two columns blocks at `at`."""
    y = x * gain if bias is None else x * gain + bias
    parts = y[:, :at], y[:, at:]
    return parts[::-1] if swap else parts


@op("dsv4::t_first")
def t_first(x: Tensor) -> Tensor:
    """The first row."""
    return x[0]


@op("dsv4::t_claimed")
def t_claimed(x: Tensor, k: int) -> Tensor:
    """x + k."""
    return x + k


@t_claimed.on("cuda", arch="sm_90")
def _(x, k):
    raise AssertionError("not here")


@t_claimed.on("cpu", when=lambda a: a.k <= 4 or "k > 4: too many")
def _(x, k):
    return x + k + 100


@t_claimed.on("cpu", when=lambda a: a.x.dim() == 2 or "x must be a matrix")
def _(x, k):
    return x + k + 200


@t_claimed.cost
def _(N, D):
    return Cost(flops=N * D, read=4 * N * D, write=4 * N * D)


def test_schema_from_annotations():
    assert str(t_split.target._schema) == (
        "dsv4::t_split(Tensor x, Tensor? bias, SymInt at, float gain, bool swap) -> (Tensor, Tensor)"
    )
    assert torch.Tag.pt2_compliant_tag in t_split.target.tags


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("bias", [None, torch.ones(7)])
def test_opcheck(bias, swap):
    x = torch.randn(7, 5).t()  # not contiguous
    verdict = torch.library.opcheck(t_split.target, (x, bias, 3, 0.5, swap))
    assert set(verdict.values()) == {"SUCCESS"}


def test_outputs_are_contiguous_and_own_their_storage():
    x = torch.randn(4, 6)
    low, high = t_split(x, None, 2, 1.0, False)
    assert low.is_contiguous() and high.is_contiguous()
    first = t_first(x)
    first.zero_()
    assert x[0].abs().sum() > 0
    torch.testing.assert_close(low, x[:, :2])


def test_the_fake_has_the_layout_of_the_op():
    with FakeTensorMode():
        low, high = t_split(torch.empty(4, 6, dtype=torch.bfloat16), None, 2, 1.0, False)
    assert (low.shape, high.shape, low.dtype, low.stride()) == ((4, 2), (4, 4), torch.bfloat16, (2, 1))


def test_the_first_that_accepts_claims_and_the_others_say_why():
    matrix, cube = torch.zeros(2, 2), torch.zeros(1, 2, 2)
    claim = lambda x, k: t_claimed.claim({"x": x, "k": k})  # noqa: E731
    assert claim(matrix, 4)[0] is t_claimed.implementations[1]
    implementation, reasons = claim(matrix, 5)
    assert implementation is t_claimed.implementations[2]
    assert reasons == ["cuda sm_90: runs on cuda, not on cpu", "cpu: k > 4: too many"]
    implementation, reasons = claim(cube, 5)
    assert implementation is None and reasons[-1] == "cpu: x must be a matrix"
    assert t_claimed.claim({"x": matrix, "k": 1}, among=("cuda",))[0] is None


def test_an_eager_call_runs_whoever_claims_else_the_meaning():
    assert t_claimed(torch.zeros(2, 2), 4)[0, 0] == 104
    assert t_claimed(torch.zeros(2, 2), 5)[0, 0] == 205
    assert t_claimed(torch.zeros(1, 2, 2), 5)[0, 0, 0] == 5


@pytest.mark.parametrize(
    ("arch", "capability", "runs"),
    [("sm_90", (9, 0), True), ("sm_90", (10, 0), False), ("sm_80+", (9, 0), True), ("sm_100+", (9, 0), False)],
)
def test_architectures(arch, capability, runs):
    assert runs_on(arch, capability) is runs


def test_cost_is_an_expression():
    N, D = sympy.symbols("N D")
    assert t_claimed.symbolic_cost().read == 4 * N * D
    assert t_claimed.symbolic_cost().at(N=2, D=3) == Cost(6, 24, 24)
    with pytest.raises(BadOp, match="t_first declares no cost"):
        t_first.symbolic_cost()


def test_what_may_not_be_declared():
    def named(x: Tensor, layer: str) -> Tensor:
        return x

    def two(x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x

    with pytest.raises(BadOp, match="parameter 'layer' must be Tensor"):
        op("dsv4::t_named")(named)
    with pytest.raises(BadOp, match="names the outputs"):
        op("dsv4::t_two")(two)
    with pytest.raises(BadOp, match="must read dsv4::<name>"):
        op("other::x")
    with pytest.raises(BadOp, match="devices are cuda, cpu"):
        t_first.on("tpu")


def test_arguments_by_name_with_defaults():
    x = torch.zeros(1, 1)
    assert t_split.arguments(x, None, at=1) == {"x": x, "bias": None, "at": 1, "gain": 1.0, "swap": False}


@pytest.mark.parametrize("each", OPS, ids=lambda o: o.name)
def test_every_op_says_what_it_means(each):
    assert each.meaning.__doc__ and each.name.isidentifier()
    assert not {str(a.type) for a in each.target._schema.arguments} - {
        "Tensor",
        "Optional[Tensor]",
        "SymInt",
        "int",
        "float",
        "bool",
    }
