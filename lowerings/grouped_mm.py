"""One matrix product for each group of rows."""

import torch
from torch.nn import functional as F

from dsv4_compile.op import Cost, Tensor, acc, hinted, op

BLOCK = 32  # rows


@op("dsv4::grouped_mm")
def grouped_mm(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """Rows of x times the transposed matrix of their group: row r is of the first group e with r < ends[e].

    x [M, K], w [X, J, K], ends [X] ascending integers, the last of them M -> [M, J] of x's dtype.
    """
    w = w.to(x.dtype)
    J, K = w.shape[-2:]
    if x.dtype != torch.bfloat16:
        return blocked(x, w, ends)
    if K % 8 or J % 8:  # torch's kernels want rows of a multiple of 16 bytes
        x, w = F.pad(x, (0, -K % 8)), F.pad(w, (0, -K % 8, 0, -J % 8))
    return F.grouped_mm(x, w.transpose(-1, -2), offs=ends.int())[:, :J]


def blocked(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """Groups are cut into blocks of rows, at most M // BLOCK + X of them, each with a copy of its group's matrix."""
    M, X = x.shape[0], w.shape[0]
    starts = F.pad(ends[:-1], (1, 0))
    block_ends = ((ends - starts + BLOCK - 1) // BLOCK).cumsum(0)
    block_starts = F.pad(block_ends[:-1], (1, 0))
    block = torch.arange(M // BLOCK + X, device=x.device)
    group = torch.searchsorted(block_ends, block, right=True).clamp(max=X - 1)  # of each block
    first = starts[group] + (block - block_starts[group]) * BLOCK  # its first row
    rows = first.unsqueeze(1) + torch.arange(BLOCK, device=x.device)  # what runs over the end is never read back
    y = x[rows.clamp(max=M - 1)] @ w[group].transpose(-1, -2)  # [blocks, BLOCK, J]
    row = torch.arange(M, device=x.device)
    group = torch.searchsorted(ends, row, right=True)
    place = row - starts[group]
    return y[block_starts[group] + place // BLOCK, place % BLOCK]


@grouped_mm.cost
def _(M, J, K, X, hit):
    """hit: how many of the X matrices have rows."""
    return Cost(flops=2 * M * J * K, read=2 * M * K + 2 * hit * J * K + 4 * X, write=2 * M * J)


@grouped_mm.sizes
def _(a):
    X, J, K = a.w.shape
    return dict(M=a.x.shape[0], J=J, K=K, X=X, hit=X * (1 - (1 - 1 / X) ** hinted(a.x.shape[0])))  # on average


@grouped_mm.on("cpu")
def _(x, w, ends):
    wide, first = acc(x), 0
    y = wide.new_empty(x.shape[0], w.shape[1])
    for e, last in enumerate(ends.tolist()):
        if last > first:
            torch.mm(wide[first:last], w[e].to(wide.dtype).t(), out=y[first:last])
        first = last
    return y.to(x.dtype)
