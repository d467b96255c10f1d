"""The router: chosen by biased score, or chosen elsewhere and weighed here."""

import torch
import torch.nn.functional as F

from dsv4_compile.lowerings.router import expert_gates, router
from dsv4_compile.match import Int, Scalar, T, rule


def shares(score, expert, scale, eps):
    gate = score.gather(-1, expert)
    return gate / (gate.sum(-1, keepdim=True) + eps) * scale


@rule(router, name="fuse.router", anchor="topk", example={"logits": T(5, 11), "bias": T(11), "k": 3})
def learned(logits, bias, k: Int, scale: Scalar, eps: Scalar):
    score = F.softplus(logits).sqrt()
    expert = (score + bias).topk(k, -1).indices
    return expert, shares(score, expert, scale, eps)


@rule(
    expert_gates,
    name="fuse.router",
    anchor="gather",
    example={"logits": T(5, 11), "expert": T(5, 3, dtype=torch.int64)},
)
def chosen(logits, expert, scale: Scalar, eps: Scalar):
    return shares(F.softplus(logits).sqrt(), expert, scale, eps)
