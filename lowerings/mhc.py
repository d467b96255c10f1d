"""Manifold-constrained hyper-connections: n residual streams, collapsed into a block's input and mixed with its output."""

import math

import torch
import torch.nn.functional as F

from dsv4_compile.lowerings import native
from dsv4_compile.lowerings.norm import DTYPES
from dsv4_compile.lowerings.sinkhorn import balanced, sinkhorn
from dsv4_compile.op import Cost, Tensor, acc, alike, at_most, compact, few_tokens, left_to_inductor, op

FEW, SMALL = 16, 1 << 16  # few tokens, or coefficients that stay in a cache: one loop in C++ beats calls of PyTorch
MANY = 1024  # tokens; of more, PyTorch's product makes the mixtures faster than the kernel, many launches included


def mixture(X: Tensor, fn: Tensor, rms_eps: float) -> Tensor:
    """The flat streams of X [..., n, D] times fn [m, nD], over their root mean square: [..., m].

    The norm has no weight, so it commutes with the product.
    """
    f = acc(X).flatten(-2)
    return F.linear(f, acc(fn)) * torch.rsqrt(f.square().mean(-1, keepdim=True) + rms_eps)


def collapse(pre: Tensor, X: Tensor) -> Tensor:
    """sum_j pre[j] X[j]: pre [..., n], X [..., n, D] -> [..., D] of X's dtype."""
    return (pre.unsqueeze(-1) * acc(X)).sum(-2).to(X.dtype)


@op("dsv4::mhc_pre", outputs=("x", "post", "comb"))
def mhc_pre(
    X: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iters: int, eps: float, rms_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Streams -> the block's input and the coefficients of `mhc_post`.

    X [..., n, D], fn [(2 + n) n, nD], base [(2 + n) n], scale [3] -> x [..., D] of X's dtype, post [..., n] and
    comb [..., n, n] in at least fp32.  Source: DeepSeek-V4, mHC.
    """
    n = X.shape[-2]
    pre, post, comb = mixture(X, fn, rms_eps).split([n, n, n * n], -1)
    pre_base, post_base, comb_base = acc(base).split([n, n, n * n])
    pre_scale, post_scale, comb_scale = acc(scale).unbind()
    pre = torch.sigmoid(pre * pre_scale + pre_base) + eps
    post = 2 * torch.sigmoid(post * post_scale + post_base)
    comb = sinkhorn((comb * comb_scale + comb_base).unflatten(-1, (n, n)), iters, eps)
    return collapse(pre, X), post, comb


@mhc_pre.cost
def _(N, n, D, iters):
    m = (2 + n) * n
    flops = N * (2 * m * n * D + 4 * n * D + n**2 * (4 * iters + 3))
    return Cost(flops=flops, read=2 * N * n * D + 4 * m * (n * D + 1), write=2 * N * D + 4 * N * (n + n**2))


@mhc_pre.sizes
def _(a):
    *lead, n, D = a.X.shape
    return dict(N=math.prod(lead), n=n, D=D)


@mhc_pre.on("cpu")
def _(X, fn, base, scale, iters, eps, rms_eps):
    *lead, n, D = X.shape
    N, library = math.prod(lead), native.library()
    few = N <= (few_tokens() if alike() else FEW) or fn.numel() <= SMALL
    if few and native.exact(X, fn, base, scale) and library is not None:
        x, post, comb = X.new_empty((*lead, D)), X.new_empty((*lead, n)), X.new_empty((*lead, n, n))
        given = X.data_ptr(), fn.data_ptr(), base.data_ptr(), scale.data_ptr()
        threads = native.threads(N * (fn.numel() + 4 * iters * n * n))
        made = x.data_ptr(), post.data_ptr(), comb.data_ptr()
        library.dsv4_mhc_pre(*given, *made, N, n, D, iters, eps, rms_eps, threads)
        return x, post, comb
    streams = acc(X)
    scale = acc(scale)
    scale = torch.cat([scale[:1].expand(n), scale[1:2].expand(n), scale[2:].expand(n * n)])
    mix = _scaled_mixture(streams, fn, base, scale, rms_eps)
    gates = torch.sigmoid(mix[..., : 2 * n])
    comb = balanced(mix[..., 2 * n :].unflatten(-1, (n, n)), iters, eps)
    return _collapse(gates[..., :n].add_(eps), streams).to(X.dtype), gates[..., n:] * 2, comb


def fits_the_kernel(a) -> bool | str:
    """What kernels/mhc.py is written for."""
    exact = [x for x in (getattr(a, name, None) for name in ("fn", "base", "scale", "post", "comb")) if x is not None]
    n, D = a.X.shape[-2:]
    if a.X.dtype not in DTYPES or any(x.dtype != torch.float32 for x in exact):
        return "streams must be bfloat16 or float32, coefficients float32"
    if not isinstance(n, int) or not isinstance(D, int) or D % 4 or n * n > 32:
        return f"{n} streams of {D}: a warp holds at most 32 coefficients, and loads are 4 numbers wide"
    return getattr(a, "iters", 1) > 0 or "no Sinkhorn iteration"


def streams_of(X: Tensor, iters: int):
    """X [..., n, D] as [N, n D], and the shape that a kernel is made for."""
    from dsv4_compile.kernels.mhc import Shape

    n, D = X.shape[-2:]
    return compact(X.reshape(-1, n * D)), Shape(n, D, DTYPES[X.dtype], iters)


def collapsed_by_kernel(X, fn, base, scale, iters, eps, rms_eps, post, comb):
    """x of `mhc_pre` or, with iters 0, of `mhc_head`; post and comb [N, ...] are filled."""
    from dsv4_compile.kernels.mhc import launch_pre, workspace

    flat, shape = streams_of(X, iters)
    x = X.new_empty(len(flat), shape.D)
    if len(flat):
        partial = torch.empty(len(flat), *workspace(shape), dtype=torch.float32, device=X.device)
        exact = map(compact, (fn, base, scale))
        launch_pre(shape, flat, *exact, eps, rms_eps, partial, x, post, comb)
    return x.view(*X.shape[:-2], shape.D)


@mhc_pre.on("cuda", arch="sm_90+", when=fits_the_kernel, worth=at_most(MANY, lambda a: math.prod(a.X.shape[:-2])))
def _(X, fn, base, scale, iters, eps, rms_eps):
    lead, n = X.shape[:-2], X.shape[-2]
    post = torch.empty(*lead, n, dtype=torch.float32, device=X.device)
    comb = torch.empty(*lead, n, n, dtype=torch.float32, device=X.device)
    x = collapsed_by_kernel(X, fn, base, scale, iters, eps, rms_eps, post.view(-1, n), comb.view(-1, n, n))
    return x, post, comb


@op("dsv4::mhc_post")
def mhc_post(X: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """X'[k] = post[k] y + sum_j comb[j, k] X[j]; the sum runs over the first index of comb.

    X [..., n, D], y [..., D], post [..., n], comb [..., n, n] -> [..., n, D] of X's dtype.  Source: DeepSeek-V4, mHC.
    """
    return (acc(post).unsqueeze(-1) * acc(y).unsqueeze(-2) + acc(comb).mT @ acc(X)).to(X.dtype)


@mhc_post.cost
def _(N, n, D):
    return Cost(flops=2 * N * D * (n**2 + n), read=2 * N * D * (n + 1) + 4 * N * (n + n**2), write=2 * N * n * D)


@mhc_post.sizes
def _(a):
    *lead, n, D = a.X.shape
    return dict(N=math.prod(lead), n=n, D=D)


@mhc_post.on("cpu", worth=left_to_inductor)
def _(X, y, post, comb):
    n, D = X.shape[-2:]
    mixed = acc(post).reshape(-1, n, 1) * acc(y).reshape(-1, 1, D)
    mixed.baddbmm_(acc(comb).reshape(-1, n, n).mT, acc(X).reshape(-1, n, D))  # adds to it in place
    return mixed.view(X.shape).to(X.dtype)


def fits_post(a) -> bool | str:
    return fits_the_kernel(a) if getattr(a, "y", a.X).dtype == a.X.dtype else "y and the streams differ in dtype"


@mhc_post.on("cuda", arch="sm_90+", when=fits_post)
def _(X, y, post, comb):
    from dsv4_compile.kernels.mhc import launch_post

    n, D = X.shape[-2:]
    flat, shape = streams_of(X, 1)
    out = torch.empty_like(flat)
    if len(flat):
        rows = map(compact, (y.reshape(-1, D), post.reshape(-1, n), comb.reshape(-1, n, n)))
        launch_post(shape, flat, *rows, out)
    return out.view(X.shape)


@op("dsv4::mhc_head")
def mhc_head(X: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float, rms_eps: float) -> Tensor:
    """The last collapse: streams -> one hidden state.

    X [..., n, D], fn [n, nD], base [n], scale [1] -> [..., D] of X's dtype.  Source: DeepSeek-V4, mHC.
    """
    pre = torch.sigmoid(mixture(X, fn, rms_eps) * acc(scale) + acc(base)) + eps
    return collapse(pre, X)


@mhc_head.cost
def _(N, n, D):
    return Cost(flops=N * n * D * (2 * n + 4), read=2 * N * n * D + 4 * n * (n * D + 1), write=2 * N * D)


@mhc_head.sizes
def _(a):
    *lead, n, D = a.X.shape
    return dict(N=math.prod(lead), n=n, D=D)


@mhc_head.on("cpu", worth=left_to_inductor)
def _(X, fn, base, scale, eps, rms_eps):
    streams = acc(X)
    pre = _scaled_mixture(streams, fn, base, acc(scale), rms_eps).sigmoid_().add_(eps)
    return _collapse(pre, streams).to(X.dtype)


@mhc_head.on("cuda", arch="sm_90+", when=fits_the_kernel)
def _(X, fn, base, scale, eps, rms_eps):
    return collapsed_by_kernel(X, fn, base, scale, 0, eps, rms_eps, None, None)


# On the CPU: few calls, and no pass over the streams that stores anything of their size


def _scaled_mixture(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, rms_eps: float) -> Tensor:
    """mixture * scale + base, with 1 / sqrt(mean + eps) as sqrt(K) / sqrt(sum + K eps), K elements in all streams."""
    f = streams.flatten(-2)
    K = f.shape[-1]
    r = torch.linalg.vecdot(f, f).add_(K * rms_eps).rsqrt_().unsqueeze(-1)
    return torch.addcmul(acc(base), F.linear(f, acc(fn)).mul_(r), scale, value=K**0.5)


def _collapse(pre: Tensor, streams: Tensor) -> Tensor:
    """sum_j pre[j] X[j] as a matrix product."""
    return (pre.unsqueeze(-2) @ streams).squeeze(-2)
