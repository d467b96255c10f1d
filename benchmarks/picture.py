"""A roofline: what each call does a second over the operations it does for each byte, under this machine's ceilings."""

from pathlib import Path
from typing import Any

from benchmarks.timing import Ceilings

COLOURS = {"eager": "tab:gray", "inductor": "tab:orange", "ours": "tab:blue", "torch": "tab:green"}


def roofline(rows: list[dict[str, Any]], limits: Ceilings, title: str, file: Path) -> None:
    """Draw what `python -m benchmarks` measured; the file's ending says in which format. Calls without arithmetic are left out.
    Needs matplotlib."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

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
