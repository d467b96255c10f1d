"""Every error and warning of the compiler, as classes with fixed text: what is wrong, what was expected, what to do."""

import difflib
from collections.abc import Iterable


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


class BadOp(DSV4Error):
    """An op or implementation declared against the rules of the house."""


class BadRule(DSV4Error):
    """A rule whose pattern cannot be traced or does not fit its op."""


GRADIENTS = (
    "the graph needs gradients, so dsv4 leaves it to Inductor unchanged: for the fused kernels call the model under "
    "torch.inference_mode() or torch.no_grad(), or freeze it with model.requires_grad_(False)."
)
NO_COMPILER = (
    "no C++ compiler found ({looked_for}): the rewritten graph runs op by op (inner='eager'). Install one or set CXX for "
    "generated code; set options={{'inner': 'eager'}} (DSV4_INNER=eager) to say that this is meant."
)
