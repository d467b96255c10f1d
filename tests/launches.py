"""What ops would launch on a GPU, and building it ahead. This file holds no tests."""

import os
from pathlib import Path

from torch._subclasses.fake_tensor import FakeTensorMode

from dsv4_compile import warm
from dsv4_compile.kernel import STORE, arch, collecting


def launched_by(op, arguments):
    """(kernel, shape, configuration) of each launch of a call."""
    with FakeTensorMode(), collecting() as launches:
        op.run(*map(warm.on_gpu, arguments))
    return launches


def wanted(kernel, shape, config):
    """As `warm` lists it."""
    return warm.Wanted(f"dsv4_compile.kernels.{Path(kernel.file).stem}", kernel.name, shape, config)


def build(found):
    """In all processors, what the cache lacks; what could not be built. found: kernels, by what is wanted of them."""
    absent = [w for w, kernel in found.items() if STORE.peek(kernel.key(w.shape, w.config)) is None]
    failed = []
    if absent:
        jobs = min(len(absent), len(os.sched_getaffinity(0)))
        warm.build_all(absent, arch(), jobs, lambda w, _, error: failed.append(f"{w}: {error}") if error else None)
    return failed
