"""Pictures, as matplotlib draws them; the file's ending says in which format.

A roofline: what each call does a second over the operations it does for each byte, under this machine's ceilings. And the
launches of a step's layers in time, each above its byte floor.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.timing import Ceilings
from benchmarks.waterfall import Part

COLOURS = {"eager": "tab:gray", "inductor": "tab:orange", "ours": "tab:blue", "torch": "tab:green"}
COLOURS |= {"flash_mla": "tab:red", "deep_gemm": "tab:purple", "quack": "tab:brown"}
BY = {"dsv4": "tab:blue", "inductor": "tab:orange", "torch": "tab:gray"}


def roofline(rows: list[dict[str, Any]], limits: Ceilings, title: str, file: Path) -> None:
    """Draw what `python -m benchmarks` measured. Calls without arithmetic are left out."""
    pyplot = library()
    figure, axes = pyplot.subplots(figsize=(9, 6))
    drawn = [r for r in rows if r["flops"] and r["bytes"]]
    for name, colour in COLOURS.items():
        points = [(r["flops"] / r["bytes"], r["flops"] / r["us"][name] * 1e6) for r in drawn if r["us"].get(name)]
        if points:
            axes.scatter(*zip(*points, strict=True), s=14, color=colour, label=name, alpha=0.8, linewidths=0)
    x = [2.0**i for i in range(-4, 15)]
    axes.plot(x, [min(limits.gemm, limits.read * i) for i in x], color="black", label="read, then bf16 products")
    if limits.gemm_fp8:
        axes.plot(
            x, [min(limits.gemm_fp8, limits.read * i) for i in x], color="black", linestyle=":", label="FP8 products"
        )
    axes.set(xscale="log", yscale="log", xlabel="operations for each byte", ylabel="operations a second", title=title)
    axes.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def launches(parts: Sequence[Part], floors: Mapping[str, float], title: str, file: Path) -> None:
    """Draw what `python -m benchmarks.layer` measured: a bar from the start to the end of each launch, one below the other;
    under it, from where it begins to add to the time, its op's byte floor. floors: us of what a layer must read, by name."""
    from matplotlib.patches import Patch

    pyplot, drawn = library(), [part for part in parts if part.launches]
    heights = [len(part.launches) + 3 for part in drawn]
    figure, all_axes = pyplot.subplots(
        len(drawn), figsize=(11, 0.19 * sum(heights) + 1), height_ratios=heights, squeeze=False
    )
    ends = {part.name: max(x.end for x in part.launches) for part in drawn}
    widest = max((ends[part.name] for part in drawn if part.name in floors), default=0.0)  # layers have one scale
    for part, axes in zip(drawn, all_axes.flat, strict=True):
        for row, x in enumerate(part.launches):
            axes.broken_barh([(x.start, x.end - x.start)], (row - 0.4, 0.5), color=BY[x.by], linewidths=0)
            if x.floor is not None:
                axes.broken_barh([(x.end - x.adds, x.floor)], (row + 0.1, 0.3), color="black", linewidths=0)
        name = f"{part.name}: {part.us:.1f} us, {len(part.launches)} launches"
        if part.name in floors:
            name += f", {floors[part.name]:.1f} us to read"
            axes.axvline(floors[part.name], color="black", linewidth=0.7, linestyle=":")
        axes.set(xlim=(0, widest if part.name in floors else ends[part.name]), ylim=(len(part.launches) - 0.4, -0.6))
        axes.set_title(name, fontsize=8, loc="left")
        axes.set_yticks(range(len(part.launches)), [x.op[:44] for x in part.launches], fontsize=6)
        axes.tick_params("x", labelsize=6)
    all_axes.flat[-1].set_xlabel("us", fontsize=7)
    patches = [*(Patch(color=c, label=by) for by, c in BY.items()), Patch(color="black", label="byte floor")]
    figure.suptitle(title, fontsize=9)
    figure.legend(handles=patches, ncols=len(patches), loc="lower left", fontsize=7)
    figure.tight_layout(rect=(0, 0.01, 1, 0.99))
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def library() -> Any:
    """matplotlib's, to draw into files."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot
