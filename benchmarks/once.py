"""Every kernel launched once or twice at small sizes, without torch.compile: what to run under compute-sanitizer.

    python -m benchmarks.once                      # builds what the cache lacks, in all processors
    compute-sanitizer --tool memcheck --error-exitcode 1 python -m benchmarks.once

Fails if there is a kernel that no call reached, or a result that is not finite.
"""

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.cases import Cases
from dsv4_compile import kernels
from dsv4_compile.kernel import STORE, Kernel, arch, collecting
from dsv4_compile.op import Op
from dsv4_compile.reference_model import DSV4Config
from dsv4_compile.warm import Wanted, build_all, on_gpu

SIZES = {(1, 1): (torch.bfloat16,), (3, 1): (torch.bfloat16, torch.float32), (1, 40): (torch.bfloat16,)}
Call = tuple[str, Op, dict[str, Any]]


def calls(device: torch.device) -> Iterator[Call]:
    """A name, an op and all its arguments: for some numbers of requests and tokens, in the dtypes that kernels take."""
    for (B, T), dtypes in SIZES.items():
        for case in Cases(DSV4Config.nano(), B, T, device):
            given = case.op.arguments(*case.make())
            for dtype in dtypes:
                plain = lambda a: isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16  # noqa: E731
                cast = {n: a.to(dtype) if plain(a) else a for n, a in given.items()}
                yield f"{case.what}, {B}x{T}, {dtype}", case.op, cast


def wanted() -> dict[Wanted, None]:
    """The kernels that these calls launch; nothing is launched."""
    found: dict[Wanted, None] = {}
    for _, op, given in calls(torch.device("cpu")):
        with FakeTensorMode(), collecting() as launches:
            moved = {name: on_gpu(a) for name, a in given.items()}
            claimed, _ = op.claim(moved)
            if claimed is not None and claimed.device == "cuda":
                claimed.run(*moved.values())
        for kernel, shape, config in launches:
            found[Wanted(f"dsv4_compile.kernels.{Path(kernel.file).stem}", kernel.name, shape, config)] = None
    return found


def all_kernels() -> set[str]:
    modules = [importlib.import_module(f"dsv4_compile.kernels.{m.name}") for m in iter_modules(kernels.__path__)]
    return {k.name for module in modules for k in vars(module).values() if isinstance(k, Kernel)}


def build(needed: dict[Wanted, None]) -> list[str]:
    """What could not be built."""
    modules = {w: vars(importlib.import_module(w.module)).values() for w in needed}
    of = {w: next(k for k in found if isinstance(k, Kernel) and k.name == w.kernel) for w, found in modules.items()}
    absent = [w for w in needed if STORE.peek(of[w].key(w.shape, w.config)) is None]
    failed: list[str] = []
    if absent:
        jobs = min(len(absent), len(os.sched_getaffinity(0)))
        build_all(absent, arch(), jobs, lambda w, _, error: failed.append(f"{w}: {error}") if error else None)
    return failed


def main() -> int:
    torch.manual_seed(0)
    needed = wanted()
    missed, failed = all_kernels() - {w.kernel for w in needed}, build(needed)
    bad, many = [], 0
    for name, op, given in calls(torch.device("cuda")):
        claimed, _ = op.claim(given)
        if claimed is not None:
            out, many = op.target(*given.values()), many + 1
            torch.cuda.synchronize()
            if not all(o.isfinite().all() for o in (out if isinstance(out, tuple) else (out,))):
                bad.append(name)
    print(f"{many} calls, {len(needed)} kernels of {len({w.kernel for w in needed})} kinds; not finite: {bad}")
    print(f"no call reaches: {sorted(missed)}; not built: {failed}")
    return 1 if bad or missed or failed else 0


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
