"""Sinkhorn normalisation: small matrices made nearly doubly stochastic."""

import torch

from dsv4_compile.op import Cost, Tensor, acc, op

FEW = 16  # matrices; up to here one batched product a half step is cheaper than vectors over the batch
FEWEST = 4  # matrices of 4 x 4; up to here Python's own floats are cheaper than any call


@op("dsv4::sinkhorn")
def sinkhorn(logits: Tensor, iters: int, eps: float) -> Tensor:
    """Softmax over rows plus eps, columns divided by their sums plus eps, then `iters` - 1 times rows and columns.

    logits [..., n, n] -> [..., n, n], at least fp32; columns are normalised last.  Source: DeepSeek-V4, mHC.
    """
    c = torch.softmax(acc(logits), -1) + eps
    c = c / (c.sum(-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        c = c / (c.sum(-1, keepdim=True) + eps)
        c = c / (c.sum(-2, keepdim=True) + eps)
    return c


@sinkhorn.cost
def _(N, n, iters):
    return Cost(flops=N * (5 * n**2 + (2 * iters - 1) * (2 * n**2 + n)), read=4 * N * n**2, write=4 * N * n**2)


@sinkhorn.sizes
def _(a):
    n = a.logits.shape[-1]
    return dict(N=a.logits.numel() // n**2, n=n)


@sinkhorn.on("cpu")
def balanced(logits: Tensor, iters: int, eps: float) -> Tensor:
    """The result is diag(1/p) K diag(1/q) with K = softmax + eps. Dividing by a sum plus eps means p <- K (1/q) + eps p for
    rows and q <- K^T (1/p) + eps q for columns, so only the two vectors are carried: two calls a half step in
    place of three (N = 1: 250 against 350 us), and rounding errors do not add up."""
    k = torch.softmax(acc(logits), -1).add_(eps)
    rows, columns = k.shape[-2:]
    k = k.view(-1, rows, columns)
    if len(k) <= FEWEST and (rows, columns) == (4, 4) and eps > 0:  # a zero that is divided by is an error in Python
        return k.new_tensor([_by_number(m, iters, eps) for m in k.tolist()]).view(logits.shape)
    (_few if len(k) <= FEW else _many)(k, iters, eps)
    return k.view(logits.shape)


def _by_number(k: list[list[float]], iters: int, eps: float) -> list[list[float]]:
    """One matrix in fp64, number by number: 76 calls of PyTorch take four times as long (N = 1, 20 iterations)."""
    (a, b, c, d), (e, f, g, h), (i, j, l, m), (n, o, r, s) = k
    p0 = p1 = p2 = p3 = 1.0
    q0, q1, q2, q3 = a + e + i + n + eps, b + f + j + o + eps, c + g + l + r + eps, d + h + m + s + eps
    for _ in range(iters - 1):
        x, y, z, w = 1 / q0, 1 / q1, 1 / q2, 1 / q3
        p0 = a * x + b * y + c * z + d * w + eps * p0
        p1 = e * x + f * y + g * z + h * w + eps * p1
        p2 = i * x + j * y + l * z + m * w + eps * p2
        p3 = n * x + o * y + r * z + s * w + eps * p3
        x, y, z, w = 1 / p0, 1 / p1, 1 / p2, 1 / p3
        q0 = a * x + e * y + i * z + n * w + eps * q0
        q1 = b * x + f * y + j * z + o * w + eps * q1
        q2 = c * x + g * y + l * z + r * w + eps * q2
        q3 = d * x + h * y + m * z + s * w + eps * q3
    q = q0, q1, q2, q3
    return [[v / (p * t) for v, t in zip(row, q, strict=True)] for row, p in zip(k, (p0, p1, p2, p3), strict=True)]


def _few(k: Tensor, iters: int, eps: float) -> None:
    """k [N, n, n] in place, one batched product for each half step."""
    kt = k.mT
    p = k.new_ones(*k.shape[:2], 1)
    q = torch.baddbmm(k.new_full((), eps), kt, p)
    u, v = torch.empty_like(p), q.reciprocal()
    for _ in range(iters - 1):
        torch.reciprocal(torch.baddbmm(p, k, v, beta=eps, out=p), out=u)
        torch.reciprocal(torch.baddbmm(q, kt, u, beta=eps, out=q), out=v)
    k.div_(p).mul_(v.mT)


def _many(k: Tensor, iters: int, eps: float) -> None:
    """k [N, n, n] in place; the batch is the contiguous axis while iterating, so that every call is one long vector loop
    (N = 2048: 1.7 against 5.2 ms for sums over rows of 4)."""
    c = k.permute(1, 2, 0).contiguous()  # [n, n, N]
    p = torch.ones_like(c[:, :1])
    q = c.sum(0, keepdim=True).add_(eps)
    u, v, row, column, t = (
        torch.ones_like(p),
        q.reciprocal(),
        torch.empty_like(p),
        torch.empty_like(q),
        torch.empty_like(c),
    )
    for _ in range(iters - 1):
        torch.sum(torch.mul(c, v, out=t), 1, keepdim=True, out=row)
        torch.reciprocal(torch.add(row, p, alpha=eps, out=p), out=u)
        torch.sum(torch.mul(c, u, out=t), 0, keepdim=True, out=column)
        torch.reciprocal(torch.add(column, q, alpha=eps, out=q), out=v)
    k.copy_(c.mul_(u).mul_(v).permute(2, 0, 1))
