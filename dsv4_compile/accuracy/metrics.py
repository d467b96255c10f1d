"""How far a compiled model's output is from eager's: one number, larger being worse."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import UnknownName

Metric = Callable[[Any, Any], float]


def logits_of(output: Any) -> Tensor:
    """The first float tensor of an output."""
    return next(x for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.dtype.is_floating_point)


def logits(got: Any, want: Any) -> float:
    """Largest absolute difference."""
    return float((logits_of(got).double() - logits_of(want).double()).abs().max())


def kl(got: Any, want: Any) -> float:
    """Mean Kullback-Leibler divergence from eager's distribution over the last axis, nats."""
    p, q = (logits_of(x).double().log_softmax(-1) for x in (want, got))
    return float((p.exp() * (p - q)).sum(-1).mean())


def tokens(got: Any, want: Any) -> float:
    """Share of positions whose greedy token differs."""
    a, b = (logits_of(x).argmax(-1) for x in (got, want))
    return float((a != b).double().mean()) if not bool(logits_of(got).isnan().any()) else math.inf


def bits(ids: Tensor) -> Metric:
    """Change of the bits a token that the prompt `ids` [B, T] takes; a byte, where tokens are bytes."""

    def taken(output: Any) -> float:
        x = logits_of(output)[:, :-1].double()
        return float(F.cross_entropy(x.flatten(0, 1), ids[:, 1:].flatten())) / math.log(2)

    return lambda got, want: abs(taken(got) - taken(want))


NAMED: dict[str, Metric] = {"logits": logits, "kl": kl, "tokens": tokens}
NAMES = (*NAMED, "bits")


def chosen(metric: str | Metric, args: Sequence[Any]) -> tuple[str, Metric]:
    """A metric and its name. Raises UnknownName."""
    if callable(metric):
        return getattr(metric, "__name__", "metric"), metric
    if metric not in NAMES:
        raise UnknownName("metric", metric, NAMES)
    return metric, NAMED[metric] if metric in NAMED else bits(args[0])


def default(name: str, want: Any) -> float:
    """What rounding does not reach: 1/1000 of the largest logit in fp32; KL divergence goes with its square."""
    x = logits_of(want)
    relative = 1e-3 if x.dtype in (torch.float32, torch.float64) else 5e-2
    return {"logits": relative * float(x.abs().max()), "kl": relative**2, "bits": relative}.get(name, 0.0)


def finite(value: float) -> float:
    """NaN is as bad as can be."""
    return math.inf if math.isnan(value) else float(value)
