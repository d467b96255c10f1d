"""What a configuration of the kernels in `stream` costs: a model, fitted to timings, that says which is tried first."""

from dsv4_compile.kernels import digits, stored
from dsv4_compile.kernels.stream import LANES, ROWS, SMS, TEAM, Config, Work, processors

CHOOSES = True  # no kernel's code depends on this file

# Bytes a microsecond of all processors, of one, and of one from the second cache; instructions of all lanes of a processor a
# microsecond. Bytes in flight of a processor that memory's latency asks for, and of four bits: more keeps the next launch off.
READ, ALONE, CACHED, LANES_A_US = 4.35e6, 4.2e4, 7e4, 128 * 1750 * 0.7
IN_FLIGHT, IN_FLIGHT_4 = 24 << 10, 64 << 10
# Microseconds that a launch takes, and one that overlaps with the launch before; the end of a tile, also of 64 rows or more;
# each 64 rows by which the last tile is larger; a cluster; a stage of the rings, a block of a processor, blocks of a stage.
LAUNCH, FOLLOW, TILE_END, WIDE_END, LAST, CLUSTER = 1.9, 1.0, 0.05, 0.17, 0.7, 0.85
A_STAGE, A_BLOCK, A_SIZE = 0.16, 0.03, 0.15
# Of 16 and 32 bits, which in a layer gain by rings that are filled while the launch before ends.
IN_FLIGHT_16, A_STAGE_16, A_SIZE_16 = 96 << 10, 0.02, 0.06
# Instructions for a weight, for eight columns of vectors more, a stage, and a number of a vector.
DECODED = {"bf16": 1.0, "fp32": 7.0, "fp8": 3.6, "mxfp4": 3.0, "nvfp4": 4.2}
DIGITS = {"fp8": 1.8, "mxfp4": 2.4, "nvfp4": 2.9}
SPREAD = {"mxfp4": 1.6, "nvfp4": 1.9}  # of a single vector
COLUMNS, STAGE, STAGED, SPLIT_NUMBER = 0.6, 65, 4, 0.3


def cost(work: Work, config: Config) -> float:
    """Microseconds of a launch, roughly: what is fixed; the vectors are staged; then the larger of reading and decoding, and
    some of the other. Fitted to an H200."""
    f, wide, blocks = work.stored, config.rows > ROWS, work.grid(config) * work.grids * config.split
    waves = -(-blocks // (processors(config.split) * config.resident))
    present = min(config.resident, -(-blocks // SMS))  # thread blocks of a processor
    row_bytes = work.segments * f.row_bytes(work.K) * (1 + f.scale_share)
    busiest = waves * present * work.turns(config) * config.rows * row_bytes / config.split
    flying = present * config.warps * (config.stages - 1) * sum(work.stage_words(config)) * 4
    plain = stored.BITS[work.format] >= 16
    wanted = IN_FLIGHT_16 if plain else IN_FLIGHT_4 if stored.BITS[work.format] == 4 else IN_FLIGHT
    slow = max(1.0, min(wanted, busiest) / flying) ** 0.15
    reading = max(work.bytes / READ, busiest / ALONE) * slow
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
    ends = (WIDE_END if wide else TILE_END) * work.turns(config) / present
    if wide:
        ends += LAST * (config.rows / (TEAM * ROWS) - 1)
    ends += CLUSTER * (config.split - 1) ** 0.5
    a_stage, a_size = (A_STAGE_16, A_SIZE_16) if plain else (A_STAGE, A_SIZE)
    habits = a_stage * config.stages + A_BLOCK * config.resident + a_size * abs(config.blocks - 2)
    return (FOLLOW if config.overlaps else LAUNCH) + stream + staged + ends + habits
