"""The router: which experts a token goes to, and with what weight."""

from itertools import pairwise

import torch
import torch.nn.functional as F

from dsv4_compile.op import Cost, Tensor, acc, at_least, compact, known, left_to_inductor, op

FEW = 16  # tokens; up to here a look in Python for ties is cheaper than three calls


def affinity(logits: Tensor) -> Tensor:
    """sqrt(softplus(logits)), in at least fp32."""
    return F.softplus(acc(logits)).sqrt()


def shares(score: Tensor, expert: Tensor, scale: float, eps: float) -> Tensor:
    """The chosen scores over their sum plus eps, times scale: score [N, X], expert [N, k] -> [N, k]."""
    gate = score.gather(-1, expert)
    return gate / (gate.sum(-1, keepdim=True) + eps) * scale


@op("dsv4::router", outputs=("expert", "gate"))
def router(logits: Tensor, bias: Tensor, k: int, scale: float, eps: float) -> tuple[Tensor, Tensor]:
    """The k experts with the best biased scores, and gates from the scores without bias.

    logits [N, X], bias [X] -> expert [N, k] int64, in descending order of biased score, ties to the lower index;
    gate [N, k] in at least fp32, in that order.  Source: DeepSeek-V4, router.
    """
    score = affinity(logits)
    expert = (score + bias).sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return expert, shares(score, expert, scale, eps)


@router.cost
def _(N, X, k):
    return Cost(flops=N * (6 * X + 3 * k), read=4 * N * X + 4 * X, write=12 * N * k)


@router.sizes
def _(a):
    N, X = a.logits.shape
    return dict(N=N, X=X)


@router.on("cpu", worth=at_least(512, rows=lambda a: a.logits.shape[0]))
def _(logits, bias, k, scale, eps):
    score = F.softplus(acc(logits)).sqrt_()
    expert = _best(score + bias, k)
    return expert, _normalised(score.gather(-1, expert), scale, eps)


CHOICES = 32  # the most that kernels take


def fits_a_block(a) -> bool | str:
    if a.logits.dtype != torch.float32 or a.bias.dtype != torch.float32:
        return "logits and bias must be float32"
    X = a.logits.shape[1]
    if not known(X <= 1024):
        return f"{X} experts: a block has a thread for each of at most 1024"
    return known(a.k <= min(CHOICES, X)) or f"k = {a.k}: a warp keeps at most {CHOICES} choices, of {X} experts"


@router.on("cuda", arch="sm_90+", when=fits_a_block)
def _(logits, bias, k, scale, eps):
    from dsv4_compile.kernels.router import launch

    expert = torch.empty(logits.shape[0], k, dtype=torch.int64, device=logits.device)
    gate = torch.empty(logits.shape[0], k, dtype=torch.float32, device=logits.device)
    if len(logits):
        launch(compact(logits), compact(bias), expert, gate, scale, eps)
    return expert, gate


@op("dsv4::expert_gates")
def expert_gates(logits: Tensor, expert: Tensor, scale: float, eps: float) -> Tensor:
    """Gates of experts that are already chosen, by a table of token ids or by an earlier run.

    logits [N, X], expert [N, k] integers (repeats allowed) -> [N, k] in at least fp32.  Source: DeepSeek-V4, router.
    """
    return shares(affinity(logits), expert.long(), scale, eps)


@expert_gates.cost
def _(N, X, k):
    return Cost(flops=8 * N * k, read=12 * N * k, write=4 * N * k)


@expert_gates.sizes
def _(a):
    N, X = a.logits.shape
    return dict(N=N, X=X, k=a.expert.shape[-1])


def fits_a_warp(a) -> bool | str:
    if a.logits.dtype != torch.float32:
        return "logits must be float32"
    return known(a.expert.shape[-1] <= CHOICES) or f"more than {CHOICES} choices, which a warp keeps"


@expert_gates.on("cuda", arch="sm_90+", when=fits_a_warp)
def _(logits, expert, scale, eps):
    from dsv4_compile.kernels.router import launch

    gate = torch.empty(expert.shape, dtype=torch.float32, device=logits.device)
    if gate.numel():
        launch(compact(logits), None, compact(expert.long()), gate, scale, eps)
    return gate


@expert_gates.on("cpu", worth=left_to_inductor)
def _(logits, expert, scale, eps):
    chosen = acc(logits).gather(-1, expert.long())  # the other scores are never looked at
    return _normalised(F.softplus(chosen).sqrt_(), scale, eps)


def _best(biased: Tensor, k: int) -> Tensor:
    """Indices of the k largest, descending, ties to the lower: topk where there are no ties, else a stable sort."""
    values, indices = biased.topk(min(k + 1, biased.shape[-1]), -1)
    if len(values) <= FEW:
        distinct = all(a > b for row in values.tolist() for a, b in pairwise(row))
    else:
        distinct = bool((values[:, :-1] > values[:, 1:]).all())
    if not distinct:
        indices = biased.sort(dim=-1, descending=True, stable=True).indices
    return indices[:, :k].contiguous()


def _normalised(gate: Tensor, scale: float, eps: float) -> Tensor:
    return gate.div_(gate.sum(-1, keepdim=True).add_(eps)).mul_(scale)
