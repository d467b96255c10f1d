"""Block-quantised weights, decoded in front of a matmul."""

import math

import torch
from torch.fx import Node

from dsv4_compile.lowerings.dequantize import FP8_BLOCK, MXFP4_BLOCK, NVFP4_BLOCK, dequantize
from dsv4_compile.match import Found, Match, T, finder, head, is_cast, known, rule, shape, strip, term, value
from dsv4_compile.patterns.repeats import repeats, same_repeats

E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu


@finder(dequantize, name="raise.dequantize", anchor="mul", shared=("aten.slice",))
def fp8(product: Node) -> Found | str | None:
    """weight * scale, each scale spread over 128 rows and 128 columns, what runs over cut off."""
    sides = [below_casts(o) for o in term(product).operands]
    if not (len(sides) == 2 and all(isinstance(s, Node) for s in sides)):
        return None
    weight, spread = sides if value(sides[0]).dtype == E4M3 else sides[::-1]
    if value(weight).dtype != E4M3:
        return None
    cuts = []
    while head(spread) == "aten.slice":
        cut = term(spread).literals
        if cut["dim"] not in (-1, -2) or cut["start"] != 0 or cut["step"] != 1:
            return "a scale spread over whole blocks, cut at the end of rows and columns only"
        cuts.append(spread)
        spread = spread.args[0]
    scale = strip(spread)
    *lead, rows, columns = shape(scale)
    wide = math.prod(lead) * rows
    blocks = [(wide, FP8_BLOCK, columns), (wide * FP8_BLOCK * columns, FP8_BLOCK, 1)]
    fits = all(known(b == -(-n // FP8_BLOCK)) for b, n in zip((rows, columns), shape(weight)[-2:], strict=True))
    if not (
        fits
        and known(math.prod(lead) == math.prod(shape(weight)[:-2]))
        and same_repeats(repeats(spread, scale), blocks)
    ):
        return f"one scale for each {FP8_BLOCK} x {FP8_BLOCK} block of {list(shape(weight))}"
    return Found({"weight": weight, "scale": scale}, [product], [product, *cuts])


def indexed_blocks(match: Match) -> bool | str:
    """Of the pattern below: dtypes, and as many scales as blocks."""
    for name in ("weight", "scale"):
        match.arguments[name] = below_casts(match.arguments[name])
    if match.dtype("weight") != E4M3:
        return f"weight is {match.dtype('weight')}, expected {E4M3}"
    sizes = zip(shape(match.arguments["scale"])[-2:], shape(match.arguments["weight"])[-2:], strict=True)
    return (
        all(known(b == -(-n // FP8_BLOCK)) for b, n in sizes) or f"one scale for each {FP8_BLOCK} x {FP8_BLOCK} block"
    )


@rule(
    dequantize,
    name="raise.dequantize",
    anchor="index",
    example=[
        {"weight": T(7, 11, dtype=E4M3), "scale": T(3, 5)},
        {"weight": T(13, 7, 11, dtype=E4M3), "scale": T(13, 3, 5)},
    ],
    check=indexed_blocks,
    shared=("aten.div", "aten.floor", "prims.convert_element_type"),  # the block of each row and column
)
def fp8_indexed(weight, scale):
    sizes = (torch.arange(n, dtype=torch.float32, device=weight.device) for n in weight.shape[-2:])
    row, column = ((size / FP8_BLOCK).floor().long() for size in sizes)
    return weight.float() * scale[..., row.unsqueeze(-1), column]


def below_casts(x):
    while is_cast(x):
        x = x.args[0]
    return x


def e2m1(packed, scale):
    """Two codes a byte, scaled: [..., K / 2], [..., C] -> [..., C, block]."""
    code = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
    m = (code & 7).float()
    magnitude = torch.maximum(torch.maximum(m * 0.5, m - 2), m * 2 - 8)
    value = torch.where(code > 7, -magnitude, magnitude)
    return value.unflatten(-1, (scale.shape[-1], -1)) * scale.float().unsqueeze(-1)


def blocks_of(block: int, scale_dtype: torch.dtype):
    """A check that scales lie along the columns, one for each `block` of them, and that the dtypes tell the format."""

    def check(match: Match) -> bool | str:
        scale = match.arguments["scale"] = below_casts(match.arguments["scale"])
        for name, dtype in (("weight", torch.uint8), ("scale", scale_dtype)):
            if match.dtype(name) != dtype:
                return f"{name} is {match.dtype(name)}, expected {dtype}"
        scaled = next(n for n in match.inner if head(n) == "aten.mul" and any(strip(a) is strip(scale) for a in n.args))
        by = next(a for a in scaled.args if strip(a) is strip(scale))
        C = shape(scale)[-1]
        laid_out = zip((*shape(scaled)[-2:], *shape(by)[-2:]), (C, block, C, 1), strict=True)
        if not all(known(i == j) for i, j in laid_out):
            return f"one scale for each {block} columns, not {list(shape(by))} on {list(shape(scaled))}"
        return True

    return check


def packed(*shape: int) -> T:
    return T(*shape, dtype=torch.uint8)


@rule(
    dequantize,
    name="raise.dequantize",
    anchor="bitwise_and",
    example=[
        {"weight": packed(11, 7, 15), "scale": T(11, 7, 5, dtype=E8M0)},
        {"weight": packed(7, 15), "scale": T(7, 5, dtype=E8M0)},
    ],
    check=blocks_of(MXFP4_BLOCK, E8M0),
)
def mxfp4(weight, scale):
    return e2m1(weight, scale).flatten(-2)


@rule(
    dequantize,
    name="raise.dequantize",
    anchor="bitwise_and",
    example=[
        {"weight": packed(11, 7, 15), "scale": T(11, 7, 5, dtype=E4M3), "scale_2": T(11)},
        {"weight": packed(7, 15), "scale": T(7, 5, dtype=E4M3), "scale_2": T()},
    ],
    check=blocks_of(NVFP4_BLOCK, E4M3),
)
def nvfp4(weight, scale, scale_2):
    return e2m1(weight, scale).flatten(-2) * scale_2[..., None, None]
