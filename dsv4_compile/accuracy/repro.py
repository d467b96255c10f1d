"""A script that shows a fault on its own: the same model and inputs, the guilty rewrites, and nothing else."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .bisect import Bisection

TEXT = '''"""{title}

Run it with a Python that has dsv4_compile. It ends with 1 while the fault is there and with 0 once it is gone.
"""

import sys
from pathlib import Path

import torch

import dsv4_compile
from dsv4_compile import reference_model
from dsv4_compile.reference_model import nano

GUILTY = {sites}
OPTIONS = {options}
THRESHOLD = {threshold!r}

held = torch.load(Path(__file__).with_suffix(".pt"), weights_only=False)
model = {model}
found = dsv4_compile.bisect(
    model,
    *held["args"],
    metric=held["metric"],
    threshold=THRESHOLD,
    options={{**OPTIONS, "sites": GUILTY}},
    **held["kwargs"],
)
print(found)
sys.exit(1 if found.value > THRESHOLD else 0)
'''


def write(
    file: Path, found: "Bisection", model: Any, args: Any, kwargs: Any, metric: Any, options: Any, source: str | None
) -> Path:
    """Write `file` and, beside it, the inputs and the metric, and the model unless `source` is an expression for it."""
    parts = [f"{s.rule} in {s.layer} at {s.where}" for g in found.guilty for s in g.sites]
    text = TEXT.format(
        title="; ".join(parts).replace("\\", "/").replace('"', "'") + ": the result changes.",
        sites="[\n" + "".join(f"    {site!r},\n" for site in found.needed) + "]",
        options=repr(dict(options)),
        threshold=found.threshold,
        model=source or 'held["model"]',
    )
    held = {"args": args, "kwargs": kwargs, "metric": metric} | ({} if source else {"model": model})
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    torch.save(held, file.with_suffix(".pt"))
    return file
