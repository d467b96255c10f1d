"""The options of the backend, resolved once: option beats environment variable beats preset beats default."""

import fnmatch
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

from .errors import BadValue, UnknownName

INNER = ("inductor", "eager")
AUTOTUNE = ("off", "cached", "full")
LOWER = "lower"  # the last pass: ops are claimed or written back
MODES: dict[str, dict[str, Any]] = {
    "decode": {"capture": True},  # a step is many small kernels, and its sizes never change
    "prefill": {
        "capture": False,
        "cudagraphs": False,
    },  # every length would be captured anew, whatever torch's own settings ask for
    "debug": {"strict": True, "explain": True, "inner": "eager"},
}


@dataclass(frozen=True)
class Config:
    """What the user asked for. All of it enters the cache identity, but for `cache_dir`, which changes no graph.

    passes, disable: globs over pass names (raise.*, fuse.moe); those in `passes` and not in `disable` run.
    lowerings: devices whose implementations claim ops wherever they can ("cpu", "cuda"); others are inlined. "*", the
        default: those of all devices, where they are worth it.
    strict: a rule that fails, a graph that one breaks, and a fusion that does not find all its places in the reference
        model's modules are errors.
    explain: print the report, past all caches. diff: globs over pass names, and "lower"; the report then shows what they
        did, line by line, past all caches.
    cache_dir: where reports are kept for warm starts; by default among Inductor's caches.
    verify: run each match before and after on drawn inputs, and leave out what differs.
    regions: keep bodies that layers share; False writes them out, so that rewrites are told apart layer by layer.
    sites: ids or globs of the rewrites that may be made, as `report` and `bisect` name them.
    inner: "inductor", or "eager" to run the rewritten graph op by op; None chooses.
    capture: on a GPU, replay each call as one CUDA graph (cudagraph.py); on in mode="decode".
    cudagraphs: Inductor's own CUDA graphs, in the place of `capture`; off in mode="prefill", else as torch is set.
    autotune: how kernels are configured. "cached": as timings in the cache say, else as a cost model does; "off": by the cost
        model; "full": as "cached", and what the cache lacks is timed now. For the whole process, as the latest compile says.
    batch_invariant: on a GPU a token's result has the same bits in calls of 1 to 64 tokens (of all sequences): no kernel
        divides its sums by their number, and products of 9 to 64 are made by the kernels for few. On a CPU that holds of
        stored linear layers, experts and the beginning of mHC in fp32, with a C++ compiler at hand; PyTorch's own products
        divide theirs by size. Once one compile asks for it, all kernels of the process keep to it.
    """

    passes: tuple[str, ...] = ("*",)
    disable: tuple[str, ...] = ()
    lowerings: tuple[str, ...] = ("*",)
    strict: bool = False
    explain: bool = False
    verify: bool = False
    regions: bool = True
    sites: tuple[str, ...] = ("*",)
    inner: str | None = None
    capture: bool = False
    cudagraphs: bool | None = None
    diff: tuple[str, ...] = ()
    cache_dir: str | None = None
    autotune: str = "cached"
    batch_invariant: bool = False

    @property
    def captures(self) -> bool:
        """Whether calls are captured by us; one capture does not go into another."""
        return self.capture and not self.cudagraphs

    @property
    def inductor_captures(self) -> bool | None:
        """Whether Inductor captures; None: as torch is set."""
        return False if self.captures else self.cudagraphs

    def enabled(self, name: str) -> bool:
        """Whether the passes of this name run."""
        return _any(name, self.passes) and not _any(name, self.disable)

    def selects(self, site: str) -> bool:
        """Whether this rewrite may be made."""
        exact, globs = _parted(self.sites)
        return site in exact or _any(site, globs)

    def compares(self, name: str) -> bool:
        """Whether the report shows what this pass did."""
        return _any(name, self.diff)

    def may_lower_to(self, device: str) -> bool:
        return _any(device, self.lowerings)

    @property
    def forces_lowering(self) -> bool:
        """Whether devices were named, so that their implementations run even where plain PyTorch is as fast."""
        return self.lowerings != ("*",)


OPTIONS = ("mode", *(f.name for f in fields(Config)))


def resolve(
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
    *,
    passes: Iterable[str],
    devices: Iterable[str],
    environment: Mapping[str, str] = os.environ,
) -> Config:
    """Read options, mode and DSV4_* variables. The mode may be an option too, as torch.compile takes only one of the two;
    `mode` beats DSV4_MODE, and options["mode"] both. `passes` and `devices` are the names that globs may mean.

    Raises UnknownName for an option, mode, pass or device that does not exist, BadValue for a value that cannot be read.
    """
    given: dict[str, Any] = {}
    for name in OPTIONS:
        if (text := environment.get(f"DSV4_{name.upper()}")) is not None:
            given[name] = text
    if mode is not None:
        given["mode"] = mode
    for name, value in (options or {}).items():
        if name not in OPTIONS:
            raise UnknownName("option", name, OPTIONS)
        given[name] = value
    read = dict(_mode(given.pop("mode", None)))
    read |= {name: _READ[name](name, value) for name, value in given.items()}
    config = Config(**read)
    passes = list(passes)
    _check("pass", (*config.passes, *config.disable), passes)
    _check("pass", config.diff, [*passes, LOWER])
    _check("lowering", config.lowerings, devices)
    return config


def _globs(name: str, value: Any) -> tuple[str, ...]:
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or not all(isinstance(p, str) for p in parts):
        raise BadValue(name, value, "names or globs, as a list or separated by commas")
    parts = tuple(p.strip() for p in parts if p.strip())
    return ("*",) if parts == ("all",) else () if parts == ("none",) else parts


def _flag(name: str, value: Any) -> bool:
    known = {
        "1": True,
        "true": True,
        "yes": True,
        "on": True,
        "0": False,
        "false": False,
        "no": False,
        "off": False,
        "": False,
    }
    if isinstance(value, bool):
        return value
    if str(value).lower() not in known:
        raise BadValue(name, value, "a boolean (1 or 0)")
    return known[str(value).lower()]


def _mode(name: Any) -> dict[str, Any]:
    if name is None or name in MODES:
        return MODES.get(name, {})
    raise UnknownName("mode", str(name), MODES)


def _folder(name: str, value: Any) -> str | None:
    if value is None or isinstance(value, (str, os.PathLike)):
        return os.fspath(value) if value else None
    raise BadValue(name, value, "a folder")


def _flag_or_none(name: str, value: Any) -> bool | None:
    return None if value is None else _flag(name, value)


def _inner(name: str, value: Any) -> str | None:
    if value is None or value in INNER:
        return value
    raise UnknownName("inner", str(value), INNER)


def _autotune(name: str, value: Any) -> str:
    if value in AUTOTUNE:
        return value
    raise UnknownName(name, str(value), AUTOTUNE)


_READ = {
    "passes": _globs,
    "disable": _globs,
    "lowerings": _globs,
    "strict": _flag,
    "explain": _flag,
    "verify": _flag,
    "regions": _flag,
    "sites": _globs,
    "inner": _inner,
    "capture": _flag,
    "cudagraphs": _flag_or_none,
    "diff": _globs,
    "cache_dir": _folder,
    "autotune": _autotune,
    "batch_invariant": _flag,
}


@lru_cache(maxsize=64)
def _parted(names: tuple[str, ...]) -> tuple[frozenset[str], tuple[str, ...]]:
    """Names that stand for themselves, and globs."""
    globs = tuple(n for n in names if set(n) & set("*?["))
    return frozenset(names) - set(globs), globs


def _any(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, g) for g in globs)


def _check(what: str, globs: Iterable[str], known: Iterable[str]) -> None:
    known = list(known)
    for glob in globs:
        if glob != "*" and not fnmatch.filter(known, glob):
            raise UnknownName(what, glob, known)
