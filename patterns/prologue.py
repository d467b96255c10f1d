"""RMSNorm and RoPE in one: queries head by head and without a weight, keys with one."""

from dsv4_compile.lowerings.norm import rms_norm, unit_norm
from dsv4_compile.lowerings.rope import norm_rope, rope
from dsv4_compile.match import Made, Match, Scalar, T, rule

B = 5  # rows of the batch


def tables(b: int, tokens: int, **rows: T) -> dict[str, T]:
    return rows | dict(cos=T(b, tokens, 3), sin=T(b, tokens, 3))


def rows(b: int, tokens: int) -> list[dict[str, T]]:
    """Of all tokens, or row by row of the batch; tables for b of those."""
    return [tables(b, tokens, x=x, weight=T(19)) for x in (T(B * tokens, 19), T(B, tokens, 19))]


def unweighted(match: Match) -> bool:
    match.arguments["weight"] = None
    return True


@rule(
    norm_rope,
    name="fuse.prologue",
    anchor=rope,
    example=dict(x=T(B, 7, 11, 19), cos=T(B, 7, 1, 3), sin=T(B, 7, 1, 3)),
    check=unweighted,
)
def queries(x, cos, sin, eps: Scalar):
    return rope(unit_norm(x, eps), cos, sin, False)


def in_batch(match: Match) -> bool:
    """The norm is over tokens, wherever they come from."""
    a = match.arguments
    a["x"] = Made(lambda x, cos: x.reshape(-1, cos.shape[-2], x.shape[-1]), (a["x"], a["cos"]))
    return True


def normed(x, weight, cos, eps, *heads):
    return rms_norm(x, weight, eps).view(B, cos.shape[1], *heads, -1)


@rule(
    norm_rope,
    name="fuse.prologue",
    anchor=rope,
    example=rows(B, 7),
    check=in_batch,
)
def keys(x, weight, cos, sin, eps: Scalar):
    return rope(normed(x, weight, cos, eps), cos, sin, False)


# As Hugging Face has it: heads before tokens in between, and tables that rows of a batch may share.


def tokens_first(match: Match) -> bool:
    a = match.arguments
    a |= {name: Made(lambda table: table.unsqueeze(2), (a[name],)) for name in ("cos", "sin")}
    return unweighted(match)


@rule(
    norm_rope,
    name="fuse.prologue",
    anchor=rope,
    example=[tables(b, 7, x=T(B, 7, 11, 19)) for b in (B, 1)],
    check=tokens_first,
)
def queries_of_heads(x, cos, sin, eps: Scalar):
    return rope(unit_norm(x.transpose(1, 2), eps), cos.unsqueeze(1), sin.unsqueeze(1), False).transpose(1, 2)


@rule(
    norm_rope,
    name="fuse.prologue",
    anchor=rope,
    example=rows(B, 7) + rows(1, 7) + rows(B, 1) + rows(1, 1),  # of one token the transposition is none
    check=in_batch,
)
def keys_of_one_head(x, weight, cos, sin, eps: Scalar):
    one = normed(x, weight, cos, eps, 1).transpose(1, 2)
    return rope(one, cos.unsqueeze(1), sin.unsqueeze(1), False)
