"""A compressor that writes its rows before it reads them, and its entries behind: that of a decode step."""

import torch

from dsv4_compile.lowerings.append import append
from dsv4_compile.lowerings.compressor import compressor
from dsv4_compile.lowerings.compressor_append import compressor_append, compressor_append_fp8, quantized
from dsv4_compile.lowerings.kv import pack_kv
from dsv4_compile.match import Int, Match, Scalar, T, rule
from dsv4_compile.patterns.append import by_position, turned_as_stored
from dsv4_compile.patterns.compressor import ROWS, overlapping, separate

# 5 tokens in 4 sequences, 11 windows of 10 rows, 19 channels; rings of 17 rows, 13 entries, 7 places in a window.
LISTS = {"slot": T(4, 5, dtype=torch.int64), "place": T(4, 5, dtype=torch.int64), "target": T(4, 11, dtype=torch.int64)}


def memory(C):
    rows = {name: T(4, 17, C) for name in ("values", "gates")} | {name: T(4, 5, C) for name in ("c", "z")}
    return ROWS | LISTS | rows | {"ape": T(7, C), "entries": T(4, 13, 19)}


def positions(match: Match) -> None:
    by_position(match, "slot", "values", 1)
    by_position(match, "place", "ape", 0)


def with_overlap(match: Match) -> bool:
    positions(match)
    return overlapping(match)


def without_overlap(match: Match) -> bool:
    positions(match)
    return separate(match)


def compressed(values, gates, slot, c, z, ape, place, *of_windows):
    """Both rings after the new rows, and what closed windows become."""
    values, gates = append(values, slot, c), append(gates, slot, z + ape[place])
    return values, gates, compressor(values, gates, *of_windows)


def step(values, gates, entries, slot, c, z, ape, place, index, weight, cos, sin, target, eps, overlap):
    of_windows = index, weight, cos, sin, eps, overlap
    values, gates, e = compressed(values, gates, slot, c, z, ape, place, *of_windows)
    return values, gates, append(entries, target, e)


@rule(compressor_append, name="fuse.entries", anchor=compressor, example=memory(38), check=with_overlap)
def overlap(values, gates, entries, slot, c, z, ape, place, index, weight, cos, sin, target, eps: Scalar):
    return step(values, gates, entries, slot, c, z, ape, place, index, weight, cos, sin, target, eps, True)


@rule(compressor_append, name="fuse.entries", anchor=compressor, example=memory(19), check=without_overlap)
def plain(values, gates, entries, slot, c, z, ape, place, index, weight, cos, sin, target, eps: Scalar):
    return step(values, gates, entries, slot, c, z, ape, place, index, weight, cos, sin, target, eps, False)


# With entries in bytes: 48 of 19 channels, 6 of them rotary


def memory_in_bytes(C):
    return memory(C) | {"entries": T(4, 13, 48, dtype=torch.uint8), "rope": 6}


def overlap_in_bytes(match: Match) -> bool:
    return turned_as_stored(match) and with_overlap(match)


def plain_in_bytes(match: Match) -> bool:
    return turned_as_stored(match) and without_overlap(match)


def step_in_bytes(values, gates, entries, slot, c, z, ape, place, index, weight, cos, sin, target, eps, overlap, rope):
    of_windows = index, weight, cos, sin, eps, overlap
    values, gates, e = compressed(values, gates, slot, c, z, ape, place, *of_windows)
    return values, gates, append(entries, target, pack_kv(e, rope))


@rule(compressor_append, name="fuse.entries", anchor=compressor, example=memory_in_bytes(38), check=overlap_in_bytes)
def stored_overlap(
    values, gates, entries, slot, c, z, ape, place, index, weight, cos, sin, target, rope: Int, eps: Scalar
):
    return step_in_bytes(
        values, gates, entries, slot, c, z, ape, place, index, weight, cos, sin, target, eps, True, rope
    )


@rule(compressor_append, name="fuse.entries", anchor=compressor, example=memory_in_bytes(19), check=plain_in_bytes)
def stored_plain(
    values, gates, entries, slot, c, z, ape, place, index, weight, cos, sin, target, rope: Int, eps: Scalar
):
    return step_in_bytes(
        values, gates, entries, slot, c, z, ape, place, index, weight, cos, sin, target, eps, False, rope
    )


# With entries in e4m3, each with a scale


def scaled_memory(C):
    return memory(C) | {"entries": T(4, 13, 19, dtype=torch.float8_e4m3fn), "scales": T(4, 13, 1)}


def scaled_step(values, gates, entries, scales, slot, c, z, ape, place, index, weight, cos, sin, target, eps, overlap):
    of_windows = index, weight, cos, sin, eps, overlap
    values, gates, e = compressed(values, gates, slot, c, z, ape, place, *of_windows)
    codes, scale = quantized(e)
    return values, gates, append(entries, target, codes), append(scales, target, scale)


@rule(compressor_append_fp8, name="fuse.entries", anchor=compressor, example=scaled_memory(38), check=with_overlap)
def scaled_overlap(
    values, gates, entries, scales, slot, c, z, ape, place, index, weight, cos, sin, target, eps: Scalar
):
    return scaled_step(
        values, gates, entries, scales, slot, c, z, ape, place, index, weight, cos, sin, target, eps, True
    )


@rule(compressor_append_fp8, name="fuse.entries", anchor=compressor, example=scaled_memory(19), check=without_overlap)
def scaled_plain(values, gates, entries, scales, slot, c, z, ape, place, index, weight, cos, sin, target, eps: Scalar):
    return scaled_step(
        values, gates, entries, scales, slot, c, z, ape, place, index, weight, cos, sin, target, eps, False
    )
