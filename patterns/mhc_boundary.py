"""mHC between two blocks: mixture, collapse and norm as one op, told from the ops that were found before."""

from dsv4_compile.lowerings.mhc import mhc_post, mhc_pre
from dsv4_compile.lowerings.mhc_boundary import mhc_boundary, mhc_enter
from dsv4_compile.lowerings.norm import rms_norm
from dsv4_compile.match import Int, Scalar, T, rule
from dsv4_compile.patterns.mhc import POST, PRE

BLOCK = PRE | {"weight": T(11)}


@rule(mhc_boundary, name="fuse.mhc_boundary", anchor=mhc_pre, example=POST | BLOCK)
def between(X, y, post, comb, fn, base, scale, weight, iters: Int, eps: Scalar, rms_eps: Scalar, norm_eps: Scalar):
    streams = mhc_post(X, y, post, comb)
    x, out_post, out_comb = mhc_pre(streams, fn, base, scale, iters, eps, rms_eps)
    return streams, rms_norm(x, weight, norm_eps), out_post, out_comb


@rule(mhc_enter, name="fuse.mhc_boundary", anchor=mhc_pre, example=BLOCK)
def first(X, fn, base, scale, weight, iters: Int, eps: Scalar, rms_eps: Scalar, norm_eps: Scalar):
    x, post, comb = mhc_pre(X, fn, base, scale, iters, eps, rms_eps)
    return rms_norm(x, weight, norm_eps), post, comb
