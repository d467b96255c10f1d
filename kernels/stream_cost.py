"""What a configuration of the kernels in `stream` costs: a model, fitted to timings, that says which is tried first."""

from dataclasses import dataclass

from dsv4_compile.kernels import digits, stored
from dsv4_compile.kernels.stream import LANES, ROWS, SMS, TEAM, Config, Work, processors

CHOOSES = True  # no kernel's code depends on this file

# Bytes a microsecond of all processors, of one, and of one from the second cache; instructions of all lanes of a processor a
# microsecond.
READ, ALONE, CACHED, LANES_A_US = 4.35e6, 4.2e4, 7e4, 128 * 1750 * 0.7
# Microseconds that a launch takes, and one that overlaps with the launch before; a block of a processor.
LAUNCH, FOLLOW, A_BLOCK = 1.9, 1.0, 0.03
# Instructions for a weight, for eight columns of vectors more, a stage, and a number of a vector.
DECODED = {"bf16": 1.0, "fp32": 7.0, "fp8": 3.6, "mxfp4": 3.0, "nvfp4": 4.2}
DIGITS = {"fp8": 1.8, "mxfp4": 2.4, "nvfp4": 2.9}
SPREAD = {"mxfp4": 1.6, "nvfp4": 1.9}  # of a single vector
COLUMNS, STAGE, STAGED = 0.6, 65, 4


@dataclass(frozen=True)
class Habits:
    """What differs by how weights are stored and computed with. in_flight: bytes of a processor that should be on their way,
    slow: the power by which it is slower with fewer of them. In microseconds: the end of a tile; 64 rows by which the last tile
    is larger; a cluster, times its blocks but one to a power; a stage of the rings, blocks of a stage beside 2. number:
    instructions for a number of a vector."""

    in_flight: int
    slow: float = 0.15
    end: float = 0.05
    last: float = 0.0
    cluster: float = 0.85
    power: float = 0.5
    a_stage: float = 0.16
    a_size: float = 0.15
    number: float = STAGED


PLAIN = Habits(96 << 10, a_stage=0.02, a_size=0.06)  # in a layer they gain by rings that are filled while others run
DECODING = {8: Habits(24 << 10), 4: Habits(64 << 10)}
WIDE = {
    8: Habits(92 << 10, 0.21, end=0.0, last=0.08, cluster=0.5, power=0.0, a_stage=0.0, a_size=0.0, number=2.8),
    4: Habits(64 << 10, end=0.17, last=0.7, number=0.3),
}


def habits(work: Work, config: Config) -> Habits:
    bits = stored.BITS[work.format]
    return PLAIN if bits >= 16 else (WIDE if config.rows > ROWS else DECODING)[bits]


def cost(work: Work, config: Config) -> float:
    """Microseconds of a launch, roughly: what is fixed; the vectors are staged; then the larger of reading and decoding, and
    some of the other. Fitted to an H200."""
    f, wide, blocks = work.stored, config.rows > ROWS, work.grid(config) * work.grids * config.split
    h = habits(work, config)
    waves = -(-blocks // (processors(config.split) * config.resident))
    present = min(config.resident, -(-blocks // SMS))  # thread blocks of a processor
    row_bytes = work.segments * f.row_bytes(work.K) * (1 + f.scale_share)
    busiest = waves * present * work.turns(config) * config.rows * row_bytes / config.split
    flying = present * config.warps * (config.stages - 1) * sum(work.stage_words(config)) * 4
    reading = max(work.bytes / READ, busiest / ALONE) * max(1.0, min(h.in_flight, busiest) / flying) ** h.slow
    each = STAGE / (config.blocks * f.block * ROWS / LANES)
    if wide:
        costs = SPREAD if work.spreads(config) else DIGITS
        each += costs[work.format] + COLUMNS * (digits.eights(work.format, work.M) - 1)
    else:
        each += DECODED[work.format]
    columns = work.segments * work.columns(config)
    numbers = waves * present * work.turns(config) * config.rows * columns
    decoding = numbers * each / LANES_A_US * max(1.0, 16 / (present * config.warps)) ** 0.45
    stream = (reading**3 + decoding**3) ** (1 / 3)
    staged = waves * present * work.M * columns * (2 / CACHED + h.number / LANES_A_US)
    ends = h.end * work.turns(config) / present + h.last * (config.rows / (TEAM * ROWS) - 1)
    if config.split > 1:
        ends += h.cluster * (config.split - 1) ** h.power
    rest = h.a_stage * config.stages + A_BLOCK * config.resident + h.a_size * abs(config.blocks - 2)
    return (FOLLOW if config.overlaps else LAUNCH) + stream + staged + ends + rest
