"""RMSNorm and RoPE in one: queries head by head and without a weight, keys with one. In a decode step, with all caches."""

import operator
from typing import Any

from torch.fx import Node

from dsv4_compile.lowerings.append import norm_rope_append
from dsv4_compile.lowerings.attention import attention
from dsv4_compile.lowerings.compressor_append import compressor_append, compressor_append_fp8
from dsv4_compile.lowerings.indexer import indexer
from dsv4_compile.lowerings.norm import rms_norm, unit_norm
from dsv4_compile.lowerings.prologue import PROLOGUES
from dsv4_compile.lowerings.rope import norm_rope, rope
from dsv4_compile.match import Found, Made, Match, Rule, Scalar, T, finder, head, rule, strip
from dsv4_compile.patterns.linear import few_on_gpu

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


# A decode step on a GPU: all that lies between its products and attention. What attention reads says what belongs together.


MEMORIES = {f"dsv4.{op.name}": op for op in (compressor_append, compressor_append_fp8)}


def of(which: int | str, *memories: Any) -> Rule:
    def step(node: Node) -> Found | str | None:
        a = attention.arguments(*node.args)
        if not few_on_gpu(a["q"], 1):
            return None
        queries, keys = strip(a["q"]), strip(a["keys"])
        if head(queries) != "dsv4.norm_rope" or head(keys) != "dsv4.norm_rope_append":
            return None
        scored = strip(a["index"]) if a["index"] is not None else None
        pools = [a["entries"], indexer.arguments(*scored.args)["keys"] if head(scored) == "dsv4.indexer" else None]
        compressors = [c for c in map(compressor_of, pools) if c is not None]
        if [MEMORIES[head(c)] for c, _ in compressors] != list(memories):
            return None
        of_queries = norm_rope.arguments(*queries.args)
        if of_queries.pop("weight") is not None:
            return "queries normed without a weight"
        arguments = {"q" if name == "x" else f"q_{name}": value for name, value in of_queries.items()}
        arguments |= norm_rope_append.arguments(*keys.args)
        outputs = [queries, keys]
        for i, (c, of_c) in enumerate(compressors):
            arguments |= {f"{name}{i}": value for name, value in memories[i].arguments(*c.args).items()}
            outputs += of_c
        inner = [queries, keys, *(n for c, of_c in compressors for n in (c, *of_c))]
        return Found(arguments, outputs, inner)

    step.__name__ = f"step_with_{which}_compressors"
    return finder(PROLOGUES[which], name="fuse.step", anchor=attention)(step)


def compressor_of(pool: Any) -> tuple[Node, list[Node]] | None:
    """The op that wrote the last entry of a pool, and its outputs, all of which are read."""
    last: Any = pool
    while isinstance(last, Node) and (head(last) == "aten.slice" or strip(last) is not last):
        last = last.args[0]
    if not isinstance(last, Node) or last.target is not operator.getitem:
        return None
    written: Any = last.args[0]
    by_place = {user.args[1]: user for user in written.users}
    if head(written) not in MEMORIES:
        return None
    count = len(MEMORIES[head(written)].outputs)
    return (written, [by_place[i] for i in range(count)]) if len(by_place) == len(written.users) == count else None


STEPS = (
    of("2_fp8", compressor_append, compressor_append_fp8),
    *(of(count, *[compressor_append] * count) for count in (2, 1, 0)),
)
