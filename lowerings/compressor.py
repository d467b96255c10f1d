"""The compressor: a window of rows becomes one entry."""

import torch

from dsv4_compile.lowerings.norm import DTYPES
from dsv4_compile.op import Cost, Tensor, acc, alike, compact, known, left_to_inductor, op

LONG, FEW = 64, 16  # rows of a window, which a block goes through one after the other; windows


@op("dsv4::compressor")
def compressor(
    c: Tensor, z: Tensor, index: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float, overlap: bool
) -> Tensor:
    """Entry of each window: softmax over its rows, channel by channel, then RMSNorm and RoPE on the trailing channels.

    c, z [B, S, C] values and gates (at least fp32); index [B, n, R] int64, the rows of each window from the oldest, -1 for
    none; weight [d]; cos, sin [B, n, dr/2]. `overlap`: C = 2 d, the older R/2 rows give their first d channels, the newer
    their last; else C = d. Returns [B, n, d] of c's dtype; a window whose rows are all -1 gives zeros.
    Source: DeepSeek-V4, CSA and HCA compressors.
    """
    batch = torch.arange(c.shape[0], device=c.device).view(-1, 1, 1)
    rows = index.clamp(min=0)
    c, z = acc(c[batch, rows]), acc(z[batch, rows])
    if overlap:
        m, d = index.shape[-1] // 2, c.shape[-1] // 2
        c = torch.cat([c[:, :, :m, :d], c[:, :, m:, d:]], 2)
        z = torch.cat([z[:, :, :m, :d], z[:, :, m:, d:]], 2)
    none = (index < 0).unsqueeze(-1)
    p = torch.softmax(z.masked_fill(none, -1e30), 2)
    return norm_rope((p * c.masked_fill(none, 0.0)).sum(2), weight, cos, sin, eps)


def norm_rope(e: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """RMSNorm over [.., d], then rotate the trailing channels in interleaved pairs."""
    e = e * torch.rsqrt(e.square().mean(-1, keepdim=True) + eps) * acc(weight)
    dr = 2 * cos.shape[-1]
    nope, pairs = e[..., :-dr], e[..., -dr:]
    a, b = pairs[..., 0::2], pairs[..., 1::2]
    return torch.cat([nope, torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)], -1)


@compressor.cost
def _(B, n, R, d, overlap):
    rows = B * n * R * d
    return Cost(flops=6 * rows + 8 * B * n * d, read=8 * rows + 8 * B * n * R, write=4 * B * n * d)


@compressor.sizes
def _(a):
    B, n, R = a.index.shape
    return dict(B=B, n=n, R=R, d=a.weight.shape[0])


@compressor.on("cpu", worth=left_to_inductor)
def _(c, z, index, weight, cos, sin, eps, overlap):
    B, n, R = index.shape
    S, C, d = c.shape[1], c.shape[2], weight.shape[0]
    out = torch.zeros(B * n, d, dtype=acc(c).dtype)
    lists = index.reshape(B * n, R)
    closed = (lists[:, -1] >= 0).nonzero().squeeze(1)  # rows are absent from the old end only, or all of them
    if not closed.numel():
        return out.view(B, n, d)  # most decode steps close no window
    lists = lists.index_select(0, closed)
    first = closed.div(n, rounding_mode="floor").mul_(S).unsqueeze(1)  # row of the window's batch
    early = (lists[:, 0] < 0).nonzero().squeeze(1)  # the windows that miss rows: the first of a sequence
    absent = (lists.index_select(0, early) < 0).unsqueeze(-1)
    rows = lists.clamp_(min=0).add_(first)

    def gathered(x: Tensor, fill: float) -> Tensor:  # [B, S, C] -> [closed, R, d]
        x = x.reshape(-1, C)
        parts = [(x, rows)] if not overlap else [(x[:, :d], rows[:, : R // 2]), (x[:, d:], rows[:, R // 2 :])]
        g = acc(torch.cat([y.index_select(0, r.reshape(-1)).view(*r.shape, d) for y, r in parts], 1))
        return g.index_copy_(0, early, g.index_select(0, early).masked_fill_(absent, fill))

    e = torch.softmax(gathered(z, -1e30), 1).mul_(gathered(c, 0.0)).sum(1)
    cos, sin = (t.reshape(B * n, -1).index_select(0, closed) for t in (cos, sin))
    out[closed] = norm_rope(e, weight, cos, sin, eps)
    return out.view(B, n, d)


# On a GPU


def fits_the_kernel(a) -> bool | str:
    """What kernels/compressor.py is written for."""
    R, d = a.index.shape[-1], a.weight.shape[0]
    if any(t.dtype != torch.float32 for t in (a.c, a.z, a.cos, a.sin)) or a.weight.dtype not in DTYPES:
        return "values, gates and angles must be float32, the weight bfloat16 or float32"
    if not isinstance(R, int) or not isinstance(d, int) or d % 4 or not 0 < d <= 4096 or R < 1:
        return f"windows of {R} rows, {d} channels: a multiple of 4 is needed, 4096 at most"
    return True


def short_or_many(a) -> bool | str:
    B, n, R = a.index.shape
    few = known(n > 1) and known(B * n < FEW) and known(R >= LONG)  # of one window a token most do not close
    return alike() or not few or f"fewer than {FEW} windows of {LONG} rows or more"


@compressor.on("cuda", arch="sm_90+", when=fits_the_kernel, worth=short_or_many)
def _(c, z, index, weight, cos, sin, eps, overlap):
    from dsv4_compile.kernels.compressor import Shape, launch

    B, n, R = index.shape
    d = weight.shape[0]
    out = torch.empty(B, n, d, dtype=c.dtype, device=c.device)
    if out.numel():
        shape = Shape(d, R, 2 * cos.shape[-1], overlap, DTYPES[weight.dtype])
        launch(shape, *(compact(t) for t in (c, z, index, weight, cos, sin)), out, eps)
    return out
