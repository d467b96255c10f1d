"""Manifold-constrained hyper-connections: the collapse before a block, the mixture after it, and the last collapse."""

import torch
import torch.nn.functional as F

from dsv4_compile.lowerings.mhc import mhc_head, mhc_post, mhc_pre
from dsv4_compile.lowerings.norm import unit_norm
from dsv4_compile.lowerings.sinkhorn import sinkhorn
from dsv4_compile.match import Int, Scalar, T, rule

# 5 streams of 11 channels, 13 tokens, 17 iterations; 35 = (2 + 5) 5 coefficients.
PRE = {"X": T(13, 5, 11), "fn": T(35, 55), "base": T(35), "scale": T(3), "iters": 17}
POST = {"X": T(13, 5, 11), "y": T(13, 11), "post": T(13, 5), "comb": T(13, 5, 5)}
HEAD = {"X": T(13, 5, 11), "fn": T(5, 55), "base": T(5), "scale": T(1)}

# Parts of the weights, which are views: a layer that is called twice reads them twice.
PARTS = ("aten.permute", "aten.slice", "aten.select")


def mixture(X, fn, rms_eps):
    """The norm after the product."""
    f = X.flatten(-2)
    return F.linear(f, fn) * torch.rsqrt(f.square().mean(-1, keepdim=True) + rms_eps)


def mixture_of_normed(X, fn, rms_eps):
    """The norm before the product, as Hugging Face has it."""
    return F.linear(unit_norm(X.flatten(-2), rms_eps), fn)


def collapse(pre, X):
    return (pre.unsqueeze(-1) * X).sum(-2)


@rule(mhc_pre, name="fuse.mhc", anchor=sinkhorn, example=PRE, shared=PARTS)
def pre(X, fn, base, scale, iters: Int, eps: Scalar, rms_eps: Scalar):
    n = X.shape[-2]
    pre, post, comb = mixture(X, fn, rms_eps).split([n, n, n * n], -1)
    pre_base, post_base, comb_base = base.split([n, n, n * n])
    pre = torch.sigmoid(pre * scale[0] + pre_base) + eps
    post = 2 * torch.sigmoid(post * scale[1] + post_base)
    comb = sinkhorn((comb * scale[2] + comb_base).unflatten(-1, (n, n)), iters, eps)
    return collapse(pre, X), post, comb


@rule(mhc_pre, name="fuse.mhc", anchor=sinkhorn, example=PRE, shared=PARTS)
def pre_of_normed(X, fn, base, scale, iters: Int, eps: Scalar, rms_eps: Scalar):
    n = X.shape[-2]
    pre, post, comb = mixture_of_normed(X, fn, rms_eps).split([n, n, n * n], -1)
    pre_base, post_base, comb_base = base.split([n, n, n * n])
    pre_scale, post_scale, comb_scale = scale.unbind(0)
    pre = torch.sigmoid(pre * pre_scale + pre_base) + eps
    post = 2 * torch.sigmoid(post * post_scale + post_base)
    comb = sinkhorn(comb.unflatten(-1, (n, n)) * comb_scale + comb_base.view(n, n), iters, eps)
    return collapse(pre, X), post, comb


@rule(mhc_post, name="fuse.mhc", anchor="bmm", example=POST)
def post(X, y, post, comb):
    return post.unsqueeze(-1) * y.unsqueeze(-2) + comb.transpose(-1, -2) @ X


@rule(mhc_post, name="fuse.mhc", anchor="sum", example=POST)
def post_of_sum(X, y, post, comb):
    return post.unsqueeze(-1) * y.unsqueeze(-2) + (comb.unsqueeze(-1) * X.unsqueeze(-2)).sum(-3)


@rule(mhc_head, name="fuse.mhc", anchor="sigmoid", example=HEAD, shared=PARTS)
def head(X, fn, base, scale, eps: Scalar, rms_eps: Scalar):
    return collapse(torch.sigmoid(mixture(X, fn, rms_eps) * scale + base) + eps, X)


@rule(mhc_head, name="fuse.mhc", anchor="sigmoid", example=HEAD, shared=PARTS)
def head_of_normed(X, fn, base, scale, eps: Scalar, rms_eps: Scalar):
    return collapse(torch.sigmoid(mixture_of_normed(X, fn, rms_eps) * scale + base) + eps, X)
