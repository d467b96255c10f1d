"""mHC between two blocks: the streams take up one block's output and give the next its normed input."""

import math

import torch

from dsv4_compile.lowerings.gemv import settled
from dsv4_compile.lowerings.mhc import fits_post, mhc_post, mhc_pre
from dsv4_compile.lowerings.norm import DTYPES, rms_norm
from dsv4_compile.op import Cost, Tensor, compact, known, op

WIDEST = 16 * 512 * 4  # numbers in all streams of a token: blocks of a cluster, their threads, the vector of each

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


# On a GPU: few tokens in one launch. The parts read all streams once more, but by as many processors as there are.


def fits_the_kernel(a) -> bool | str:
    """What kernels/mhc_boundary.py is written for."""
    from dsv4_compile.kernels.mhc_boundary import most_tokens

    n, D = a.X.shape[-2:]
    weight = getattr(a, "weight", None)
    if (fits := fits_post(a)) is not True:
        return fits
    if n > 4 or n * D > WIDEST or (weight is not None and weight.dtype not in DTYPES):
        return f"{n} streams of {D}: a cluster holds at most 4, and {WIDEST} numbers in all"
    tokens, most = math.prod(a.X.shape[:-2]), most_tokens()
    return known(tokens <= most) or f"{tokens} tokens: beyond {most} its parts are faster"


def in_one_launch(X, fn, base, scale, weight, iters, eps, rms_eps, norm_eps, before=None):
    """`mhc_boundary`; without y, post and comb of a block `before`, `mhc_enter`; without a weight too, `mhc_pre`, and with
    iters 0 `mhc_head`. What is not made is None."""
    from dsv4_compile.kernels.mhc_boundary import Shape, launch

    *lead, n, D = X.shape
    flat = compact(X.reshape(-1, n * D))
    taken: tuple[Tensor | None, ...] = (None, None, None)
    if before is not None:
        y, post, comb = before
        taken = tuple(map(compact, (y.reshape(-1, D), post.reshape(-1, n), comb.reshape(-1, n, n))))
    streams = None if before is None else torch.empty_like(flat)
    x = X.new_empty(len(flat), D)
    post, comb = (X.new_empty(len(flat), *s, dtype=torch.float32) if iters else None for s in ((n,), (n, n)))
    if len(flat):
        weights = [None if t is None else compact(t) for t in (fn, base, scale, weight)]
        of_norm = "none" if weight is None else DTYPES[weight.dtype]
        shape = Shape(n, D, DTYPES[X.dtype], iters, before is not None, of_norm, settled(x, *weights))
        launch(shape, flat, *taken, *weights, eps, rms_eps, norm_eps, streams, x, post, comb)
    shapes = ((n, D), (D,), (n,), (n, n))
    made = zip((streams, x, post, comb), shapes, strict=True)
    return tuple(None if t is None else t.view(*lead, *s) for t, s in made)


@mhc_boundary.on("cuda", arch="sm_90+", when=fits_the_kernel)
def _(X, y, post, comb, fn, base, scale, weight, iters, eps, rms_eps, norm_eps):
    return in_one_launch(X, fn, base, scale, weight, iters, eps, rms_eps, norm_eps, (y, post, comb))


@mhc_enter.on("cuda", arch="sm_90+", when=fits_the_kernel)
def _(X, fn, base, scale, weight, iters, eps, rms_eps, norm_eps):
    return in_one_launch(X, fn, base, scale, weight, iters, eps, rms_eps, norm_eps)[1:]
