"""Rows written into a cache by batch and slot; functionalisation has made a new cache of it."""

import torch

from dsv4_compile.lowerings.append import append, norm_rope_append
from dsv4_compile.lowerings.rope import norm_rope
from dsv4_compile.match import Scalar, T, rule

CACHE = dict(ring=T(5, 11, 19), slot=T(5, 7, dtype=torch.int64))


@rule(append, name="fuse.append", anchor="index_put", example=CACHE | dict(rows=T(5, 7, 19)))
def written(ring, slot, rows):
    batch = torch.arange(ring.shape[0], device=ring.device).unsqueeze(1)
    return ring.index_put((batch, slot), rows)


@rule(
    norm_rope_append,
    name="fuse.keys",
    anchor=append,
    example=[CACHE | dict(x=T(5, 7, 19), weight=T(19), cos=T(b, 7, 3), sin=T(b, 7, 3)) for b in (5, 1)],
)
def keys(ring, slot, x, weight, cos, sin, eps: Scalar):
    return append(ring, slot, norm_rope(x, weight, eps, cos, sin))
