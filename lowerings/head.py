"""The end of the model: the last collapse of the streams, the norm, the vocabulary. And where MTP begins."""

import math

from dsv4_compile.lowerings.linear import linear, linear_wide, sizes_of
from dsv4_compile.lowerings.mhc import mhc_head
from dsv4_compile.lowerings.mhc_boundary import fits_the_kernel, in_one_launch
from dsv4_compile.lowerings.norm import rms_norm
from dsv4_compile.op import Cost, Tensor, op

# Nobody runs these on the CPU: nearly all of their time is that of the products, which no loop around them makes shorter.


@op("dsv4::head")
def head(
    X: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    weight: Tensor,
    vocabulary: Tensor,
    eps: float,
    rms_eps: float,
    norm_eps: float,
    exact: bool,
) -> Tensor:
    """Streams -> logits: `mhc_head`, RMSNorm with `weight` and `norm_eps`, a product with `vocabulary`.

    X [..., n, D], fn [n, nD], base [n], scale [1], weight [D], vocabulary [V, D] -> [..., V]: `exact`, in at least fp32, as
    the reference model has it; else of X's dtype, to which the vocabulary is rounded.  Source: DeepSeek-V4, model.
    """
    h = rms_norm(mhc_head(X, fn, base, scale, eps, rms_eps), weight, norm_eps)
    return rows(h, vocabulary, None, exact)


def rows(x: Tensor, weight: Tensor, scale: Tensor | None, exact: bool = False) -> Tensor:
    """x W^T with any leading axes."""
    flat = x.reshape(-1, x.shape[-1])
    y = linear_wide(flat, weight) if exact else linear(flat, weight, scale)
    return y.view(*x.shape[:-1], weight.shape[0])


@head.cost
def _(N, n, D, V, bits):
    flops = N * n * D * (2 * n + 4) + 4 * N * D + 2 * N * D * V
    return Cost(flops=flops, read=2 * N * n * D + 4 * n * (n * D + 1) + 4 * D + V * D * bits / 8, write=4 * N * V)


@head.sizes
def _(a):
    *lead, n, D = a.X.shape
    return dict(N=math.prod(lead), n=n, D=D, V=a.vocabulary.shape[0], bits=8 * a.vocabulary.dtype.itemsize)


@head.on("cuda", arch="sm_90+", when=fits_the_kernel)
def _(X, fn, base, scale, weight, vocabulary, eps, rms_eps, norm_eps, exact):
    h = in_one_launch(X, fn, base, scale, weight, 0, eps, rms_eps, norm_eps)[1]
    return rows(h, vocabulary, None, exact)


@op("dsv4::mtp_join")
def mtp_join(
    e: Tensor,
    X: Tensor,
    e_norm: Tensor,
    h_norm: Tensor,
    e_weight: Tensor,
    h_weight: Tensor,
    e_scale: Tensor | None,
    h_scale: Tensor | None,
    e_eps: float,
    h_eps: float,
) -> Tensor:
    """Embeddings of the next tokens and the streams -> streams for the MTP block: both normed and projected, then added.

    e [..., D], X [..., n, D], e_norm and h_norm [D], e_weight and h_weight [J, D], plain or as `dequantize` takes them with
    e_scale and h_scale -> [..., n, J] of the inputs' dtype.  Source: DeepSeek-V4, multi-token prediction.
    """
    first = rows(rms_norm(e, e_norm, e_eps), e_weight, e_scale)
    return first.unsqueeze(-2) + rows(rms_norm(X, h_norm, h_eps), h_weight, h_scale)


@mtp_join.cost
def _(N, M, n, K, bits, block):
    """M rows of each, N columns of the result."""
    rows = M * (n + 1)
    flops = rows * (2 * N * K + 4 * K) + M * n * N + 2 * N * K
    return Cost(flops=flops, read=2 * N * K * (bits / 8 + 1 / block) + 2 * rows * K + 8 * K, write=2 * M * n * N)


@mtp_join.sizes
def _(a):
    *lead, n, _ = a.X.shape
    return dict(M=math.prod(lead), n=n, **sizes_of(a.e_weight, a.e_scale))
