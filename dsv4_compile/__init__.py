"""dsv4_compile: a `torch.compile` backend for DeepSeek-V4.

`import dsv4_compile` costs nothing: no torch, no CuTeDSL.  Each public name loads its module on first use.
`dsv4_compile.backend` is the module torch's entry point names; users write `torch.compile(model, backend="dsv4")`.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# public name -> module of this package that defines it, or that it is
_HOME: dict[str, str] = {
    "Config": "config",
    "Report": "reporting.report",
    "bisect": "accuracy.bisect",
    "explain": "reporting.explain",
    "hf": "hf",
    "reports": "reporting.report",
    "shadow": "accuracy.shadow",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dsv4_compile' has no attribute {name!r}; public names: {', '.join(_HOME)}")
    module = import_module(f"dsv4_compile.{_HOME[name]}")
    value = module if name == _HOME[name] else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
