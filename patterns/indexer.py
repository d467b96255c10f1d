"""The lightning indexer: scores of all entries, the best of those that may be seen."""

from functools import partial

import torch
import torch.nn.functional as F

from dsv4_compile.lowerings.indexer import indexer
from dsv4_compile.lowerings.rope import rope
from dsv4_compile.match import Int, Made, Match, Scalar, T, rule

# 5 queries of 6 heads with 7 channels, 11 entries, of which 4 are picked
QUERY = dict(q=T(3, 5, 6, 7), keys=T(3, 11, 7), w=T(3, 5, 6), k=4)
SEEN = QUERY | {"visible": T(3, 5, dtype=torch.int64)}
SEEN_ALIKE = QUERY | {"visible": T(1, 5, dtype=torch.int64)}  # positions that the rows of a batch share

MASK = ("aten.ge", "aten.lt")  # of hidden entries, which layers have in common


def visible_scores(s, w, visible):
    score = (s * w.unsqueeze(-1)).sum(-2)
    entry = torch.arange(score.shape[-1], device=score.device)
    return score.masked_fill(entry >= visible, float("-inf"))


def products(q, keys):
    return F.relu(q @ keys.transpose(-1, -2).unsqueeze(1))


def without_factor(match: Match) -> bool | str:
    """A positive factor of all weights changes no order."""
    return match.arguments.pop("factor") > 0 or "weights times a positive number"


@rule(
    indexer,
    name="fuse.indexer",
    anchor="topk",
    example=[case | dict(cos=T(3, 5, 1, 2), sin=T(3, 5, 1, 2)) for case in (SEEN, SEEN_ALIKE)],
    check=without_factor,
    shared=MASK,
)
def turned_and_weighted(q, cos, sin, keys, w, visible, k: Int, factor: Scalar):
    visible = visible.unsqueeze(-1)
    s = products(rope(q, cos, sin, False), keys)
    pick = visible_scores(s, w * factor, visible).topk(k, -1).indices
    return torch.where(pick < visible, pick, -1)


@rule(indexer, name="fuse.indexer", anchor="topk", example=[SEEN, SEEN_ALIKE], shared=MASK)
def weighted(q, keys, w, visible, k: Int):
    visible = visible.unsqueeze(-1)
    pick = visible_scores(products(q, keys), w, visible).topk(k, -1).indices
    return torch.where(pick < visible, pick, -1)


# Keys in e4m3, each with a scale


def stored(case):
    return case | dict(keys=T(3, 11, 7, dtype=torch.float8_e4m3fn), scale=T(3, 11, 1))


@rule(
    indexer,
    name="fuse.indexer",
    anchor="topk",
    example=[stored(case) | dict(cos=T(3, 5, 1, 2), sin=T(3, 5, 1, 2)) for case in (SEEN, SEEN_ALIKE)],
    check=without_factor,
    shared=MASK,
)
def turned_and_weighted_of_stored(q, cos, sin, keys, scale, w, visible, k: Int, factor: Scalar):
    visible = visible.unsqueeze(-1)
    s = products(rope(q, cos, sin, False), keys.float() * scale)
    pick = visible_scores(s, w * factor, visible).topk(k, -1).indices
    return torch.where(pick < visible, pick, -1)


@rule(indexer, name="fuse.indexer", anchor="topk", example=[stored(SEEN), stored(SEEN_ALIKE)], shared=MASK)
def weighted_of_stored(q, keys, scale, w, visible, k: Int):
    visible = visible.unsqueeze(-1)
    pick = visible_scores(products(q, keys.float() * scale), w, visible).topk(k, -1).indices
    return torch.where(pick < visible, pick, -1)


def scale_of_weights(match: Match) -> bool:
    """The scale of the scores, into the weights."""
    a = match.arguments
    a["w"] = Made(partial(scaled, by=a.pop("scale")), (a["w"],))
    return True


def scaled(w, by):
    return w * by


@rule(indexer, name="fuse.indexer", anchor="topk", example=[SEEN, SEEN_ALIKE], check=scale_of_weights, shared=MASK)
def scaled_and_weighted(q, keys, w, visible, k: Int, scale: Scalar):
    """As Hugging Face has it."""
    visible = visible.unsqueeze(-1)
    pick = visible_scores(products(q, keys) * scale, w, visible).topk(k, -1).indices
    return torch.where(pick >= visible, torch.full_like(pick, -1), pick)
