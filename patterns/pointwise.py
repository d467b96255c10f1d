"""Softmax, SiLU, softplus and the clamped SwiGLU, as the decompositions leave them."""

import torch
import torch.nn.functional as F

from dsv4_compile.lowerings.pointwise import silu, softmax, softplus, swiglu
from dsv4_compile.match import Match, Scalar, T, rule


def along(dim: int):
    """A check that gives the op the axis that the pattern reduces."""

    def check(match: Match) -> bool:
        match.arguments["dim"] = dim
        return True

    return check


@rule(softmax, name="raise.softmax", anchor="amax", example={"x": T(5, 7)}, check=along(-1), any_rank=True)
def last_axis(x):
    return torch.softmax(x, -1)


@rule(softmax, name="raise.softmax", anchor="amax", example={"x": T(3, 5, 7)}, check=along(-2), any_rank=True)
def second_last_axis(x):
    return torch.softmax(x, -2)


@rule(silu, name="raise.silu", anchor="neg", example={"x": T(5)}, any_rank=True)
def decomposed(x):
    return F.silu(x)


@rule(silu, name="raise.silu", anchor="sigmoid", example={"x": T(5)}, any_rank=True)
def gated(x):
    return x * torch.sigmoid(x)


@rule(softplus, name="raise.softplus", anchor="log1p", example={"x": T(5)}, any_rank=True)
def thresholded(x):
    return F.softplus(x)


@rule(swiglu, name="raise.swiglu", anchor=silu, example={"gate": T(5), "up": T(5)}, any_rank=True)
def clamped(gate, up, limit: Scalar):
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
