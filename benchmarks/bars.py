"""What whole layers and their parts take in a decode step, beside the bars and stretch goals that the kernels are held to at
Flash's sizes on an H200. Products alone, and attention and indexer at many requests, are in the other benchmarks."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table

from benchmarks.waterfall import Part

AGAIN = " again"  # a layer whose kind there was before: without what the step computes once
BOUNDARIES = {"mhc_boundary", "mhc_enter"}
BOUNDED = {  # (cell, format, requests): bar, stretch
    ("CSA layer, us", "bf16", 1): (230, 170),
    ("CSA layer, us", "fp4", 1): (125, 85),
    ("HCA layer, us", "fp4", 1): (112, 78),
    ("SWA layer, us", "fp4", 1): (105, 74),
    ("mHC boundary, us", None, 1): (8, 4.5),
    ("experts, router and shared expert, us", "fp4", 1): (45, 33),
    ("experts, router and shared expert, share of reading", "fp4", 8): (0.75, 0.88),
    ("attention, 128 + 512 rows, turned back, us", None, 1): (10, 6),
    ("indexer, 32768 entries, us", None, 1): (15, 8),
    ("indexer, 32768 entries, us", None, 8): (25, 16),
}
LAUNCHES = {"CSA": (14, 9), "HCA": (13, 8), "SWA": (12, 7)}
LONGER = {1 << 17: (8, 4), 1 << 20: (25, 14)}  # us more than at 8K, one request


def cells(result: dict[str, Any], parts: Sequence[Part]) -> Iterator[dict[str, Any]]:
    """Of one arm at one context: what can be read off its layers. result: as `benchmarks.layer` has it."""
    about = {k: result[k] for k in ("model", "format", "batch", "context", "arm")}
    layers = dict(zip((x["layer"] for x in result["layers"]), result["layers"], strict=True))
    for part in parts:
        if part.name not in layers:
            continue
        kind, again = part.name.split(AGAIN)[0].split(",")[0], AGAIN * (AGAIN in part.name)
        floor = layers[part.name]["floor_us"]
        yield about | cell(f"{kind} layer{again}, us", layers[part.name]["us"], floor)
        yield about | cell(f"{kind} layer{again}, launches", len(part.launches))
        if again or not part.fits:
            continue
        between = [x for x in part.launches if x.op == "mhc_boundary"]
        if between and kind == "CSA":
            yield about | cell("mHC boundary, us", max(x.adds for x in between), between[0].floor)
        if kind != "SWA" and (us := behind_attention(part)) is not None:
            share, name = layers[part.name]["experts_floor_us"] / us, "experts, router and shared expert"
            if kind == "CSA":
                yield about | cell(f"{name}, us", us, us * share)
                yield about | cell(f"{name}, share of reading", share)
        if kind == "CSA":
            for op, what in (("attention", layers[part.name]["rows"]), ("indexer", layers[part.name]["entries"])):
                mine = [x for x in part.launches if x.op == op]
                if mine:
                    yield about | cell(f"{what}, us", sum(x.adds for x in mine), mine[0].floor)


def behind_attention(part: Part) -> float | None:
    """What the second half of a layer adds, from behind the mHC boundary to before the streams take it up."""
    places = [i for i, x in enumerate(part.launches) if x.op in BOUNDARIES]
    if len(places) < 2:
        return None
    return sum(x.adds for x in part.launches[places[1] + 1 :] if x.op != "mhc_post")


def cell(name: str, value: float, floor: float | None = None) -> dict[str, Any]:
    return {"cell": name, "value": value, "floor": floor, "share": floor / value if floor and value else None}


def longer(found: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """How much more a CSA layer takes at a longer context than at the shortest."""
    first: dict[tuple[Any, ...], dict[str, Any]] = {}
    for x in sorted((x for x in found if x["cell"] == "CSA layer, us"), key=lambda x: x["context"]):
        key = tuple(x[k] for k in ("model", "format", "batch", "arm"))
        base = first.setdefault(key, x)
        if base is not x:
            about = {k: x[k] for k in ("model", "format", "batch", "context", "arm")}
            name = f"CSA layer at {x['context']}, us more than at {base['context']}"
            yield about | cell(name, x["value"] - base["value"], x["floor"] - base["floor"])


def bounds(x: dict[str, Any]) -> tuple[float, float] | None:
    """Bar and stretch goal of a cell of Flash."""
    if x["model"] != "flash":
        return None
    name = x["cell"].replace(AGAIN, "")
    kind, _, what = name.partition(" layer, ")
    if what == "launches":
        return LAUNCHES[kind] if x["batch"] == 1 else None
    if " more than at 8192" in name:
        return LONGER.get(x["context"]) if x["batch"] == 1 else None
    if what == "us" and x["context"] != 8192:
        return None
    return BOUNDED.get((name, x["format"], x["batch"])) or BOUNDED.get((name, None, x["batch"]))


def place(x: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(x[k] for k in ("cell", "model", "format", "batch", "context"))


def table(found: Sequence[dict[str, Any]]) -> Table:
    """A row for each cell; what "invariant" takes stands beside what "ours" does."""
    made = Table("cell", "format", "context", "requests", "arm", "measured", "floor", "share")
    bounded = any(bounds(x) for x in found)
    for name in ("bar", "stretch") if bounded else ():
        made.add_column(name)
    ours = {place(x) for x in found if x["arm"] == "ours"}
    beside = {place(x): x["value"] for x in found if x["arm"] == "invariant" and place(x) in ours}
    if beside:
        made.add_column("invariant")
    for x in found:
        if x["arm"] == "invariant" and place(x) in beside:
            continue
        limits, of_reading = bounds(x), x["cell"].endswith("share of reading")
        digits = 2 if of_reading else 0 if x["cell"].endswith("launches") else 1
        numbers = (
            f"{x['value']:.{digits}f}",
            *("" if x[k] is None else f"{x[k]:.{d}f}" for k, d in (("floor", 1), ("share", 2))),
        )
        ends = ("" if limits is None else f"{b:g}" for b in limits or ("", "")) if bounded else ()
        style = None
        if limits is not None:
            met = x["value"] >= limits[0] if of_reading else x["value"] <= limits[0]
            style = None if met else "bold red"
        about = (x["cell"], x["format"], f"{x['context']}", f"{x['batch']}", x["arm"])
        other = beside.get(place(x)) if x["arm"] == "ours" else None
        last = (
            "" if other is None else f"{other:.{digits}f} ({other / x['value'] - 1:+.1%})" if x["value"] else f"{other}"
        )
        made.add_row(*about, *numbers, *ends, *([last] if beside else []), style=style)
    return made
