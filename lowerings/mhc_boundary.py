"""mHC between two blocks: the streams take up one block's output and give the next its normed input."""

import math

from dsv4_compile.lowerings.mhc import mhc_post, mhc_pre
from dsv4_compile.lowerings.norm import rms_norm
from dsv4_compile.op import Cost, Tensor, op

# Nobody runs these on the CPU: their parts are asked instead, of which `mhc_pre` has C++ and Inductor compiles the others
# into the loops around them. What they save is traffic: the new streams are read once, while they are still at hand.


@op("dsv4::mhc_enter", outputs=("x", "post", "comb"))
def mhc_enter(
    X: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    weight: Tensor,
    iters: int,
    eps: float,
    rms_eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`mhc_pre`, then RMSNorm with `weight` and `norm_eps`: the first block of a model has no block before it.

    X [..., n, D], fn [(2 + n) n, nD], base [(2 + n) n], scale [3], weight [D] -> x [..., D] of X's dtype, rounded before
    the norm and after, post [..., n] and comb [..., n, n] in at least fp32.  Source: DeepSeek-V4, mHC.
    """
    x, post, comb = mhc_pre(X, fn, base, scale, iters, eps, rms_eps)
    return rms_norm(x, weight, norm_eps), post, comb


@mhc_enter.cost
def _(N, n, D, iters):
    m = (2 + n) * n
    flops = N * (2 * m * n * D + 4 * n * D + n**2 * (4 * iters + 3) + 4 * D)
    return Cost(flops=flops, read=2 * N * n * D + 4 * m * (n * D + 1) + 4 * D, write=2 * N * D + 4 * N * (n + n**2))


@op("dsv4::mhc_boundary", outputs=("streams", "x", "out_post", "out_comb"))
def mhc_boundary(
    X: Tensor,
    y: Tensor,
    post: Tensor,
    comb: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    weight: Tensor,
    iters: int,
    eps: float,
    rms_eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`mhc_post` of one block, then `mhc_enter` of the next.

    X, y, post and comb as `mhc_post` takes them, the others as `mhc_enter` does -> the new streams [..., n, D] of X's
    dtype, to which they are rounded before they are read again; then what `mhc_enter` returns.  Source: DeepSeek-V4, mHC.
    """
    streams = mhc_post(X, y, post, comb)
    x, out_post, out_comb = mhc_pre(streams, fn, base, scale, iters, eps, rms_eps)
    return streams, rms_norm(x, weight, norm_eps), out_post, out_comb


@mhc_boundary.cost
def _(N, n, D, iters):
    m = (2 + n) * n
    flops = N * (2 * m * n * D + 4 * n * D + n**2 * (4 * iters + 3) + 4 * D + 2 * D * (n**2 + n))
    read = 2 * N * D * (n + 1) + 4 * N * (n + n**2) + 4 * m * (n * D + 1) + 4 * D
    return Cost(flops=flops, read=read, write=2 * N * D * (n + 1) + 4 * N * (n + n**2))


@mhc_enter.sizes
@mhc_boundary.sizes
def _(a):
    *lead, n, D = a.X.shape
    return dict(N=math.prod(lead), n=n, D=D)
