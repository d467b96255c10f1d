"""The compressor: a window of rows becomes one entry."""

import torch

from dsv4_compile.op import Cost, Tensor, acc, op


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


@compressor.on("cpu")
def _(c, z, index, weight, cos, sin, eps, overlap):
    B, n, R = index.shape
    d, m = weight.shape[0], R // 2
    out = torch.zeros(B, n, d, dtype=acc(c).dtype)
    closed = index[..., -1] >= 0  # rows are absent from the old end only, or all of them
    for b in range(B):
        which = closed[b].nonzero().squeeze(1)
        if not which.numel():
            continue  # most decode steps close no window
        lists = index[b, which]
        rows, none = lists.clamp(min=0), lists < 0

        def gathered(x, fill, x_rows=rows, absent=none, b=b):
            if not overlap:
                g = acc(x[b].index_select(0, x_rows.view(-1))).view(-1, R, d)
            else:
                g = torch.empty(len(x_rows), R, d, dtype=out.dtype)
                g[:, :m] = x[b, :, :d].index_select(0, x_rows[:, :m].reshape(-1)).view(-1, m, d)
                g[:, m:] = x[b, :, d:].index_select(0, x_rows[:, m:].reshape(-1)).view(-1, R - m, d)
            return g.masked_fill_(absent.unsqueeze(-1), fill)

        p = torch.softmax(gathered(z, -1e30), 1)
        out[b, which] = norm_rope(p.mul_(gathered(c, 0.0)).sum(1), weight, cos[b, which], sin[b, which], eps)
    return out
