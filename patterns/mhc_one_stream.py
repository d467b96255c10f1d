"""mHC with one stream: the mixture after a block is no matrix product then, but two rows, each times a number, added."""

import math
import operator
from collections.abc import Iterator
from typing import Any

from torch.fx import Node

from dsv4_compile.lowerings.mhc import mhc_post, mhc_pre
from dsv4_compile.match import Found, Made, finder, head, is_tensor, known, same_elements, shape, strip, term, users


@finder(mhc_post, name="fuse.mhc", anchor=mhc_pre)
def post_of_one(node: Node) -> Found | None:
    """Any sum of two scaled rows looks so: this one is told by its factors, which `mhc_pre` made of the stream."""
    X = term(node).operands[0]
    factors = {u.args[1]: u for u in node.users if u.target is operator.getitem}
    if not (known(shape(X)[-2] == 1) and {1, 2} <= factors.keys()):
        return None
    for of_block, y in scaled(factors[1], X):
        for of_stream, x in scaled(factors[2], X):
            sums = [u for u in users(of_block) if u in set(users(of_stream)) and head(u) == "aten.add" and rows(u, X)]
            if same_elements(x, X) and len(sums) == 1 and term(sums[0]).commutes:
                arguments = {"X": X, "y": Made(as_input, (y, X)), "post": factors[1], "comb": factors[2]}
                return Found(arguments, sums, [of_block, of_stream, *sums])
    return None


def as_input(y: Any, X: Any) -> Any:
    return y.reshape(*X.shape[:-2], X.shape[-1])


def scaled(factor: Node, X: Node) -> Iterator[tuple[Node, Node]]:
    """Products of one factor a token and rows like the stream's, with the rows."""
    for product in readers(factor):
        if head(product) == "aten.mul" and rows(product, X):
            for row, by in (term(product).operands, term(product).operands[::-1]):
                alike = is_tensor(by) and bare(by) is factor and known(sum(shape(by)[-channels(product) :][:1]) == 1)
                if alike and is_tensor(row) and rows(row, X):
                    yield product, unmoved(row)


def readers(x: Node) -> Iterator[Node]:
    """Who reads x, through permutations that keep all in order too: einsum moves axes of size 1 about."""
    for user in users(x):
        yield from readers(user) if in_order(user) else (user,)


def bare(x: Any) -> Node:
    """What x was before views, casts and such permutations."""
    while in_order(strip(x)):
        x = strip(x).args[0]
    return strip(x)


def unmoved(x: Any) -> Node:
    """x before such permutations."""
    while in_order(x):
        x = x.args[0]
    return x


def in_order(x: Any) -> bool:
    if head(x) != "aten.permute":
        return False
    long = [d for d in x.args[1] if not known(shape(x.args[0])[d] == 1)]
    return long == sorted(long)


def rows(x: Node, X: Node) -> bool:
    """Whether x has a row for each of the stream's."""
    return known(shape(x)[-channels(x)] == shape(X)[-1]) and known(math.prod(shape(x)) == math.prod(shape(X)))


def channels(x: Node) -> int:
    """Which axis of x is the last that is longer than 1, counted from the end."""
    axes = range(1, len(shape(x)) + 1)
    return next((i for i in axes if not known(shape(x)[-i] == 1)), 1)
