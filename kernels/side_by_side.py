"""Two streams of matrices in one launch: see `stream`. Each has blocks of its own, one a processor, as many as its bytes ask
for; a launch of its own would cost either of them its beginning and its end."""

from collections.abc import Iterator
from itertools import islice

import cutlass.cute as cute

from dsv4_compile.kernels.division import Needs, together
from dsv4_compile.kernels.stream import SMS, Config, Work
from dsv4_compile.kernels.stream_cost import READ, cost

FEW = 24  # candidates of either that are tried together
TRIED, MOST = 96, 8  # pairs


class Arena:
    """Shared memory, given out piece by piece: each stream takes it from the start."""

    def __init__(self, base, size: int):
        self.base, self.size, self.used = base, size, 0

    def allocate_tensor(self, dtype, layout, align: int):
        begin = -(-self.used // align) * align
        self.used = begin + cute.size(layout) * dtype.width // 8
        assert self.used <= self.size, f"{self.used} bytes of shared memory, of {self.size}"
        at = cute.recast_ptr((self.base + begin).align(align), dtype=dtype)
        return cute.make_tensor(at, layout)


def pairs(first: Work, second: Work, *more: int) -> Iterator[tuple[Config, Config]]:
    """Configurations of both, best first. more: bytes that a block of either needs beside."""
    if first.grids * 2 > SMS:
        return
    needs = (Needs(bytes_, beside=True) for bytes_ in more or (0, 0))
    both = zip((first, second), needs, strict=True)
    found = list(islice(together(*both, FEW), TRIED))
    yield from sorted(
        found, key=lambda pair: cost(first, pair[0]) + cost(second, pair[1]) + waited(first, second, pair)
    )[:MOST]


def memory(first: Work, second: Work, both: tuple[Config, Config], *more: int) -> int:
    """Bytes of a block."""
    needed = first.needed(both[0]), second.needed(both[1])
    return max(n + m for n, m in zip(needed, more or (0, 0), strict=True))


def blocks(first: Work, second: Work, both: tuple[Config, Config]) -> tuple[int, int]:
    """Of each grid of the first, and of the second, which has one: so that nobody has much more to read than others."""
    return shares(first, second, both)[1:]


def waited(first: Work, second: Work, both: tuple[Config, Config]) -> float:
    """Microseconds that others wait for the block that has most to read."""
    busiest = shares(first, second, both)[0]
    return (busiest - sum(w.bytes for w in (first, second)) / SMS) * SMS / READ


def shares(first: Work, second: Work, both: tuple[Config, Config]) -> tuple[float, int, int]:
    """Bytes of the block that has most; blocks of each grid of the first, and of the second."""
    tiles, bytes_ = zip(
        *(
            (w.tiles(c), c.rows * w.stored.row_bytes(w.K) * (1 + w.stored.scale_share))
            for w, c in zip((first, second), both, strict=True)
        ),
        strict=True,
    )
    found = []
    for of_second in range(1, min(tiles[1], SMS - first.grids) + 1):
        of_first = min(tiles[0], (SMS - of_second) // first.grids)
        loads = [-(-t // n) * b for t, n, b in zip(tiles, (of_first, of_second), bytes_, strict=True)]
        found.append((max(loads), sum(loads), of_first, of_second))
    busiest, _, *blocks = min(found)
    return busiest, *blocks
