"""How near is a block that did not match?  Pattern and graph laid side by side, going on past what differs.

The exact search of `unify` stops at the first difference, which may be the second node of twenty. Here a node that differs
is noted and stepped over: both sides go on to its operands, or one side alone where the other lacks the node.
"""

from collections import deque
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from .graph import head, strip, term, users, where
from .unify import Pattern


@dataclass(frozen=True)
class Alignment:
    """share: how much of the pattern has a counterpart, 0 to 1. The first difference, and the model's line there; `expected`
    is empty if no node differs, only a number or a shape does."""

    share: float
    expected: str
    found: str
    where: str


def align(pattern: Pattern, start: Node, anchor: Node) -> Alignment:
    """Lay `pattern` over the graph with its node `start` at `anchor`."""
    return _Walk(pattern, start, anchor).result


class _Walk:
    def __init__(self, pattern: Pattern, start: Node, anchor: Node):
        self.pattern = pattern
        self.pairs: dict[Node, Node] = {}  # pattern node -> graph node, equal or in its place
        self.equal: set[Node] = set()
        self.taken: set[Node] = set()
        self.tried: set[Node] = set()
        self.first: tuple[str, str, str] | None = None
        self.queue: deque[tuple[Any, Any]] = deque([(start, anchor)])
        while True:
            while self.queue:
                self.pair(*self.queue.popleft())
            if not self.climb():
                break
        share = len(self.equal) / max(1, len(pattern.nodes))
        self.result = Alignment(share, *(self.first or ("", "", where(anchor))))

    def pair(self, p: Any, m: Any) -> None:
        """Two nodes that stand in the same place."""
        if not (isinstance(p, Node) and isinstance(m, Node)):
            return
        p, m = strip(p), strip(m)
        if p in self.pattern.inputs or p in self.pairs or m in self.taken or m.op != "call_function":
            return
        ours, theirs = term(p).operands, term(m).operands
        if head(p) == head(m):
            self.equal.add(p)
            self.bind(p, m)
            self.queue.extend(zip(ours, _in_order(ours, theirs), strict=False))
            return
        if self.first is None:
            self.first = head(p), head(m), where(m)
        lacking = next((o for o in ours if _alike(o, m)), None)
        extra = next((o for o in theirs if _alike(p, o)), None)
        if extra is not None:
            self.queue.append((p, extra))
        elif lacking is not None:
            self.pairs[p] = m
            self.queue.append((lacking, m))
        else:
            self.bind(p, m)
            self.queue.extend(zip(ours, _in_order(ours, theirs), strict=False))

    def bind(self, p: Node, m: Node) -> None:
        self.pairs[p] = m
        self.taken.add(m)

    def climb(self) -> bool:
        """The next pattern node above what has a counterpart, against a reader of that: one like it, else the next one."""
        for p in self.pattern.nodes:
            if p in self.pairs or p in self.tried:
                continue
            for o in map(strip, p.all_input_nodes):
                readers = [u for u in users(self.pairs[o]) if u not in self.taken] if o in self.pairs else []
                readers = [u for u in readers if u.op == "call_function"]
                if readers:
                    self.tried.add(p)
                    self.queue.append((p, next((u for u in readers if head(u) == head(p)), readers[0])))
                    return True
        return False


def _alike(p: Any, m: Any) -> bool:
    return isinstance(p, Node) and isinstance(m, Node) and head(strip(p)) == head(strip(m))


def _in_order(ours: Any, theirs: Any) -> Any:
    """The graph's operands, turned round if they fit better that way."""
    if len(ours) != 2 or len(theirs) != 2:
        return theirs
    straight, turned = (sum(map(_alike, ours, t)) for t in (theirs, theirs[::-1]))
    return theirs[::-1] if turned > straight else theirs
