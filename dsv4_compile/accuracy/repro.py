"""A script that shows a fault on its own: the same model and inputs, the guilty rewrites, and nothing else."""

import inspect
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import NotForAScript

if TYPE_CHECKING:
    from .bisect import Bisection

TEXT = '''"""The result of a model changes with these rewrites:

{guilty}

Run it with a Python that has dsv4_compile. It ends with 1 while the fault is there and with 0 once it is gone.
"""

import sys
from pathlib import Path

import torch

import dsv4_compile
from dsv4_compile import reference_model
from dsv4_compile.reference_model import nano
{before}
GUILTY = {sites}
OPTIONS = {options}
THRESHOLD = {threshold!r}

held = torch.load(Path(__file__).with_suffix(".pt"), weights_only=False)
model = {model}
found = dsv4_compile.bisect(
    model,
    *held["args"],
    metric={metric},
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
    """Write `file` and, beside it, the inputs, and the model unless `source` is an expression for it.

    Raises NotForAScript."""
    before, name = spelled(metric)
    parts = [f"* {s.rule} in {s.layer} at {s.where}" for g in found.guilty for s in g.sites]
    text = TEXT.format(
        guilty="\n".join(parts).replace("\\", "/").replace('"', "'"),
        before=before,
        metric=name,
        sites="[\n" + "".join(f"    {site!r},\n" for site in found.needed) + "]",
        options=repr(dict(options)),
        threshold=found.threshold,
        model=source or 'held["model"]',
    )
    held = {"args": args, "kwargs": kwargs} | ({} if source else {"model": model})
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    torch.save(held, file.with_suffix(".pt"))
    return file


def check(model: Any, metric: Any, source: str | None) -> None:
    """Raise NotForAScript, before anything is searched, if the metric or the model cannot be written into a script."""
    spelled(metric)
    if source is None:
        parts = model.modules() if isinstance(model, torch.nn.Module) else [model]
        for part in parts:
            kind = type(part) if isinstance(part, torch.nn.Module) else part
            if not importable(kind):
                raise NotForAScript(f"the model's {getattr(kind, '__qualname__', kind)!r}")


def spelled(metric: Any) -> tuple[str, str]:
    """A metric in a script: lines that must stand before it, and the expression for it."""
    if isinstance(metric, str):
        return "", repr(metric)
    name = getattr(metric, "__name__", "")
    if importable(metric) and name == metric.__qualname__:
        return f"from {metric.__module__} import {name}\n", name
    try:
        text = textwrap.dedent(inspect.getsource(metric))
    except (OSError, TypeError):
        text = ""
    if not text.startswith("def ") or getattr(metric, "__closure__", None):
        raise NotForAScript(f"the metric {name or metric!r}")
    return f"\n\n{text}\n", name


def importable(x: Any) -> bool:
    """Whether another process finds this class or function by its name."""
    module, found = getattr(x, "__module__", None), sys.modules.get(getattr(x, "__module__", None) or "")
    for name in getattr(x, "__qualname__", "").split("."):
        found = getattr(found, name, None)
    return module != "__main__" and found is x
