"""The numerics contract: what every op promises about its numbers, however it is run.

`CONTRACTS` is one table: dtypes of the outputs, where sums are accumulated and in which order, what happens to ties, how
far two correct implementations may lie apart, and what inputs look like when an op is tried out. `verify`, `shadow` and
the tests read their tolerances here and nowhere else. VERSION changes with the meaning of the table; the digest of the
table is part of the identity of every compiled graph.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from dsv4_compile.lowerings.kv import layout, pack_kv, unpack_kv
from dsv4_compile.op import Tensor

VERSION = 1
PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Largest difference of two correct results, over the largest number in the output. Sums of K products in another order
# differ by about sqrt(K) roundings; in bf16 also every intermediate value of the plain graph is rounded, the op's is not.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}


# What inputs look like


@dataclass(frozen=True)
class Normal:
    """Standard normal times `scale`; `spread`: rows (last axis) of sizes from 1/1000 to 3, where an eps shows."""

    scale: float = 1.0
    spread: bool = False

    def draw(self, shape: tuple[int, ...], g: torch.Generator, sizes: Mapping[str, tuple[int, ...]]) -> Tensor:
        x = torch.randn(shape, generator=g, dtype=torch.float64) * self.scale
        if self.spread and len(shape) > 1:
            x = x * 10 ** (torch.rand(*shape[:-1], 1, generator=g, dtype=torch.float64) * 3.5 - 3)
        return x


@dataclass(frozen=True)
class Uniform:
    """Between `low` and `high`."""

    low: float
    high: float

    def draw(self, shape: tuple[int, ...], g: torch.Generator, sizes: Mapping[str, tuple[int, ...]]) -> Tensor:
        return torch.rand(shape, generator=g, dtype=torch.float64) * (self.high - self.low) + self.low


@dataclass(frozen=True)
class Matrix:
    """A weight [..., N, K] whose products with standard normal vectors have standard deviation `gain`."""

    gain: float = 1.0

    def draw(self, shape: tuple[int, ...], g: torch.Generator, sizes: Mapping[str, tuple[int, ...]]) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64) * self.gain / math.sqrt(shape[-1] if shape else 1)


@dataclass(frozen=True)
class Scale:
    """A block's scale: a power of two, which every format holds and by which products are exact."""

    low: int = -4
    high: int = 0

    def draw(self, shape: tuple[int, ...], g: torch.Generator, sizes: Mapping[str, tuple[int, ...]]) -> Tensor:
        return 2.0 ** torch.randint(self.low, self.high + 1, shape, generator=g).double()


@dataclass(frozen=True)
class Rows:
    """Indices into axis `axis` of another argument; `none`: some are -1, the first of a list never."""

    of: str
    axis: int
    none: bool = False

    def draw(self, shape: tuple[int, ...], g: torch.Generator, sizes: Mapping[str, tuple[int, ...]]) -> Tensor:
        index = torch.randint(0, sizes[self.of][self.axis], shape, generator=g)
        if self.none:
            absent = torch.rand(shape, generator=g) < 0.3
            absent[..., :1] = False
            index = index.masked_fill(absent, -1)
        return index


@dataclass(frozen=True)
class Slots:
    """Distinct indices [B, T] into axis 1 of another argument."""

    of: str

    def draw(self, shape: tuple[int, ...], g: torch.Generator, sizes: Mapping[str, tuple[int, ...]]) -> Tensor:
        places = torch.rand(*shape[:-1], sizes[self.of][1], generator=g).argsort(-1)
        return places.repeat(1, -(-shape[-1] // places.shape[-1]))[..., : shape[-1]]


@dataclass(frozen=True)
class Windows:
    """Lists [..., R] of consecutive rows of axis 1 of another argument. Some windows miss their oldest rows, some are open:
    all -1."""

    of: str

    def draw(self, shape: tuple[int, ...], g: torch.Generator, sizes: Mapping[str, tuple[int, ...]]) -> Tensor:
        R = shape[-1]
        first = torch.randint(0, sizes[self.of][1], (*shape[:-1], 1), generator=g)
        place = torch.arange(R)
        kind = torch.randint(0, 4, (*shape[:-1], 1), generator=g)
        kind.view(-1)[:1] = 1
        missing = torch.where(kind == 0, R, torch.where(kind == 1, R // 2, 0))
        return torch.where(place < missing, -1, (first + place) % sizes[self.of][1])


@dataclass(frozen=True)
class Ends:
    """Where consecutive groups of the rows of another argument end; some groups are empty."""

    of: str

    def draw(self, shape: tuple[int, ...], g: torch.Generator, sizes: Mapping[str, tuple[int, ...]]) -> Tensor:
        M = sizes[self.of][0]
        ends = torch.randint(0, M + 1, shape, generator=g).sort(-1).values
        ends[..., -1] = M
        return ends


@dataclass(frozen=True)
class Mask:
    """0 where a query reads a row, else the lowest number of fp16, which is below all logits; the first row is read."""

    def draw(self, shape: tuple[int, ...], g: torch.Generator, sizes: Mapping[str, tuple[int, ...]]) -> Tensor:
        absent = torch.rand(shape, generator=g) < 0.4
        absent[..., :1] = False
        return absent.double() * torch.finfo(torch.float16).min


@dataclass(frozen=True)
class Distinct:
    """Rows without ties: an even grid from -3 to 3 in random order. `tied`: on a grid so coarse that there are many."""

    tied: bool = False

    def draw(self, shape: tuple[int, ...], g: torch.Generator, sizes: Mapping[str, tuple[int, ...]]) -> Tensor:
        place = torch.rand(shape, generator=g).argsort(-1).double()
        x = place / max(shape[-1] - 1, 1) * 6 - 3
        return x.round() if self.tied else x


@dataclass(frozen=True)
class Counts:
    """How many rows of axis `axis` of another argument: none to all."""

    of: str
    axis: int

    def draw(self, shape: tuple[int, ...], g: torch.Generator, sizes: Mapping[str, tuple[int, ...]]) -> Tensor:
        return torch.randint(0, sizes[self.of][self.axis] + 1, shape, generator=g)


@dataclass(frozen=True)
class Facing:
    """Standard normal, but every entry is seen by the first head, for where all its ReLUs are zero it ties: of `queries`, that
    head looks along the first channel; else that channel is positive."""

    queries: bool = False

    def draw(self, shape: tuple[int, ...], g: torch.Generator, sizes: Mapping[str, tuple[int, ...]]) -> Tensor:
        x = torch.randn(shape, generator=g, dtype=torch.float64)
        if self.queries and len(shape) > 1:
            x[..., 0, 1:] = 0
            x[..., 0, :1] = x[..., 0, :1].abs() + 0.1
        else:
            x[..., :1] = x[..., :1].abs() + 0.1
        return x


@dataclass(frozen=True)
class InBytes:
    """Rows of keys: standard normal, and in bytes, as `pack_kv` makes them, where they are longer than the last axis of
    argument `width`, or than that number. Of their channels `per` times the last axis of argument `rope` are rotary."""

    width: str
    rope: str
    per: int = 2

    def draw(self, shape: tuple[int, ...], g: torch.Generator, sizes: Mapping[str, tuple[int, ...]]) -> Tensor:
        width = sizes[self.width][-1]
        x = torch.randn(*shape[:-1], width, generator=g, dtype=torch.float64)
        return x if shape[-1] == width else pack_kv.meaning(x.float(), self.per * sizes[self.rope][-1])

    def read(self, rows: Tensor, sizes: Mapping[str, tuple[int, ...]]) -> tuple[tuple[Tensor, float], ...]:
        """The numbers that they stand for, those of 8 bits and of 16, each with the share of the largest by which two that
        differ little are rounded apart."""
        width, rope = sizes[self.width][-1], self.per * sizes[self.rope][-1]
        plain, turned = unpack_kv.meaning(rows, width, rope).split([width - rope, rope], -1)
        return (plain, 2.0**-3), (turned, 2.0**-7)  # with scales of powers of two the largest may be 8 steps

    def filling(self, rows: Tensor, sizes: Mapping[str, tuple[int, ...]]) -> Tensor:
        """The bytes at the end that stand for nothing."""
        width, rope = sizes[self.width][-1], self.per * sizes[self.rope][-1]
        return rows[..., width + rope + layout(width, rope)[0] :]


ONE_STEP = 0.0715  # of e4m3, where numbers that differ little are rounded apart: 32 of 448

Draw = Normal | Uniform | Matrix | Scale | Rows | Slots | Windows | Ends | Counts | Facing | Mask | Distinct | InBytes


# What is promised


@dataclass(frozen=True)
class Contract:
    """outputs: dtype of each: "x" that of argument x; "acc x" that, but at least fp32; of several arguments the widest; a
    dtype by name; or "x, acc x if wide & 4": another one if that bit of an integer is set. accumulate: the dtype of sums.
    order: of reductions. ties: which of equal candidates is taken. sets: the last axis of integers is a set, in any order.
    tolerance: as TOLERANCE, where the op differs from it. draws: inputs by argument. ties_draws: inputs with ties. in_bytes:
    what outputs of uint8 stand for."""

    outputs: tuple[str, ...]
    accumulate: str = "at least fp32"
    order: str = "any"
    ties: str = ""
    sets: bool = False
    tolerance: Mapping[torch.dtype, float] = field(default_factory=dict)
    draws: Mapping[str, Draw] = field(default_factory=dict)
    ties_draws: Mapping[str, Draw] = field(default_factory=dict)
    in_bytes: InBytes | None = None

    def allowed(self, dtype: torch.dtype) -> float:
        """How far two results may lie apart when the narrowest plain input is of this dtype."""
        return self.tolerance.get(dtype, TOLERANCE.get(dtype, TOLERANCE[torch.float32]))

    def output_dtypes(self, arguments: Mapping[str, Any]) -> tuple[torch.dtype, ...]:
        """The dtypes that these arguments lead to."""
        return tuple(_dtype(o, arguments) for o in self.outputs)


def _dtype(text: str, arguments: Mapping[str, Any]) -> torch.dtype:
    text, _, other = text.partition(", ")
    if other:
        name, bit = other.partition(" if ")[2].split(" & ")
        text = other.partition(" if ")[0] if arguments[name] & int(bit) else text
    if isinstance(named := getattr(torch, text, None), torch.dtype):
        return named
    words = text.split()
    wide = words[0] == "acc"
    dtypes = [arguments[name].dtype for name in words[wide:]]
    result = dtypes[0]
    for other in [*dtypes[1:], *([torch.float32] if wide else [])]:
        result = torch.promote_types(result, other)
    return result


EXACT_PRODUCTS = {torch.float64: 1e-6, torch.float32: 1e-6}  # fp32 whatever the inputs are
STORED: dict[str, Draw] = {
    "w1": Matrix(8.0),
    "w3": Matrix(8.0),
    "w2": Matrix(),
    "s1": Scale(),
    "s3": Scale(),
    "s2": Scale(),
}
MIXED: dict[str, Draw] = {"post": Uniform(0.0, 2.0), "comb": Uniform(0.0, 1.0)}
ENTERED: dict[str, Draw] = {"fn": Matrix(), "scale": Uniform(0.5, 2.0), "weight": Uniform(0.5, 1.5)}
SCALES_2: dict[str, Draw] = {f"t{i}": Scale(-1, 1) for i in (1, 2, 3)}

NORMED: dict[str, Draw] = {"x": Normal(spread=True), "norm": Uniform(0.5, 1.5)}


def several(count: int) -> dict[str, Draw]:
    """So many stored matrices."""
    draws: dict[str, Draw] = {f"w{i}": Matrix(8.0) for i in range(count)}
    return draws | {f"s{i}": Scale() for i in range(count)}


RING = InBytes("x", "cos")
STORED_ROWS = InBytes("q", "stored", 1)
KEYS: dict[str, Draw] = {
    "ring": RING,
    "slot": Slots("ring"),
    "x": Normal(spread=True),
    "weight": Uniform(0.5, 1.5),
    "cos": Uniform(-1, 1),
    "sin": Uniform(-1, 1),
}


def memory(which: str) -> dict[str, Draw]:
    """Of a compressor, by the number behind its names."""
    return {
        f"entries{which}": InBytes(f"weight{which}", f"cos{which}"),
        f"slot{which}": Slots(f"values{which}"),
        f"place{which}": Rows(f"ape{which}", 0),
        f"index{which}": Windows(f"values{which}"),
        f"target{which}": Slots(f"entries{which}"),
        f"weight{which}": Uniform(0.5, 1.5),
        f"cos{which}": Uniform(-1, 1),
        f"sin{which}": Uniform(-1, 1),
    }


CONTRACTS: dict[str, Contract] = {
    "dequantize": Contract(
        ("float32",),
        accumulate="no sums; scales multiply from the finest to the coarsest",
        tolerance=EXACT_PRODUCTS,
        draws={"weight": Normal(4.0), "scale": Scale(), "scale_2": Scale(-1, 1)},
    ),
    "linear": Contract(
        ("x",),
        accumulate="products in x's dtype at least",
        draws={"weight": Matrix(8.0), "scale": Scale(), "scale_2": Scale(-1, 1)},
    ),
    "shared_expert": Contract(
        ("gate",),
        accumulate="products in gate's dtype at least, rounded to it; then the sum in fp32",
        draws={
            **dict.fromkeys(("gate", "up"), Normal(2.0)),
            **MIXED,
            "weight": Matrix(8.0),
            "scale": Scale(),
            "scale_2": Scale(-1, 1),
        },
    ),
    "experts": Contract(
        ("x",),
        accumulate="as router, moe and shared_expert",
        draws={
            **STORED,
            **MIXED,
            **SCALES_2,
            **{f"v{i}": Matrix(8.0) for i in (1, 2, 3)},
            **{f"r{i}": Scale() for i in (1, 2, 3)},
            **{f"u{i}": Scale(-1, 1) for i in (1, 2, 3)},
            "logits": Distinct(),
            "bias": Normal(0.3),
            "expert": Rows("w1", 0),
            "token": Rows("expert", 0),
        },
    ),
    "grouped_linear": Contract(
        ("x",),
        accumulate="products in x's dtype at least",
        draws={"weight": Matrix(8.0), "scale": Scale(), "scale_2": Scale(-1, 1)},
    ),
    "output_projection": Contract(
        ("x",),
        accumulate="products in x's dtype at least",
        draws={
            "a": Matrix(8.0),
            "b": Matrix(8.0),
            **dict.fromkeys(("a_scale", "b_scale"), Scale()),
            **dict.fromkeys(("a_scale_2", "b_scale_2"), Scale(-1, 1)),
        },
    ),
    "linear_wide": Contract(("acc x",), draws={"weight": Matrix(8.0)}),
    **{
        f"linears_{count}": Contract(
            tuple(f"x, acc x if wide & {1 << i}" for i in range(count)),
            accumulate="products in x's dtype at least",
            draws=several(count),
        )
        for count in range(2, 8)
    },
    **{
        f"normed_linears_{count}": Contract(
            tuple(f"x, acc x if wide & {1 << i}" for i in range(count)),
            accumulate="products in x's dtype at least; the norm in at least fp32, rounded to x's dtype",
            draws={**NORMED, **several(count)},
        )
        for count in (1, 2)
    },
    "grouped_mm": Contract(("x",), draws={"w": Matrix(), "ends": Ends("x")}),
    "softmax": Contract(("x",), order="maximum first, then sum", draws={"x": Normal(4.0)}),
    "silu": Contract(("x",), draws={"x": Normal(8.0)}),
    "softplus": Contract(("x",), draws={"x": Normal(16.0)}),
    "swiglu": Contract(("gate up",), draws={"gate": Normal(8.0), "up": Normal(8.0)}),
    "rms_norm": Contract(("x",), draws={"x": Normal(spread=True), "weight": Uniform(0.5, 1.5)}),
    "unit_norm": Contract(("x",), draws={"x": Normal(spread=True)}),
    "rope": Contract(("x",), accumulate="no sums", draws={"cos": Uniform(-1, 1), "sin": Uniform(-1, 1)}),
    "norm_rope": Contract(
        ("x",),
        draws={
            "x": Normal(spread=True),
            "weight": Uniform(0.5, 1.5),
            "cos": Uniform(-1, 1),
            "sin": Uniform(-1, 1),
        },
    ),
    "append": Contract(("ring",), accumulate="no sums", draws={"slot": Slots("ring")}),
    "norm_rope_append": Contract(("ring",), draws=KEYS, in_bytes=RING),
    "pack_kv": Contract(
        ("uint8",), accumulate="no sums", draws={"x": Normal(spread=True)}, in_bytes=InBytes("x", "rope", 1)
    ),
    "unpack_kv": Contract(("float32",), accumulate="no sums", draws={"rows": InBytes("width", "rope", 1)}),
    "sinkhorn": Contract(
        ("acc logits",), order="rows, then columns and rows in turn, columns last", draws={"logits": Normal(2.0)}
    ),
    "mhc_pre": Contract(
        ("X", "acc X", "acc X"),
        order="rows, then columns and rows in turn, columns last",
        draws={"X": Normal(spread=True), "fn": Matrix(), "scale": Uniform(0.5, 2.0)},
    ),
    "mhc_post": Contract(("X",), draws=MIXED),
    "mhc_head": Contract(("X",), draws={"X": Normal(spread=True), "fn": Matrix(), "scale": Uniform(0.5, 2.0)}),
    "mhc_enter": Contract(
        ("X", "acc X", "acc X"),
        order="rows, then columns and rows in turn, columns last",
        draws={**ENTERED, "X": Normal(spread=True)},
    ),
    "mhc_boundary": Contract(
        ("X", "X", "acc X", "acc X"),
        order="rows, then columns and rows in turn, columns last",
        draws={**ENTERED, "X": Normal(spread=True), "y": Normal(spread=True), **MIXED},
    ),
    "head": Contract(
        ("X, acc X if exact & 1",),
        draws={"X": Normal(spread=True), **ENTERED, "vocabulary": Matrix()},
    ),
    "mtp_join": Contract(
        ("X",),
        draws={
            "e": Normal(spread=True),
            "X": Normal(spread=True),
            **{f"{s}_norm": Uniform(0.5, 1.5) for s in "eh"},
            **{f"{s}_weight": Matrix() for s in "eh"},
            **{f"{s}_scale": Scale() for s in "eh"},
        },
    ),
    "router": Contract(
        ("int64", "acc logits"),
        ties="the lower index",
        draws={"logits": Distinct(), "bias": Normal(0.3)},
        ties_draws={"logits": Distinct(tied=True), "bias": Uniform(0.0, 0.0)},
    ),
    "expert_gates": Contract(("acc logits",), draws={"logits": Distinct(), "expert": Rows("logits", -1)}),
    "moe": Contract(
        ("acc x gate",),
        accumulate="products in x's dtype at least, all else at least fp32",
        order="a token's choices in their order",
        draws={"expert": Rows("w1", 0), "gate": Uniform(0.0, 1.0), **STORED, **SCALES_2},
    ),
    "compressor": Contract(
        ("acc c",),
        order="maximum first, then sums over a window's rows",
        draws={"index": Windows("c"), "weight": Uniform(0.5, 1.5), "cos": Uniform(-1, 1), "sin": Uniform(-1, 1)},
    ),
    "compressor_append_fp8": Contract(
        ("values", "gates", "entries", "scales"),
        order="maximum first, then sums over a window's rows",
        draws=memory("") | {"scales": Scale()},
    ),
    "compressor_append": Contract(
        ("values", "gates", "entries"),
        order="maximum first, then sums over a window's rows",
        draws=memory(""),
        in_bytes=InBytes("weight", "cos"),
    ),
    **{
        f"prologue_{name}": Contract(
            ("q", "ring", *outputs),
            order="as norm_rope, norm_rope_append and compressor_append",
            draws={
                **KEYS,
                "q": Normal(spread=True),
                **{n: d for i in range(int(name[0])) for n, d in memory(str(i)).items()},
            },
            in_bytes=RING,
        )
        for name, outputs in {
            "0": (),
            "1": ("values0", "gates0", "entries0"),
            "2": ("values0", "gates0", "entries0", "values1", "gates1", "entries1"),
            "2_fp8": ("values0", "gates0", "entries0", "values1", "gates1", "entries1", "scales1"),
        }.items()
    },
    "dense_attention": Contract(
        ("q",),
        order="one softmax over all rows, maximum first",
        draws={"mask": Mask(), "cos": Uniform(-1, 1), "sin": Uniform(-1, 1)},
    ),
    "indexer": Contract(
        ("int64",),
        ties="any; the lower entry where an implementation runs",
        sets=True,
        draws={
            "q": Facing(queries=True),
            "keys": Facing(),
            "visible": Counts("keys", 1),
            "cos": Uniform(-1, 1),
            "sin": Uniform(-1, 1),
        },
    ),
    "attention": Contract(
        ("q",),
        order="one softmax over window and entries, maximum first",
        draws={
            "keys": STORED_ROWS,
            "entries": STORED_ROWS,
            "window": Rows("keys", 1, none=True),
            "index": Rows("entries", 1, none=True),
            "cos": Uniform(-1, 1),
            "sin": Uniform(-1, 1),
        },
    ),
}


def contract_of(op: str) -> Contract:
    """The contract of an op by name; one that the table lacks promises the general tolerance."""
    return CONTRACTS.get(op, Contract(()))


def digest() -> str:
    """Of the table: changes whenever a promise does."""
    return hashlib.sha256(repr((VERSION, sorted(TOLERANCE.items(), key=repr), CONTRACTS)).encode()).hexdigest()
