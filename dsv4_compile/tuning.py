"""Which configuration a kernel runs with: what this process asked for, and what the cache knows from timings.

A record of timings holds for one kernel file, one specialisation, one class of work, one list of candidates and one kind of
device. Without a record a kernel runs with its first candidate, which is what its cost model thinks best.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from .cache.key import Key
from .cache.store import Store
from .errors import CacheEntryBad

FEW = 8  # tokens for which products are bound by reading matrices; kernels of our own take them at once
ALIKE = 64  # tokens up to which results can be made not to depend on their number
ONE_SIZE = 8  # the class of all counts where they must not


@dataclass
class Settings:
    """Of the process. autotune: as the option, of the latest compile. batch_invariant: once asked for, it stays."""

    autotune: str = "cached"
    batch_invariant: bool = False

    def take(self, autotune: str, batch_invariant: bool) -> None:
        self.autotune = autotune
        self.batch_invariant |= batch_invariant


SETTINGS = Settings()


def alike() -> bool:
    """Whether results must not depend on the number of tokens."""
    return SETTINGS.batch_invariant


def few() -> int:
    """Up to how many tokens products are those of our own kernels."""
    return ALIKE if alike() else FEW


def of_tokens(count: int) -> int:
    """Numbers of tokens that share a configuration: the next power of two; all of them where results must not depend on it."""
    return ONE_SIZE if SETTINGS.batch_invariant else by_twos(count)


def by_twos(count: int) -> int:
    """The next power of two: for kernels whose configurations give the same bits, as far as they have to."""
    return 1 << max(0, count - 1).bit_length()


def rounded(count: int) -> int:
    """Sizes that share a configuration, whatever else is asked for: in steps of an eighth or a quarter of themselves."""
    step = max(32, 1 << max(0, count.bit_length() - 3))
    return -(-count // step) * step


@cache
def device() -> dict[str, str | int]:
    """What timings hold for: the kind of GPU, not which one."""
    import torch

    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    capability = f"{found.major}.{found.minor}"
    return {
        "name": found.name,
        "capability": capability,
        "processors": found.multi_processor_count,
        "memory_gib": found.total_memory >> 30,
    }


def key(
    kernel: str, source: str, shape: Any, work: tuple[int, ...], candidates: Sequence[Any], on: dict[str, str | int]
) -> Key:
    """Of a record. `work`: the class of what is not in the shape, such as the number of tokens."""
    about = {"op": kernel, "source": source, "shape": asdict(shape), "work": list(work)}
    return Key("tuning", about | {"candidates": [asdict(c) for c in candidates], "device": on})


def recorded(store: Store, of: Key) -> int | None:
    """The candidate that was chosen; None without a record that can be read."""
    data = store.peek(of)
    if data is None:
        return None
    try:
        choice = json.loads(data)["choice"]
    except (ValueError, KeyError, TypeError):
        choice = None
    if type(choice) is not int or not 0 <= choice < len(of.fields["candidates"]):
        store.put_aside(
            of.kind, of.digest, CacheEntryBad(store.place(of, ".json"), "its record of timings makes no sense")
        )
        return None
    return choice
