"""PyTorch's own bisector over our rewrites: `torch._inductor.compiler_bisector` with "dsv4" as one more system.

It sweeps eager, aot_eager and Inductor first and finds one rewrite by its number in the compile; `dsv4_compile.bisect`
needs fewer compiles, finds several and knows layers. Use this one to tell our faults from torch's.
"""

from collections.abc import Callable
from typing import Any

SYSTEM, SUBSYSTEM = "dsv4", "rewrites"


def torch_bisect(test: Callable[[], bool]) -> Any:
    """Run CompilerBisector.do_bisect(test) with our rewrites as a system; returns its BisectionResult or None.

    `test` resets Dynamo, compiles with backend="dsv4" (by that name: the bisector puts others in its place), and returns
    whether the result is right. Its status files are removed whatever happens, and the system is taken out again.
    """
    from torch._inductor import compiler_bisector

    bisector = compiler_bisector.CompilerBisector
    compiler_bisector.BACKENDS[SYSTEM] = [compiler_bisector.BisectSubsystem(SUBSYSTEM)]
    try:
        return bisector.do_bisect(test)
    finally:
        del compiler_bisector.BACKENDS[SYSTEM]
        bisector.delete_bisect_status()


def left_out(describe: Callable[[], str]) -> bool:
    """Whether a bisection under way wants this rewrite left out; it counts them by this question."""
    from torch._inductor.compiler_bisector import CompilerBisector

    return CompilerBisector.bisection_enabled and CompilerBisector.disable_subsystem(SYSTEM, SUBSYSTEM, describe)
