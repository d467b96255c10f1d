"""Rows written into a cache by batch and slot; functionalisation has made a new cache of it."""

import torch

from dsv4_compile.lowerings.append import append, norm_rope_append
from dsv4_compile.lowerings.kv import pack_kv
from dsv4_compile.lowerings.rope import norm_rope
from dsv4_compile.match import Int, Made, Match, Scalar, T, head, known, rule, shape, term

CACHE = dict(ring=T(5, 11, 19), slot=T(5, 7, dtype=torch.int64))


@rule(append, name="fuse.append", anchor="index_put", example=CACHE | dict(rows=T(5, 7, 19)))
def written(ring, slot, rows):
    batch = torch.arange(ring.shape[0], device=ring.device).unsqueeze(1)
    return ring.index_put((batch, slot), rows)


def for_all_sequences(match: Match) -> bool:
    """One list of slots, as Hugging Face's static caches have it."""
    a = match.arguments
    a["slot"] = Made(lambda slot, ring: slot.expand(ring.shape[0], -1), (a["slot"], a["ring"]))
    return True


@rule(
    append,
    name="fuse.append",
    anchor="index_put",
    example=dict(ring=T(5, 11, 19), slot=T(7, dtype=torch.int64), rows=T(5, 7, 19)),
    check=for_all_sequences,
)
def copied(ring, slot, rows):
    return ring.index_copy(1, slot, rows)


def by_position(match: Match, index: str, rows: str, axis: int) -> None:
    """Give an op that takes its argument `index` modulo the size of an axis of `rows` what the graph took so."""
    given = match.arguments[index]
    if head(given) != "aten.remainder":
        return
    (position, *others), literals = term(given).operands, term(given).literals
    if not others and known(literals["other"] == shape(match.arguments[rows])[axis]):
        match.arguments[index] = position
        match.inner = (*match.inner, given)


def round_the_ring(match: Match) -> bool:
    by_position(match, "slot", "ring", 1)
    return True


@rule(
    norm_rope_append,
    name="fuse.keys",
    anchor=append,
    check=round_the_ring,
    example=[CACHE | dict(x=T(5, 7, 19), weight=T(19), cos=T(b, 7, 3), sin=T(b, 7, 3)) for b in (5, 1)],
)
def keys(ring, slot, x, weight, cos, sin, eps: Scalar):
    return append(ring, slot, norm_rope(x, weight, eps, cos, sin))


# With rows in bytes: 48 of 19 channels, 6 of them rotary


def turned_as_stored(match: Match) -> bool:
    """Whether the channels that rows in bytes keep as rotary are those that are turned."""
    a = match.arguments
    return known(a.pop("rope") == 2 * shape(a["cos"])[-1])


def in_bytes(match: Match) -> bool:
    return turned_as_stored(match) and round_the_ring(match)


@rule(
    norm_rope_append,
    name="fuse.keys",
    anchor=append,
    check=in_bytes,
    example=[
        dict(ring=T(5, 11, 48, dtype=torch.uint8), slot=CACHE["slot"], x=T(5, 7, 19), weight=T(19), rope=6)
        | dict(cos=T(b, 7, 3), sin=T(b, 7, 3))
        for b in (5, 1)
    ],
)
def keys_in_bytes(ring, slot, x, weight, cos, sin, rope: Int, eps: Scalar):
    return append(ring, slot, pack_kv(norm_rope(x, weight, eps, cos, sin), rope))
