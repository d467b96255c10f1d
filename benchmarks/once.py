"""Every kernel launched once or twice at small sizes, without torch.compile: what to run under compute-sanitizer.

    python -m benchmarks.once                      # builds what the cache lacks, in all processors
    compute-sanitizer --tool memcheck --error-exitcode 1 python -m benchmarks.once
    compute-sanitizer --tool racecheck --error-exitcode 1 python -m benchmarks.once --without-reuse

Racecheck does not follow barriers at which one side arrives and the other waits, by which places of a ring are filled again.
Without reuse, lists of attention by warpgroups, the one kernel that reads its ring by plain loads, are no longer than its ring.

Fails if there is a kernel that no call reached, or a result that is not finite.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
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

Sizes = dict[tuple[int, int], tuple[torch.dtype, ...]]  # numbers of requests and of their tokens, and the dtypes
Call = tuple[str, Op, dict[str, Any]]
WIDE: Sizes = {(33, 1): (torch.bfloat16,)}  # many tokens with many wide heads, for attention
SIZES: Sizes = {(1, 1): (torch.bfloat16,), (3, 1): (torch.bfloat16, torch.float32), (1, 40): (torch.bfloat16,)}


def calls(config: DSV4Config, sizes: Sizes, device: torch.device) -> Iterator[Call]:
    """A name, an op and all its arguments. Rows in bytes are read by kernels only of some widths."""
    wide = config.replace(head_dim=256, qk_rope_head_dim=64, index_head_dim=64)
    for (B, T), dtypes in sizes.items():
        in_bytes = (c for c in Cases(wide, B, T, device).attention() if "bytes" in c.what)
        for case in (*Cases(config, B, T, device), *in_bytes):
            given = case.op.arguments(*case.make())
            for dtype in dtypes:
                plain = lambda a: isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16  # noqa: E731
                cast = {n: a.to(dtype) if plain(a) else a for n, a in given.items()}
                yield f"{case.what}, {B}x{T}, {dtype}", case.op, cast


def all_calls(device: torch.device, reuse: bool = True) -> Iterator[Call]:
    nano = DSV4Config.nano()
    yield from calls(nano, SIZES, device)
    wide = nano.replace(num_attention_heads=66, head_dim=256, sliding_window=nano.sliding_window if reuse else 64)
    yield from (call for call in calls(wide, WIDE, device) if call[1].name == "attention")


def launches(config: DSV4Config, sizes: Sizes) -> list[tuple[Kernel, Any, Any]]:
    """The kernels that calls of these sizes launch, each with its shape and configuration; nothing is launched or allocated."""
    return launches_of(lambda device: calls(config, sizes, device))


def launches_of(made: Callable[[torch.device], Iterator[Call]]) -> list[tuple[Kernel, Any, Any]]:
    with FakeTensorMode(), collecting() as found:
        for _, op, given in made(torch.device("cpu")):
            moved = {name: on_gpu(a) for name, a in given.items()}
            claimed, _ = op.claim(moved)
            if claimed is not None and claimed.device == "cuda":
                claimed.run(*moved.values())
    return list(dict.fromkeys(found))


def all_kernels() -> set[str]:
    modules = [importlib.import_module(f"dsv4_compile.kernels.{m.name}") for m in iter_modules(kernels.__path__)]
    return {k.name for module in modules for k in vars(module).values() if isinstance(k, Kernel)}


def build(needed: list[tuple[Kernel, Any, Any]]) -> list[str]:
    """What could not be built."""
    absent = [
        Wanted(f"dsv4_compile.kernels.{Path(kernel.file).stem}", kernel.name, shape, config)
        for kernel, shape, config in needed
        if STORE.peek(kernel.key(shape, config)) is None
    ]
    failed: list[str] = []
    if absent:
        jobs = min(len(absent), len(os.sched_getaffinity(0)))
        build_all(absent, arch(), jobs, lambda w, _, error: failed.append(f"{w}: {error}") if error else None)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--without-reuse", action="store_true", help="what racecheck can follow")
    made = partial(all_calls, reuse=not parser.parse_args().without_reuse)
    torch.manual_seed(0)
    needed = launches_of(made)
    reached, failed = {kernel.name for kernel, _, _ in needed}, build(needed)
    missed = all_kernels() - reached
    bad, many = [], 0
    for name, op, given in made(torch.device("cuda")):
        claimed, _ = op.claim(given)
        if claimed is not None:
            out, many = op.target(*given.values()), many + 1
            torch.cuda.synchronize()
            if not all(o.float().isfinite().all() for o in (out if isinstance(out, tuple) else (out,))):
                bad.append(name)
    print(f"{many} calls, {len(needed)} kernels of {len(reached)} kinds; not finite: {bad}")
    print(f"no call reaches: {sorted(missed)}; not built: {failed}")
    return 1 if bad or missed or failed else 0


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
