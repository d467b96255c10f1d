"""Reports kept beside torch's caches: a graph that is loaded from them has never been through the passes.

One JSON file a graph, named by a digest of what was compiled: our sources and options, torch's version, and the graph
that Dynamo captured with its inputs' shapes. A file that is missing, damaged or cannot be written costs the report,
never the compile.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from ..accuracy.verify import Check
from ..cache.store import write_whole
from ..config import Config
from ..identity import identity
from ..match import NearMiss
from .report import GraphReport, Ran, Report, Site
from .unclaimed import Left

VERSION = 2


def place(gm: torch.fx.GraphModule, inputs: Sequence[Any], config: Config) -> Path:
    """The file of this graph's report; the same in every process that compiles the same."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    digest = hashlib.sha256(f"{VERSION} {torch.__version__} {identity(config)}".encode())
    for name, module in gm.named_modules():
        if isinstance(module, torch.fx.GraphModule):
            digest.update(f"{name}\0{module.code}\0".encode())
    for x in inputs:
        kind = (x.dtype, tuple(x.shape), x.stride(), x.device.type) if isinstance(x, torch.Tensor) else type(x)
        digest.update(f"{kind}\0".encode())
    return Path(config.cache_dir or Path(cache_dir()) / "dsv4") / "reports" / f"{digest.hexdigest()}.json"


def remember(report: Report, before: int, file: Path) -> None:
    """Keep what is new in the report, from graph number `before` on; if nothing is, the graph came out of torch's caches:
    add what was kept of it."""
    new = [replace(g, bodies=Counter({i - before: n for i, n in g.bodies.items()})) for g in report.graphs[before:]]
    if new:
        save(replace(report, graphs=new), file)
    elif kept := load(file):
        report.merge(kept)
        report.stored = True


def save(report: Report, file: Path) -> None:
    """Write the report, whole or not at all."""
    content = json.dumps({"version": VERSION, **encoded(report)})
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, content.encode())
    except OSError:
        return


def load(file: Path) -> Report | None:
    """The report in a file, or None if there is none that can be read."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content.pop("version") != VERSION:
            return None
        report = decoded(content)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    report.stored = True
    return report


def encoded(report: Report) -> dict[str, Any]:
    """What a report says, as JSON takes it."""
    return {
        "graphs": [{f.name: _plain(getattr(graph, f.name)) for f in fields(GraphReport)} for graph in report.graphs],
        "sites": dict(report.sites),
        "fusions": list(report.fusions),
        "off": list(report.off),
    }


def decoded(content: dict[str, Any]) -> Report:
    """The opposite of `encoded`."""
    graphs = []
    for given in content["graphs"]:
        graph = GraphReport(**given)
        graph.sites, graph.undone = (
            [Site(**{**s, "absorbs": tuple(s["absorbs"])}) for s in given[name]] for name in ("sites", "undone")
        )
        graph.misses = [NearMiss(**m) for m in given["misses"]]
        graph.ran = [Ran(**r) for r in given["ran"]]
        graph.left = [Left(**part) for part in given["left"]]
        graph.checks = [Check(**c) for c in given["checks"]]
        graph.bodies = Counter({int(i): n for i, n in given["bodies"].items()})
        if not all(0 <= i < len(content["graphs"]) for i in graph.bodies):
            raise ValueError("a body that is not there")
        graphs.append(graph)
    fusions, off = (tuple(content[key]) for key in ("fusions", "off"))
    return Report(graphs=graphs, sites=dict(content["sites"]), fusions=fusions, off=off)


def _plain(x: Any) -> Any:
    if isinstance(x, list):
        return [_plain(i) for i in x]
    if isinstance(x, NearMiss):
        return {f.name: getattr(x, f.name) for f in fields(x) if f.name != "node"}
    if isinstance(x, (Site, Ran, Left, Check)):
        return asdict(x)
    return x
