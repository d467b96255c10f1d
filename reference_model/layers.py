"""The parts that every block is made of: linears in all weight formats, grouped products, RMSNorm, RoPE, and index lists.

Shapes: B batch, T tokens of the call, D hidden size, d head dim, dr rotary dims. Whatever needs precision is computed in
`acc`: at least fp32, so that a model cast to fp64 is its own oracle.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .quant import dequantize, quantize


def acc(x: Tensor) -> Tensor:
    """At least fp32: bf16 and fp16 are raised, fp32 and fp64 stay as they are."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def exact_dtype() -> torch.dtype:
    """The dtype of parameters that are never stored in less than fp32 (norms, sinks, mHC, biases)."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


class Exact(nn.Module):
    """A module some of whose own tensors (named in `exact`) survive `.to(bfloat16)` and `.half()` unrounded.

    `.to(dtype)` rounds every floating tensor. That would ruin fp32 parameters such as the mHC coefficients, and 8-bit
    weights and scales, which are floating dtypes for PyTorch. Casts to fp64 apply to plain floats only.
    """

    exact: tuple[str, ...] = ()

    def _apply(self, fn, recurse=True):
        before = {name: t.data for name in self.exact if (t := getattr(self, name)) is not None}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            plain = old.dtype in (torch.float32, torch.float64)
            if new.dtype != old.dtype and not (plain and new.dtype in (torch.float32, torch.float64)):
                new.data = old.to(new.device)
        return self


class Linear(Exact):
    """y = x W^T with W [out_features, in_features] plain or block-quantised; dequantise, then matmul.

    `format`: "none" (any float dtype of two bytes or more) or "fp8" (e4m3 with one scale for each 128 x 128 block).
    """

    weight: Tensor

    def __init__(self, in_features: int, out_features: int, format: str = "none"):
        super().__init__()
        self.format = format
        allocate(self, (out_features, in_features), format)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight as a plain [out_features, in_features] matrix of `dtype`."""
        if is_plain(self.weight):
            return self.weight.to(dtype)
        return dequantize(self.weight, self.scale, None, self.format).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense(x.dtype))


class ExpertLinear(Exact):
    """One matrix for each expert, stacked: W [experts, out_features, in_features].

    `format`: "none", "fp8" (128 x 128 blocks), "mxfp4" (e2m1, a scale for each 32 columns) or "nvfp4" (e2m1, an e4m3
    scale for each 16 columns and one fp32 scale for each expert). `input_scale` (activation scale of an NVFP4
    checkpoint) is carried along, not used.
    """

    weight: Tensor

    def __init__(self, experts: int, in_features: int, out_features: int, format: str = "none"):
        super().__init__()
        self.format = format
        allocate(self, (experts, out_features, in_features), format)

    def rows(self, expert: Tensor, dtype: torch.dtype) -> Tensor:
        """The dense matrices of the experts named by `expert` [M]: [M, out_features, in_features]. Gathers the
        quantised bytes first, so that only what is used is dequantised."""
        if is_plain(self.weight):
            return self.weight[expert].to(dtype)
        scale_2 = None if self.scale_2 is None else self.scale_2[expert]
        return dequantize(self.weight[expert], self.scale[expert], scale_2, self.format).to(dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """All matrices: [experts, out_features, in_features]."""
        if is_plain(self.weight):
            return self.weight.to(dtype)
        return dequantize(self.weight, self.scale, self.scale_2, self.format).to(dtype)


def is_plain(weight: Tensor) -> bool:
    """Whether a weight is stored as numbers of two bytes or more, which stand for themselves. Every attribute that a
    plain linear does not read is one that torch.compile need not compare from layer to layer."""
    return weight.dtype.itemsize > 1


def allocate(module: Linear | ExpertLinear, shape: tuple[int, ...], format: str) -> None:
    """Give `module` its weight (random, variance 1 / in_features) and, for a quantised format, its scales."""
    weight = torch.randn(shape) * shape[-1] ** -0.5
    scale = scale_2 = input_scale = None
    if format != "none":
        weight, scale, scale_2 = quantize(weight, format)
        module.exact = ("weight", "scale", "scale_2", "input_scale")
    if scale_2 is not None:
        input_scale = torch.ones_like(scale_2)
    for name, t in (("weight", weight), ("scale", scale), ("scale_2", scale_2), ("input_scale", input_scale)):
        module.register_parameter(name, None if t is None else nn.Parameter(t, requires_grad=format == "none"))


class RMSNorm(Exact):
    """x / rms(x) * weight over the last axis, in fp32 with one final cast."""

    exact = ("weight",)

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, dtype=exact_dtype()))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm over the last axis; `weight` None for the unweighted per-head norm of the queries."""
    y = acc(x)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight).to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the trailing dr channels of x [..., d] in interleaved pairs; cos, sin [..., dr/2]. The first d - dr
    channels carry no position. With -sin it is the inverse rotation."""
    dr = 2 * cos.shape[-1]
    nope, pairs = x[..., :-dr], acc(x[..., -dr:])
    a, b = pairs[..., 0::2], pairs[..., 1::2]
    rotated = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    return torch.cat([nope, rotated.to(x.dtype)], -1)


class Frequencies(Exact):
    """RoPE frequencies [dr/2] of one table, and the angles of positions."""

    exact = ("inv_freq",)

    def __init__(self, inv_freq: Tensor):
        super().__init__()
        self.register_buffer("inv_freq", inv_freq.to(exact_dtype()), persistent=False)

    def forward(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """position [...] int64 -> cos, sin [..., dr/2]."""
        angle = position.to(self.inv_freq.dtype).unsqueeze(-1) * self.inv_freq
        return angle.cos(), angle.sin()


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x [B, S, C] named by index [B, ...] int64 -> [B, ..., C]. Index -1 means 'none' and gives row 0: mask it."""
    batch = torch.arange(x.shape[0], device=x.device).view(-1, *[1] * (index.dim() - 1))
    return x[batch, index.clamp(min=0)]


def tail(X: Tensor, last: int | None, lengths: Tensor | None) -> Tensor:
    """The last `last` real positions of X [B, T, ...]."""
    if last is None:
        return X
    if lengths is None:
        return X[:, -last:]
    index = (lengths - last).unsqueeze(1) + torch.arange(last, device=X.device)
    return take(X.flatten(2), index).unflatten(-1, X.shape[2:])


def put(x: Tensor, index: Tensor, rows: Tensor) -> None:
    """Write rows [B, T, C] into x [B, S, C] in place, at index [B, T] int64. In brackets a single one would lose its axes."""
    x.index_put_((torch.arange(x.shape[0], device=x.device).unsqueeze(1), index), rows.to(x.dtype))


def grouped_mm(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """x [M, K] in groups of rows, group e up to row ends[e], times w[e]^T of w [X, J, K] -> [M, J].

    `F.grouped_mm` is bf16 only when traced, and wants rows of a multiple of 16 bytes: odd sizes are padded.
    """
    if x.dtype != torch.bfloat16:
        return blocked_mm(x, w, ends)
    J, K = w.shape[-2:]
    if K % 8 or J % 8:
        x, w = F.pad(x, (0, -K % 8)), F.pad(w, (0, -K % 8, 0, -J % 8))
    return F.grouped_mm(x, w.transpose(-1, -2), offs=ends)[:, :J]


def blocked_mm(x: Tensor, w: Tensor, ends: Tensor, block: int = 32) -> Tensor:
    """`grouped_mm` for any dtype: groups are cut into blocks of rows, at most M // block + X of them, and each block
    is multiplied with its own copy of its group's matrix."""
    M, X = x.shape[0], w.shape[0]
    starts = F.pad(ends[:-1], (1, 0))
    block_ends = ((ends - starts + block - 1) // block).cumsum(0)  # [X]
    block_starts = F.pad(block_ends[:-1], (1, 0))
    number = torch.arange(M // block + X, device=x.device)
    group = torch.searchsorted(block_ends, number, right=True).clamp(max=X - 1)  # of each block
    first = starts[group] + (number - block_starts[group]) * block  # its first row
    row = first.unsqueeze(1) + torch.arange(
        block, device=x.device
    )  # [blocks, block]; what runs over is never read back
    y = x[row.clamp(max=M - 1)] @ w[group].transpose(-1, -2)  # [blocks, block, J]
    row = torch.arange(M, device=x.device)
    group = torch.searchsorted(ends, row, right=True)
    place = row - starts[group]
    return y[block_starts[group] + place // block, place % block]
