"""What a configuration of kernels/attention_wide.py costs: a model, fitted to timings on an H200, that says which is tried
first, and whether another kernel is. What clusters leave of the processors is for all kernels of attention."""

from collections.abc import Callable, Sequence
from typing import Any

CHOOSES = True  # no kernel's code depends on this file

PROCESSORS = 132
# Microseconds: of a round of blocks; of a tile, of 64 rows of it, the same where all processors are busy; of a tile more in a
# ring of one. Of the end of a cluster with 64 heads, and for each of its blocks; of what the first tiles take from memory.
ROUND, TILE, ROWS, BUSY, WAITED = 4.17, 0.75, 1.72, 0.34, 4.7
CLUSTER, BLOCK, FIRST = 1.16, 0.39, 0.74
READ = 4.2e6  # bytes a microsecond


def usable(splits: int) -> int:
    """Blocks in clusters of so many that run at once: a cluster lies in one part of the processors. What was seen fits seven
    parts of 18 and one of 6."""
    return (7 * (18 // splits) + 6 // splits) * splits


def estimate(shape, config, tokens: int, rows: int) -> float:
    """Microseconds: rounds of blocks, each with its tiles and, in a cluster, its end; and the first tiles of all."""
    blocks = tokens * -(-shape.heads // config.heads) * config.splits
    rounds = -(-blocks // usable(config.splits))
    tiles = max(1, -(-rows // (config.rows * config.splits)))
    part, wide = config.heads / 64, shape.d / 512
    each = ROUND + tiles * wide * (TILE + config.rows / 64 * (ROWS + BUSY * min(1.0, blocks / PROCESSORS)))
    if config.stages == 1:
        each += WAITED * wide * (tiles - 1)
    if config.splits > 1:
        each += wide * part * (CLUSTER + BLOCK * config.splits)
    first = 2 * shape.d * tokens * (min(rows, config.rows * config.stages * config.splits) + shape.heads) / READ
    return rounds * each + FIRST * min(first, 7.0)


JUDGED = (1, 2, 4, 8)  # numbers of tokens that a division is judged by


def excess(found: Sequence[Any], judge: Callable[[Any, int], float], kind: Callable[[Any], Any]) -> dict[Any, float]:
    """By kind: how much longer, at the worst of these numbers of tokens, the best of it takes than the best of all. judge:
    microseconds of one for so many."""
    worst: dict[Any, float] = {}
    for tokens in JUDGED:
        best: dict[Any, float] = {}
        for one in found:
            us = judge(one, tokens)
            best[kind(one)] = min(us, best.get(kind(one), us))
        least = min(best.values())
        worst = {of: max(us / least, worst.get(of, 0.0)) for of, us in best.items()}
    return worst


def of_one(found: Sequence[Any], judge: Callable[[Any, int], float]) -> list[Any]:
    """Configurations of the division, within which all give the same bits, whose excess is least."""
    worst = excess(found, judge, lambda config: config.division)
    chosen = min(worst, key=lambda division: worst[division])
    return [config for config in found if config.division == chosen]
