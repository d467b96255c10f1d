"""Every error and warning of the compiler, as classes with fixed text: what is wrong, what was expected, what to do."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path


class DSV4Error(Exception):
    """Base of all errors raised by dsv4_compile."""


class DSV4Warning(UserWarning):
    """Something was skipped; the compiled model is right all the same."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, then all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"{hint} Known: {', '.join(known) or 'none'}."


class UnknownName(DSV4Error):
    """A name given by the user (option, mode, fusion, lowering) that does not exist."""

    def __init__(self, what: str, name: str, known: Iterable[str]):
        super().__init__(f"unknown {what} {name!r}{nearest(name, known)}")


class BadValue(DSV4Error):
    """An option whose value cannot be read."""

    def __init__(self, option: str, value: object, expected: str):
        super().__init__(f"option {option}={value!r}: expected {expected}.")


class NoCompiler(DSV4Error):
    """Inductor was asked for on a CPU that has no C++ compiler."""

    def __init__(self, looked_for: Iterable[str]):
        super().__init__(
            f"inner='inductor' needs a C++ compiler on CPU and none of {', '.join(looked_for)} is on PATH: install one, "
            "set CXX, or use options={'inner': 'eager'} (DSV4_INNER=eager) to run the rewritten graph without one."
        )


class RuleFailed(DSV4Error):
    """A rule raised, or rewrote a graph into one that breaks an invariant."""

    def __init__(self, rule: str, source: str, where: str, cause: BaseException):
        super().__init__(
            f"rule {rule} ({source}) failed at {where}: {type(cause).__name__}: {cause}. "
            f"Leave it out with options={{'disable': '{rule.split('/')[0]}'}}."
        )


class WrongRewrite(DSV4Error):
    """A rewrite that changes the result: found by `verify`."""

    def __init__(self, rule: str, source: str, where: str, layer: str, op: str, reason: str):
        super().__init__(
            f"rule {rule} ({source}) at {where} ({layer}) puts dsv4::{op} where it does not compute the same: {reason}. "
            f"Leave it out with options={{'disable': '{rule.split('/')[0]}'}}; verify does so for this place unless strict."
        )


class TracedAgain(DSV4Error):
    """A captured model that does not stay as it was captured."""

    def __init__(self) -> None:
        super().__init__(
            "the captured model was traced a second time, so its graphs are no longer those that were captured: do not call "
            "torch._dynamo.reset() in between, and give it arguments that one trace serves."
        )


class AlreadyWrong(DSV4Error):
    """A bisection of a model that is wrong without any rewrite."""

    def __init__(self, metric: str, value: float, threshold: float):
        super().__init__(
            f"{metric} is {value:.3g} without any rewrite, above the threshold {threshold:.3g}: no rewrite is to blame. Give a "
            "larger threshold, or look for the fault in torch.compile(backend='aot_eager')."
        )


class NotForAScript(DSV4Error):
    """A bisection was asked for a script that could not load what it needs."""

    def __init__(self, what: str):
        super().__init__(
            f"{what} cannot be written into a script: no other process can import it. Define it at the top of a module of its "
            "own, give an expression that makes the model with source=, or leave out script=."
        )


class LoweringFailed(DSV4Error):
    """Asking who runs an op, or writing its meaning into the graph, raised."""

    def __init__(self, op: str, where: str, cause: BaseException):
        super().__init__(
            f"lowering dsv4::{op} at {where} failed: {type(cause).__name__}: {cause}. The op's own call stays in the graph."
        )


class BrokenGraph(DSV4Error):
    """A pass left a graph that does not hold together."""

    def __init__(self, stage: str, what: str):
        super().__init__(f"after {stage}: {what}")


class PassesFailed(DSV4Error):
    """Something in the passes raised, or the graph that they left does not hold together."""

    def __init__(self, cause: BaseException):
        what = str(cause).partition("\n")[0]  # a graph may follow
        super().__init__(
            f"the dsv4 passes failed: {type(cause).__name__}: {what}. The graph stays as it was. Name passes in "
            "options={'disable': ...} until it works, or set {'strict': True} to see where it fails."
        )


class SitesMissing(DSV4Error):
    """Strict: a fusion did not find all the places that the model's modules hold."""

    def __init__(self, missing: Mapping[str, tuple[int, int]], near: Sequence[str]):
        found = ", ".join(f"fuse.{f} found {a} of {b}" for f, (a, b) in sorted(missing.items()))
        why = "".join(f"\n  near: {line}" for line in near[:5])
        super().__init__(f"strict: {found}; leave out strict or disable those passes to compile all the same.{why}")


class BadOp(DSV4Error):
    """An op or implementation declared against the rules of the house."""


class BadRule(DSV4Error):
    """A rule whose pattern cannot be traced or does not fit its op."""


GRADIENTS = (
    "the graph needs gradients, so dsv4 leaves it to Inductor unchanged: for the fused kernels call the model under "
    "torch.inference_mode() or torch.no_grad(), or freeze it with model.requires_grad_(False)."
)
FLOATS_ARE_INPUTS = (
    "floats that were passed in are inputs of this graph, as dynamic=True makes them, and patterns that read such "
    "numbers cannot match: hold them in a module, mark the sizes that vary with "
    "torch._dynamo.mark_dynamic instead, or set torch._dynamo.config.specialize_float = True."
)
NO_COMPILER = (
    "no C++ compiler found ({looked_for}): the rewritten graph runs op by op (inner='eager'). Install one or set CXX for "
    "generated code; set options={{'inner': 'eager'}} (DSV4_INNER=eager) to say that this is meant."
)


NOT_CAPTURED = (
    "the call is not captured as a CUDA graph: {why}. It runs kernel by kernel; options={{'capture': False}} says that this "
    "is meant."
)
CAPTURE_FAILED = (
    "capturing the call as a CUDA graph failed ({error}): it runs kernel by kernel from now on. Something in it waits for the "
    "GPU or allocates behind torch's back; options={{'capture': False}} says that this is meant."
)
INPUTS_MOVE = (
    "the call was captured {captures} times for {replays} replays, as large inputs or state lie elsewhere in every call: it "
    "runs kernel by kernel from now on. Write to one set of tensors, marked by torch._dynamo.mark_static_address."
)


class CacheEntryBad(DSV4Error):
    """A cache entry that is not what it says: cut short, changed, or put under another name."""

    def __init__(self, file: Path, why: str):
        self.why = why
        super().__init__(f"cache entry {file}: {why}. It is put aside and built again; nothing was loaded from it.")


class CacheFolderUnsafe(DSV4Error):
    """Compiled kernels run as code, so nobody else may write to where they lie."""

    def __init__(self, folder: Path):
        super().__init__(
            f"cache folder {folder} can be written by others, or belongs to another user: nothing is loaded from it. "
            f"Run `chmod go-w {folder}`, or choose a folder of your own with DSV4_CACHE_DIR."
        )


class CacheLockTimeout(DSV4Error):
    """Another living process holds the lock of an entry for longer than any build takes."""

    def __init__(self, lock: Path, seconds: float):
        super().__init__(
            f"another process has been building a cache entry for more than {seconds:g} s (lock {lock}): wait for it, stop "
            "it, or choose another folder with DSV4_CACHE_DIR."
        )


class CacheNotWritten(DSV4Error):
    """No room or no permission; told as a warning, since the kernel was built all the same."""

    def __init__(self, folder: Path, why: str):
        super().__init__(
            f"cache folder {folder}: {why}: the kernel was built and is not kept. Make room (`dsv4 cache prune`), or choose "
            "another folder with DSV4_CACHE_DIR."
        )


class CacheArchiveBad(DSV4Error):
    """A file given to `dsv4 cache import` that holds something else than entries."""

    def __init__(self, file: Path, why: str):
        super().__init__(f"cache archive {file}: {why}. Nothing of it was taken; write it with `dsv4 cache export`.")


class NoKernelCompiler(DSV4Error):
    """A kernel is needed and CuTeDSL cannot be imported."""

    def __init__(self, cause: BaseException):
        super().__init__(
            f"GPU kernels need CuTeDSL, which cannot be imported ({cause}): on Linux, pip install nvidia-cutlass-dsl==4.8.1 "
            "apache-tvm-ffi; or leave kernels out with options={'lowerings': 'cpu'} (DSV4_LOWERINGS=cpu)."
        )


class JitAfterWarmUp(DSV4Error):
    """A kernel had to be compiled although warm-up was declared over."""

    def __init__(self, what: str):
        super().__init__(
            f"a kernel was compiled after warm-up: {what}. Warm this shape up too, or precompile it with `dsv4 warm`."
        )
