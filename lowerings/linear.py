"""A linear layer whose weight is stored block-quantised: dequantise and multiply."""

import torch
import torch.nn.functional as F

from dsv4_compile.lowerings import native
from dsv4_compile.lowerings.dequantize import dequantize, dequantized, stored_sizes
from dsv4_compile.op import Cost, Tensor, op

FEW = 8  # rows; up to here a product is bound by reading the weight


@op("dsv4::linear")
def linear(x: Tensor, weight: Tensor, scale: Tensor, scale_2: Tensor | None = None) -> Tensor:
    """x W^T. x [M, K]; weight [N, K], scale and scale_2 as `dequantize` takes them -> [M, N] of x's dtype, to which the
    weight is rounded before the product.  Source: DeepSeek-V4, Checkpoints.
    """
    return F.linear(x, dequantize.meaning(weight, scale, scale_2).to(x.dtype))


@linear.cost
def _(M, N, K, bits, block):
    return Cost(flops=2 * M * N * K + N * K, read=N * K * (bits / 8 + 1 / block) + 2 * M * K, write=2 * M * N)


@linear.sizes
def _(a):
    return dict(M=a.x.shape[0], **stored_sizes(a.weight, a.scale))


@linear.on("cpu")
def _(x, weight, scale, scale_2):
    if len(x) <= FEW and (y := few_rows(x.unsqueeze(0), weight, scale, scale_2)) is not None:
        return y.squeeze(0)
    return F.linear(x, dequantized(weight, scale, scale_2).to(x.dtype))


def few_rows(x: Tensor, weight: Tensor, scale: Tensor, scale_2: Tensor | None) -> Tensor | None:
    """`grouped_linear`, row by row of the weight, where there is C++ for it: nano's 42 linears of a step (fp32, one core)
    take 0.5 ms, with the weight dequantised in front of the product 9."""
    x, library = x.contiguous(), native.library()
    stored = native.described(weight, scale, scale_2) if library is not None and native.exact(x) else None
    if stored is None:
        return None
    (G, M, K), N = x.shape, weight.shape[0]
    y = x.new_empty(G, M, N // G)
    library.dsv4_linear(stored, x.data_ptr(), y.data_ptr(), G, M, native.threads(M * N * K))
    return y


@op("dsv4::grouped_linear")
def grouped_linear(x: Tensor, weight: Tensor, scale: Tensor, scale_2: Tensor | None = None) -> Tensor:
    """Each group of channels by rows of its own: y[g] = x[g] W[g]^T, the rows of the weight being W[0], W[1] ...

    x [G, M, K]; weight [G R, K], scale and scale_2 as `dequantize` takes them -> [G, M, R] of x's dtype, to which the
    weight is rounded before the product.  Source: DeepSeek-V4, grouped output projection.
    """
    w = dequantize.meaning(weight, scale, scale_2).to(x.dtype)
    return torch.bmm(x, w.unflatten(0, (x.shape[0], -1)).mT)


@grouped_linear.cost
def _(G, M, R, K, bits, block):
    weights = G * R * K
    return Cost(
        flops=2 * M * weights + weights, read=weights * (bits / 8 + 1 / block) + 2 * M * G * K, write=2 * M * G * R
    )


@grouped_linear.sizes
def _(a):
    sizes, (G, M) = stored_sizes(a.weight, a.scale), a.x.shape[:2]
    return dict(G=G, M=M, R=sizes.pop("N") // G, **sizes)


@grouped_linear.on("cpu")
def _(x, weight, scale, scale_2):
    if x.shape[1] <= FEW and (y := few_rows(x, weight, scale, scale_2)) is not None:
        return y
    w = dequantized(weight, scale, scale_2).to(x.dtype)
    return torch.bmm(x, w.unflatten(0, (x.shape[0], -1)).mT)
