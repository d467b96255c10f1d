"""What a configuration of the kernels in `stream` costs: a model, fitted to timings, that says which is tried first."""

from dsv4_compile.kernels import digits, stored
from dsv4_compile.kernels.stream import LANES, ROWS, SMS, Config, Work, processors

CHOOSES = True  # no kernel's code depends on this file
IN_FLIGHT = 96 << 10  # bytes of a processor: what memory's latency asks for
IN_FLIGHT_4 = 64 << 10  # of four bits: more keeps the next launch off

# Of the cost model: bytes a microsecond of all processors, of one, and of one from the second cache; instructions of all lanes
# of a processor a microsecond; microseconds that a launch takes, and one that overlaps with the launch before; of those, the
# ones in which rings fill; the end of a tile; a cluster. Instructions for a weight, and for a number of a vector.
READ, ALONE, CACHED, LANES_A_US = 4.35e6, 4.2e4, 7e4, 128 * 1750 * 0.7
LAUNCH, FOLLOW, HIDDEN, TILE_END, CLUSTER = 1.9, 1.0, 0.9, 0.05, 1.3
WIDE_END, WIDE_VECTOR = 0.15, 0.04  # the end of a tile of 64 rows or more, and what a vector adds to it
DECODED = {"bf16": 1.0, "fp32": 7.0, "fp8": 3.6, "mxfp4": 3.0, "nvfp4": 4.2}
DIGITS = {"fp8": 1.8, "mxfp4": 2.4, "nvfp4": 2.9}
SPREAD = {"mxfp4": 1.6, "nvfp4": 1.9}  # of a single vector
COLUMNS, STAGE, STAGED, SPLIT_NUMBER = 0.6, 65, 4, 5


def cost(work: Work, config: Config) -> float:
    """Microseconds of a launch, roughly: what is fixed; the vectors are staged; then the larger of reading and decoding, and
    some of the other. Fitted to an H200."""
    f, wide, blocks = work.stored, config.rows > ROWS, work.grid(config) * work.grids * config.split
    waves = -(-blocks // (processors(config.split) * config.resident))
    present = min(config.resident, -(-blocks // SMS))  # thread blocks of a processor
    row_bytes = work.segments * f.row_bytes(work.K) * (1 + f.scale_share)
    busiest = waves * present * work.turns(config) * config.rows * row_bytes / config.split
    flying = present * config.warps * (config.stages - 1) * sum(work.stage_words(config)) * 4
    wanted = IN_FLIGHT_4 if stored.BITS[work.format] == 4 else IN_FLIGHT
    slow = max(1.0, min(wanted, busiest) / flying) ** 0.15
    reading = max(work.bytes / READ, busiest / ALONE) * slow
    if config.overlaps:
        reading = max(0.2, reading - min(HIDDEN, min(busiest, flying) * SMS / READ))
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
    staged = waves * present * work.M * columns * (2 / CACHED + (SPLIT_NUMBER if wide else STAGED) / LANES_A_US)
    end = WIDE_END + WIDE_VECTOR * work.M if wide else TILE_END
    ends = end * work.turns(config) / present + CLUSTER * (config.split - 1) ** 0.5
    habits = 0.02 * config.stages + 0.02 * config.resident + 0.06 * abs(config.blocks - 2)
    return (FOLLOW if config.overlaps else LAUNCH) + stream + staged + ends + habits
