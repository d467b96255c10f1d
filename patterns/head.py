"""The end of the model and the beginning of MTP, told from the ops that were found before."""

import torch
import torch.nn.functional as F

from dsv4_compile.lowerings.head import head, mtp_join
from dsv4_compile.lowerings.linear import linear
from dsv4_compile.lowerings.mhc import mhc_head
from dsv4_compile.lowerings.norm import rms_norm
from dsv4_compile.match import Int, Made, Match, Scalar, T, known, rule, shape, value
from dsv4_compile.patterns.mhc import HEAD

LAST = HEAD | {"weight": T(11), "vocabulary": T(17, 11)}
TAIL = LAST | {"X": T(3, 13, 5, 11), "start": 6}
TURNED = ("aten.permute",)  # the vocabulary, which MTP reads too


def wide(match: Match) -> bool:
    """Whether the product is in more than the streams' dtype."""
    match.arguments["exact"] = value(match.outputs[0]).dtype.itemsize >= torch.float32.itemsize
    return True


def of_the_end(match: Match) -> bool | str:
    """The same of the last streams alone."""
    a = match.arguments
    X, start = a["X"], a.pop("start")
    keep = shape(X)[1] - start
    if not isinstance(keep, int) or not known(keep > 0):
        return "a number of tokens at the end"
    a["X"] = Made(lambda X: X[:, -keep:], (X,))
    return wide(match)


@rule(head, name="fuse.head", anchor=mhc_head, example=LAST, check=wide, shared=TURNED)
def whole(X, fn, base, scale, weight, vocabulary, eps: Scalar, rms_eps: Scalar, norm_eps: Scalar):
    return F.linear(rms_norm(mhc_head(X, fn, base, scale, eps, rms_eps), weight, norm_eps), vocabulary)


def last(X, fn, base, scale, weight, start, eps, rms_eps, norm_eps):
    """Hugging Face leaves tokens out after the norm."""
    return rms_norm(mhc_head(X, fn, base, scale, eps, rms_eps), weight, norm_eps)[:, start:]


@rule(head, name="fuse.head", anchor=mhc_head, example=TAIL, check=of_the_end, shared=TURNED)
def tail(X, fn, base, scale, weight, vocabulary, start: Int, eps: Scalar, rms_eps: Scalar, norm_eps: Scalar):
    return F.linear(last(X, fn, base, scale, weight, start, eps, rms_eps, norm_eps).flatten(0, 1), vocabulary)


@rule(head, name="fuse.head", anchor=mhc_head, example=TAIL, check=of_the_end, shared=TURNED)
def tail_of_rows(X, fn, base, scale, weight, vocabulary, start: Int, eps: Scalar, rms_eps: Scalar, norm_eps: Scalar):
    """As a batch of products: what is left lies apart in memory."""
    return F.linear(last(X, fn, base, scale, weight, start, eps, rms_eps, norm_eps), vocabulary)


PLAIN = dict(e=T(13, 11), X=T(13, 5, 11), e_norm=T(11), h_norm=T(11), e_weight=T(17, 11), h_weight=T(17, 11))
FP8 = T(17, 11, dtype=torch.float8_e4m3fn)
STORED = PLAIN | {"e_weight": FP8, "h_weight": FP8, "e_scale": T(4, 6), "h_scale": T(4, 6)}


def without_scales(match: Match) -> bool:
    match.arguments |= {"e_scale": None, "h_scale": None}
    return True


@rule(mtp_join, name="fuse.mtp", anchor="add", example=PLAIN, check=without_scales)
def plain(e, X, e_norm, h_norm, e_weight, h_weight, e_eps: Scalar, h_eps: Scalar):
    return F.linear(rms_norm(e, e_norm, e_eps), e_weight).unsqueeze(1) + F.linear(rms_norm(X, h_norm, h_eps), h_weight)


@rule(mtp_join, name="fuse.mtp", anchor="add", example=PLAIN, check=without_scales)
def few(e, X, e_norm, h_norm, e_weight, h_weight, e_eps: Scalar, h_eps: Scalar):
    """With products of plain weights found before, which happens on a GPU."""
    first, second = linear(rms_norm(e, e_norm, e_eps), e_weight), rms_norm(X, h_norm, h_eps).flatten(0, 1)
    return first.unsqueeze(1) + linear(second, h_weight).unflatten(0, (13, 5))


@rule(mtp_join, name="fuse.mtp", anchor="add", example=STORED)
def stored(e, X, e_norm, h_norm, e_weight, h_weight, e_scale, h_scale, e_eps: Scalar, h_eps: Scalar):
    first, second = linear(rms_norm(e, e_norm, e_eps), e_weight, e_scale), rms_norm(X, h_norm, h_eps).flatten(0, 1)
    return first.unsqueeze(1) + linear(second, h_weight, h_scale).unflatten(0, (13, 5))
