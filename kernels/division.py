"""How the kernels that stream matrices are configured, and in which order they add up a row, its *division*.

A division decides a result's bits; which is the fastest depends on the number of vectors. Where results must not depend on that
(`alike`), a product has one division for all numbers of tokens: by the cost model, the one whose worst excess over what 1, 2, 4
or 8 tokens would choose for themselves is least. What changes no bits is chosen by the number all the same: how many warps
share the sums (`chains`), how many rows a tile has, how far ahead it reads, how many blocks there are.

The ops of a decode step that add numbers, and what the order depends on apart from static sizes; in brackets, with `alike`:

    linear, grouped_linear, linear_wide,    division, by the number of vectors; beyond those of a launch, several, and then
    linears, normed_linears, shared_expert,     another library [one division, launches in turn up to 64 vectors]
    output_projection
    moe                                     division, by the number of choices; beyond 8 tokens, another library [the same]
    experts                                 divisions of four products; beyond 8 tokens its parts run [the same]
    router, expert_gates                    nothing: a token has a block
    attention, with RoPE behind it          heads and rows of a tile, blocks and clusters of a list, by the class of counts
                                                [one division there too, for each length of lists]
    indexer                                 nothing: sums over heads in one order, and the choice is exact
    rms_norm, unit_norm, norm_rope, append  warps of a row, by the class of counts [one class]
    prologue, compressor(_append)           nothing: configured without a look at the count
    mhc_enter, mhc_boundary                 pieces of a row, the same for all counts; beyond 16 tokens their parts run
                                                [one launch up to 64 tokens]
    head                                    as these, and a product
    mhc_pre, mhc_post                       nothing: all pieces of a row are of one size

At one number of tokens, a token's bits depend neither on its slot nor on its neighbours: vectors are columns of an operand,
which never meet; a choice of an expert is multiplied by itself, whoever else chose that expert; all else has a warp, a block or
a cluster for a token.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from math import inf

from dsv4_compile.kernel import alike
from dsv4_compile.kernels import digits, stream
from dsv4_compile.kernels.stream import ROWS, SHARED, SMS, TEAM, Config, Work
from dsv4_compile.kernels.stream_cost import cost

CHOOSES = True  # no kernel's code depends on this file
TOKENS = 8  # of a launch, at most
JUDGED = (1, 2, 4)  # numbers of tokens that a division is judged by, with the most that fit
CHAINS = (1, 2, 4)
SUMS = 16  # of a block, at most


@dataclass(frozen=True)
class Division:
    """wide: by e4m3 tensor cores, with rounded vectors, or by those of bf16. split: blocks that share K. sums: between which a
    block deals out its columns, `run` of the format's blocks at a time; 0 where there is one. spread: see `Work.spreads`."""

    wide: bool
    split: int
    sums: int
    run: int
    spread: bool


def division(work: Work, config: Config) -> Division:
    """Configurations of one division give the same bits."""
    sums = config.teams * config.chains
    return Division(config.rows > ROWS, config.split, sums, config.blocks if sums > 1 else 0, work.spreads(config))


@dataclass(frozen=True)
class Needs:
    """What is asked of a configuration. spare: bytes of shared memory that it leaves. beside: it runs beside another stream, in
    blocks of as many warps."""

    spare: int = 0
    beside: bool = False

    def met(self, work: Work, c: Config) -> bool:
        if self.beside:
            return c.overlaps and c.split == 1 and work.fits(c) and work.needed(c) + self.spare <= SHARED
        return work.fits(c) and c.resident * work.shared(c) + self.spare <= SHARED


def configs_of(work: Work, needs: Needs = Needs()) -> list[Config]:
    """Those that fit, best first by `cost`."""
    if not alike():
        return ranked(work, needs, None)
    chosen = for_all(stream.arch(), (work.of(1), needs))
    return ranked(work, needs, chosen[0]) if chosen else []


@cache
def microseconds(work: Work) -> float:
    """Of a launch, as the cost model has it."""
    return cost(work, configs_of(work)[0])


def together(first: tuple[Work, Needs], second: tuple[Work, Needs], few: int) -> Iterator[tuple[Config, Config]]:
    """The configurations of two streams side by side, best first. few: of either, how many are tried."""
    streams = first, second
    if not alike():
        each = [ranked(work, needs, None)[:few] for work, needs in streams]
    else:
        chosen = for_all(stream.arch(), *((work.of(1), needs) for work, needs in streams))
        each = [ranked(*s, d) for s, d in zip(streams, chosen, strict=True)] if chosen else []
    pairs = [pair for pair in product(*each) if each and pair[0].warps == pair[1].warps]
    yield from sorted(pairs, key=lambda p: sum(cost(work, c) for (work, _), c in zip(streams, p, strict=True)))


def ranked(work: Work, needs: Needs, chosen: Division | None) -> list[Config]:
    """Those of a division, or, with one sum of a warp, of all of them."""
    if chosen is None:
        found = [c for c in every((1,), (True,)) if needs.met(work, c) and work.pays(c)]
    else:
        found = [c for c in of_any_kind(work) if division(work, c) == chosen and needs.met(work, c)]
    return sorted(found, key=lambda c: cost(work, c))


@cache
def every(chains: tuple[int, ...], spread: tuple[bool, ...]) -> list[Config]:
    """All that there are, with up to 16 sums of a block; with several of a warp where a block fills a processor."""
    rows = (ROWS, TEAM * ROWS, 2 * TEAM * ROWS, 4 * TEAM * ROWS)
    sizes = product(rows, (4, 8, 16), (3, 4, 6, 8), (1, 2, 4), (1, 2, 3, 4, 6), (1, 2, 4, 8), chains, spread)
    found = (Config(w, stages, blocks, many, r, split, n, s) for r, w, stages, blocks, many, split, n, s in sizes)
    found = (c for c in found if c.chains == 1 or c.overlaps)
    return [c for c in found if c.teams and c.teams * c.chains <= SUMS and c.resident * c.warps <= 48]


def of_any_kind(work: Work) -> list[Config]:
    """With several sums of a warp too, and with a single vector multiplied as one of several."""
    return every(CHAINS, (True, False) if digits.spread(work.format, work.M) else (True,))


@cache
def for_all(arch: str, *streams: tuple[Work, Needs]) -> tuple[Division, ...]:
    """For one launch of one or two streams, given for one token: the divisions that suit all numbers of tokens; none if not
    even one fits."""
    counts = range(TOKENS, 0, -1)
    most = next(((n, us) for n in counts if (us := launches(streams, n))), None)
    if most is None:
        return ()
    found = [most[1], *(launches(streams, n) for n in JUDGED if n < most[0])]
    best = [min(us.values()) for us in found]

    def excess(d: tuple[Division, ...]) -> tuple[float, float, float]:
        shares = [us.get(d, inf) / least for us, least in zip(found, best, strict=True)]
        return max(shares), sum(shares), shares[0]

    return min(found[0], key=excess)


def launches(streams: tuple[tuple[Work, Needs], ...], tokens: int) -> dict[tuple[Division, ...], float]:
    """What a launch for so many tokens costs, by divisions."""
    if len(streams) > 1 and 2 * streams[0][0].of(tokens).grids > SMS:
        return {}
    each = []
    for work, needs in ((w.of(tokens), needs) for w, needs in streams):
        by: dict[tuple[Division, int], float] = {}
        for c in of_any_kind(work):
            if needs.met(work, c) and work.pays(c):
                key = division(work, c), c.warps if needs.beside else 0
                by[key] = min(cost(work, c), by.get(key, inf))
        each.append(by)
    found: dict[tuple[Division, ...], float] = {}
    for parts in product(*(by.items() for by in each)):
        if len({warps for (_, warps), _ in parts}) == 1:
            divisions = tuple(d for (d, _), _ in parts)
            found[divisions] = min(sum(us for _, us in parts), found.get(divisions, inf))
    return found
