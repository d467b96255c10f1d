"""RoPE of trailing channels. The reference model rotates pairs by an angle each; Hugging Face has every angle twice and adds
the swapped pairs."""

import torch

from dsv4_compile.lowerings.rope import rope
from dsv4_compile.match import Made, Match, T, head, rule, shape, strip
from dsv4_compile.patterns.repeats import once, same_sizes

# queries [B, T, h, d], keys and entries [B, T, d]
QUERIES = dict(x=T(5, 7, 11, 19), cos=T(5, 7, 1, 3), sin=T(5, 7, 1, 3))
KEYS = dict(x=T(5, 7, 19), cos=T(5, 7, 3), sin=T(5, 7, 3))


def forward_or_back(match: Match) -> bool:
    """The inverse rotation is one by -sin."""
    a, sin = match.arguments, strip(match.arguments["sin"])
    a["inverse"] = head(sin) == "aten.neg" and same_sizes(shape(sin), shape(a["sin"]))
    if a["inverse"]:
        a["sin"] = sin.args[0]
        match.inner = (*match.inner, sin)
    return True


def turned(x, cos, sin):
    dr = 2 * cos.shape[-1]
    nope, pairs = x[..., :-dr], x[..., -dr:]
    a, b = pairs[..., 0::2], pairs[..., 1::2]
    return torch.cat([nope, torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)], -1)


@rule(rope, name="raise.rope", anchor="sub", example=[QUERIES, KEYS], check=forward_or_back)
def of_pairs(x, cos, sin):
    return turned(x, cos, sin)


# As Hugging Face has it: heads before tokens, and tables [B, T, dr] with every angle twice.


def beside_heads(dim: int):
    """A check that gives the op the tables of pairs, with an axis for the heads."""

    def check(match: Match) -> bool | str:
        a = match.arguments
        a["cos"], a["sin"] = once(a["cos"]), once(a["sin"])
        if not (a["cos"] and a["sin"]):
            return "cosines and sines of pairs, given twice side by side"
        forward_or_back(match)
        a |= {name: Made(lambda table: table.unsqueeze(dim), (a[name],)) for name in ("cos", "sin")}
        return True

    return check


def turned_by_swapping(x, cos, sin):
    cos, sin, dr = cos.unsqueeze(1), sin.unsqueeze(1), cos.shape[-1]
    nope, pairs = x[..., :-dr], x[..., -dr:]
    swapped = torch.stack([-pairs[..., 1::2], pairs[..., 0::2]], -1).flatten(-2)
    return torch.cat([nope, pairs * cos + swapped * sin], -1)


def tables(x: T) -> list[dict[str, T]]:
    """Positions that each row of the batch has for itself, or that all share."""
    return [dict(x=x, cos=T(B, 7, 6), sin=T(B, 7, 6)) for B in (5, 1)]


@rule(rope, name="raise.rope", anchor="neg", example=tables(T(5, 7, 11, 19)), check=beside_heads(2))
def of_swapped_pairs_of_tokens(x, cos, sin):
    return turned_by_swapping(x.transpose(1, 2), cos, sin).transpose(1, 2)


@rule(
    rope,
    name="raise.rope",
    anchor="neg",
    example=tables(T(5, 11, 7, 19)) + tables(T(5, 1, 7, 19)),
    check=beside_heads(1),
)
def of_swapped_pairs(x, cos, sin):
    return turned_by_swapping(x, cos, sin)
