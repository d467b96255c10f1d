"""Wrong rewrites to plant where keys are rows of bytes: see tests/faults.py, which is loaded before, under its name."""

import torch
from faults import BY_NAME, changed, fault


def with_bytes(rows, start, last, change):
    """Rows some bytes of which are something else."""
    return torch.cat([rows[..., :start], change(rows[..., start:last]), rows[..., last:]], -1)


@fault("pack_kv")
def scale_of_the_power_above(right, a):
    start = a["x"].shape[-1] + a["rope"]
    return with_bytes(right(**a), start, start + 1, lambda exponent: exponent + 1)


@fault("pack_kv")
def rotary_channels_of_eight_bits(right, a):
    x, dr = a["x"], a["rope"]
    return right(torch.cat([x[..., :-dr], x[..., -dr:].to(torch.float8_e4m3fn).to(x.dtype)], -1), dr)


changed("pack_kv", "a tenth is cut off", x=lambda a: a["x"] * 0.9)


@fault("unpack_kv")
def codes_without_their_scale(right, a):
    start = a["width"] + a["rope"]
    rows = with_bytes(a["rows"], start, a["rows"].shape[-1], lambda exponent: torch.full_like(exponent, 127))
    return right(rows, a["width"], a["rope"])


@fault("unpack_kv")
def bytes_of_rotary_channels_in_reverse(right, a):
    first, dr = a["width"] - a["rope"], a["rope"]
    rows = with_bytes(a["rows"], first, first + 2 * dr, lambda x: x.unflatten(-1, (dr, 2)).flip(-1).flatten(-2))
    return right(rows, a["width"], dr)


@fault("norm_rope_append")
def a_row_without_its_scales(right, a):
    start = a["x"].shape[-1] + 2 * a["cos"].shape[-1]
    return with_bytes(right(**a), start, a["ring"].shape[-1], torch.zeros_like)


@fault("norm_rope_append")
def rows_of_bytes_before_the_turn(right, a):
    return right(**(a | {"sin": torch.zeros_like(a["sin"]), "cos": torch.ones_like(a["cos"])}))


@fault("compressor_append")
def entries_normed_behind_the_rounding(right, a):
    values, gates, entries = right(**a)
    dr, size = 2 * a["cos"].shape[-1], a["weight"].shape[0]
    e = BY_NAME["unpack_kv"].meaning(entries, size, dr)
    return values, gates, BY_NAME["pack_kv"].meaning(e * 1.2, dr)


@fault("attention")
def scales_of_another_row(right, a):
    start = a["q"].shape[-1] + a["stored"]
    mixed = a["keys"].clone()
    mixed[..., start:] += (torch.arange(mixed.shape[1]) % 2).to(torch.uint8).unsqueeze(-1)
    return right(**(a | {"keys": mixed}))


@fault("attention", implementation=True)
def entries_of_the_next_place(right, a):
    return right(**(a | {"entries": a["entries"].roll(1, 1)}))
