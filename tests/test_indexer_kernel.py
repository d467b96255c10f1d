"""The indexer's kernel: configurations on any machine; on a GPU, against exact scores, of which many are equal."""

import os
from importlib.util import find_spec
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

if find_spec("cutlass") is None:
    pytest.skip("GPU kernels need CuTeDSL, which has wheels for Linux only", allow_module_level=True)

from dsv4_compile.kernels import indexer as kernel
from dsv4_compile.kernels import indexer_scores
from dsv4_compile.kernels import stored as formats
from dsv4_compile.lowerings import indexer as lowering
from dsv4_compile.lowerings.indexer import indexer
from dsv4_compile.lowerings.rope import rope

FLASH, TURNED = kernel.Shape(64, 128), kernel.Shape(64, 128, "bf16", 64)
STORED = kernel.Shape(64, 128, "bf16", 64, "fp8")
SIZES = [1, 17, 2048, 8191, 32768, 100_000, 262_144, lowering.LARGEST]


@pytest.mark.parametrize("entries", SIZES)
@pytest.mark.parametrize("tokens", [1, 8, 64, 1 << 20])
def test_there_is_room_for_any_number_of_entries(entries, tokens):
    found = kernel.rank(FLASH, (tokens, min(kernel.rounded(entries), kernel.LARGEST)))
    assert found and len(set(found)) == len(found)
    for config in found:
        tiles = -(-entries // kernel.TILE)
        assert -(-tiles // config.blocks) * kernel.TILE <= config.room
        assert kernel.used(FLASH, config) <= 227 * 1024
        assert not config.apart or tokens <= 65535  # the second axis of a grid


def test_the_kernel_and_its_checker_agree():
    assert kernel.LARGEST == lowering.LARGEST
    assert max(c.blocks * (c.room - kernel.TILE) for c in configs(FLASH) if not c.apart) >= kernel.LARGEST


@pytest.mark.parametrize(
    "change, reason",
    [
        ({}, True),
        (dict(keys=torch.float8_e4m3fn), True),
        (dict(keys=torch.float8_e4m3fn, scaled=False), "with scales"),
        (dict(scaled=True), "with scales"),
        (dict(keys=torch.float8_e4m3fn, d=96), "96 channels in float8"),
        (dict(dtype=torch.float32), "bfloat16"),
        (dict(h=65), "at most 64"),
        (dict(d=48), "48 channels"),
        (dict(E=lowering.LARGEST + 1), "more than"),
        (dict(dr=12), "12 channels are turned"),
    ],
    ids=str,
)
def test_the_checker_says_why_not(change, reason):
    verdict = lowering.fits_the_kernel(meta(**change))
    assert verdict is True if reason is True else reason in verdict


def meta(dtype=torch.bfloat16, h=64, d=128, E=4096, dr=64, keys=None, scaled=None):
    scaled = keys is not None if scaled is None else scaled
    q, keys = (
        torch.empty(1, 1, h, d, dtype=dtype, device="meta"),
        torch.empty(1, E, d, dtype=keys or dtype, device="meta"),
    )
    w, visible = torch.empty(1, 1, h, device="meta"), torch.empty(1, 1, dtype=torch.int64, device="meta")
    cos = sin = torch.empty(1, 1, 1, dr // 2, device="meta")
    scale = torch.empty(1, E, 1, device="meta") if scaled else None
    return SimpleNamespace(q=q, keys=keys, w=w, visible=visible, k=512, cos=cos, sin=sin, scale=scale)


def configs(shape, target="sm_90a"):
    with patch.object(kernel, "arch", lambda: target):
        return list(kernel.configs(shape))


def every(shape):
    """What Hopper chooses from, and what others do, which runs there as well."""
    return [*configs(shape), *configs(shape, "sm_100a")]


def builds():
    if os.environ.get("DSV4_TEST_CONFIGS") == "all":
        return [(shape, c) for shape in (TURNED, STORED) for c in every(shape)]
    return [(TURNED, configs(TURNED, "sm_100a")[0]), (STORED, deep(STORED))]  # those with least to spare


def deep(shape):
    return next(c for c in configs(shape) if c.apart and c.scorers == 16)


@pytest.mark.parametrize(("shape", "config"), builds(), ids=str)
def test_it_compiles_without_a_gpu_and_does_not_spill(shape, config):
    """All configurations on demand: DSV4_TEST_CONFIGS=all."""
    for target in ("sm_90a",) if config.grouped else ("sm_90a", "sm_100a"):
        _, facts = kernel.KERNEL.build(shape, config, target)
        assert facts["kernels"] and all(k["stack"] == 0 for k in facts["kernels"].values()), facts


def test_products_of_a_warpgroup_are_hoppers():
    assert all(c.grouped for c in configs(STORED)) and not any(c.grouped for c in configs(STORED, "sm_100a"))


def e4m3_of(pair):
    """What a pair of bf16 made of moved bits stands for."""
    halves = torch.tensor([pair & 0xFFFF, pair >> 16 & 0xFFFF], dtype=torch.int32).to(torch.int16)
    return (halves.view(torch.bfloat16).double() / indexer_scores.E4M3.unit).tolist()


def test_channels_of_stored_keys_meet_those_of_the_queries():
    """Each lane's runs, together, are all channels once; keys decoded by moving bits are in the queries' order."""
    program = kernel.Program(STORED, configs(STORED, "sm_100a")[0])
    places = sorted(program.run(r, lane) for lane in range(4) for r in range(program.lines))
    assert places == list(range(16)) and kernel.Shape(64, 128).row == 256 and STORED.row == 128
    numbers = torch.randperm(254)[:128] % 127 + 128 * (torch.arange(128) % 2)  # no NaN
    row = numbers.to(torch.uint8).view(torch.float8_e4m3fn)
    words = row.view(torch.int32).tolist()
    for lane in range(4):
        for s in range(program.pieces):
            for j in range(4):  # as `decoded` has it
                run = 8 * program.run(2 * s + j // 2, lane)
                pairs = [indexer_scores.E4M3.order[i : i + 2] for i in range(0, 8, 2)][2 * (j % 2) : 2 * (j % 2) + 2]
                for pair, word in zip(pairs, formats.e4m3(words[16 * s + 4 * lane + j]), strict=True):
                    assert e4m3_of(word) == [row[run + p].item() for p in pair]


# On a GPU


def case(B=1, T=1, h=64, d=128, E=1000, seed=0, shared=False):
    """Small whole numbers: scores are exact in any order of their sums, and many are equal. `keys` is a part of a pool."""
    g = torch.Generator("cuda").manual_seed(seed)
    whole = lambda low, high, *shape: torch.randint(low, high, shape, generator=g, device="cuda")  # noqa: E731
    q, pool = whole(-2, 3, B, T, h, d).bfloat16(), whole(-1, 2, B, E + 1, d).bfloat16()
    w = whole(-2, 3, B, T, h).float() / 4
    visible = whole(0, E + 1, 1 if shared else B, T)
    visible[..., -1] = E
    return q, pool[:, :-1], w, visible


def stored(B=1, T=1, h=64, d=128, E=1000, seed=0, shared=False):
    """The same with keys in e4m3, scales that are powers of two, and all as `best` takes it."""
    q, keys, w, visible = case(B, T, h, d, E, seed, shared)
    g = torch.Generator("cuda").manual_seed(seed)
    scale = (2.0 ** torch.randint(-2, 3, (B, E + 1, 1), generator=g, device="cuda").float())[:, :-1]
    codes = torch.zeros(B, E + 1, d, device="cuda", dtype=torch.float8_e4m3fn)[:, :-1]
    codes.copy_(keys.float())
    return (q, codes, w, visible), scale, (q, codes.float() * scale, w, visible)


def best(q, keys, w, visible, k):
    """In ascending order, -1 at the end; of equal scores the lower entries."""
    E = keys.shape[1]
    out = torch.full((*q.shape[:2], k), -1, device="cuda")
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            n = int(visible[b % len(visible), t])
            score = w[b, t] @ torch.relu(q[b, t].float() @ keys[b].float().T)
            pick = score[:n].sort(descending=True, stable=True).indices[:k].sort().values
            out[b, t, : len(pick)] = pick
    assert E >= k
    return out


@pytest.mark.gpu
@pytest.mark.parametrize("k", [1, 3, 512, 1000])
@pytest.mark.parametrize("E", [1, 15, 16, 17, 513, 1000, 2048, 5000, 33_000, 262_144])
def test_the_best_entries_and_of_equal_ones_the_lower(E, k, poisoned):
    for seed, (B, T, shared) in enumerate([(1, 1, False), (3, 1, False), (2, 2, True), (8, 1, False)]):
        args = case(B, T, E=E, seed=seed, shared=shared)
        for _ in range(3):
            assert torch.equal(indexer(*args, min(k, E)), best(*args, min(k, E)))


@pytest.mark.gpu
@pytest.mark.parametrize(("h", "d"), [(1, 32), (5, 64), (16, 32), (33, 96), (64, 128)])
def test_other_sizes(h, d, poisoned):
    args = case(2, 3, h, d, 3001)
    assert torch.equal(indexer(*args, 100), best(*args, 100))


def quarters(B, T, dr, seed=0):
    """cos and sin [B, T, 1, dr / 2] of quarter turns: whole numbers stay whole."""
    turns = torch.randint(0, 4, (B, T, 1, dr // 2), generator=torch.Generator().manual_seed(seed)).cuda()
    return (turns % 2 == 0) * (1.0 - turns), (turns % 2 == 1) * (2.0 - turns)


@pytest.mark.gpu
@pytest.mark.parametrize(("h", "d", "dr"), [(64, 128, 64), (8, 32, 16), (16, 64, 64), (5, 96, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_queries_are_turned_and_weights_may_be_bf16(h, d, dr, dtype, poisoned):
    for E in (600, 20_000):
        for B, T, of in ((2, 1, 2), (1, 3, 1), (2, 2, 1)):
            q, keys, w, visible = case(B, T, h, d, E)
            tables = quarters(of, T, dr)
            turned = rope(q, *tables, False)
            assert (turned != q).any() and (turned == turned.round()).all()
            assert torch.equal(
                indexer(q, keys, w.to(dtype), visible, 100, *tables), best(turned, keys, w, visible, 100)
            )


@pytest.mark.gpu
@pytest.mark.parametrize("config", every(TURNED), ids=str)
def test_every_configuration(config):
    for E in (700, 2000, 9000, 40_000):
        if not config.covers(E):
            continue
        q, keys, w, visible = case(3, 1, E=E)
        tables, out = quarters(3, 1, 64), torch.full((3, 512), -7, device="cuda")
        flat = (
            q.view(3, 64, 128),
            keys,
            None,
            w.view(3, 64).bfloat16(),
            visible.view(-1),
            *(t.view(3, 32) for t in tables),
        )
        kernel.run(TURNED, config, *flat, out, 1)
        assert torch.equal(out.view(3, 1, 512), best(rope(q, *tables, False), keys, w, visible, 512)), E


@pytest.mark.gpu
@pytest.mark.parametrize("k", [1, 100, 512])
@pytest.mark.parametrize("E", [1, 15, 16, 17, 513, 1000, 2048, 5000, 33_000, 262_144])
def test_the_best_of_stored_keys(E, k, poisoned):
    for seed, (B, T, shared) in enumerate([(1, 1, False), (3, 1, False), (2, 2, True), (8, 1, False)]):
        args, scale, plain = stored(B, T, E=E, seed=seed, shared=shared)
        for _ in range(3):
            got = indexer(*args, min(k, E), None, None, scale)
            assert torch.equal(got, best(*plain, min(k, E)))


@pytest.mark.gpu
@pytest.mark.parametrize(("h", "d", "dr"), [(1, 64, 0), (16, 64, 64), (33, 128, 8), (64, 128, 64)])
def test_stored_keys_of_other_sizes_and_turned_queries(h, d, dr, poisoned):
    for E in (600, 20_000):
        (q, codes, w, visible), scale, plain = stored(2, 3, h, d, E)
        tables = quarters(2, 3, dr) if dr else (None, None)
        turned = rope(q, *tables, False) if dr else q
        got = indexer(q, codes, w.bfloat16(), visible, 100, *tables, scale)
        assert torch.equal(got, best(turned, *plain[1:], 100))


@pytest.mark.gpu
@pytest.mark.parametrize("config", every(STORED), ids=str)
def test_every_configuration_of_stored_keys(config):
    for E in (700, 2000, 9000, 40_000):
        if not config.covers(E):
            continue
        (q, codes, w, visible), scale, plain = stored(3, 1, E=E)
        tables, out = quarters(3, 1, 64), torch.full((3, 512), -7, device="cuda")
        flat = (
            q.view(3, 64, 128),
            codes.view(torch.uint8),
            scale.squeeze(-1),
            w.view(3, 64).bfloat16(),
            visible.view(-1),
        )
        kernel.run(STORED, config, *flat, *(t.view(3, 32) for t in tables), out, 1)
        assert torch.equal(out.view(3, 1, 512), best(rope(q, *tables, False), *plain[1:], 512)), E


@pytest.mark.gpu
@pytest.mark.parametrize("config", [None, *{(c.grouped, c.apart): c for c in every(STORED) if c.room > 8192}.values()])
@pytest.mark.parametrize("E", [3000, 20_000])
def test_the_choice_among_stored_keys_is_better_than_eagers(E, config):
    """Random numbers, every code among them, scales and queries far apart: what is chosen is worse than what is not by less
    than scores of eager bf16 are wrong by."""
    q, w = torch.randn(2, 1, 64, 128), (torch.randn(2, 1, 64) * 64**-0.5).cuda()
    q = (q * 2.0 ** torch.randint(-3, 4, (2, 1, 64, 1))).bfloat16().cuda()
    codes = torch.randint(0, 256, (2, E, 128), device="cuda", dtype=torch.uint8)
    codes = torch.where(codes % 128 == 127, 0, codes).view(torch.float8_e4m3fn)
    scale = 2.0 ** torch.randint(-9, -6, (2, E, 1), device="cuda").float()
    keys, visible = (codes.float() * scale).bfloat16(), torch.tensor([[E], [E - 5]], device="cuda")
    if config is None:
        pick = indexer(q, codes, w, visible, 512, None, None, scale)
    else:
        shape, pick = kernel.Shape(64, 128, "fp32", 0, "fp8"), torch.full((2, 512), -7, device="cuda")
        flat = q.view(2, 64, 128), codes.view(torch.uint8), scale.squeeze(-1), w.view(2, 64), visible.view(-1)
        kernel.run(shape, config, *flat, None, None, pick, 1)
    for b in range(2):
        n = int(visible[b, 0])
        score = w[b, 0].double() @ torch.relu(q[b, 0].double() @ keys[b, :n].double().T)
        eager = (torch.relu(q[b, 0] @ keys[b, :n].T) * w[b, 0].bfloat16().unsqueeze(-1)).sum(0).double()
        chosen = torch.zeros(n, dtype=torch.bool, device="cuda")
        chosen[pick.view(2, 512)[b]] = True
        lost = score[~chosen].max() - score[chosen].min()
        assert int(chosen.sum()) == 512 and lost <= (eager - score).abs().max() / 4


@pytest.mark.gpu
@pytest.mark.parametrize("E", [2048, 40_000])
def test_a_captured_call_reads_how_many_entries_are_seen(E):
    args = case(2, 1, E=E)
    indexer(*args, 512)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = indexer(*args, 512)
    for n in (0, 1, 511, 512, 513, E // 2 + 1, E):
        for a, b in zip(args, case(2, 1, E=E, seed=n), strict=True):
            a.copy_(b)
        args[-1][0] = n
        for _ in range(2):
            got.fill_(-7)
            graph.replay()
            assert torch.equal(got, best(*args, 512)), n


@pytest.mark.gpu
@pytest.mark.parametrize("E", [3000, 50_000])
def test_scores_that_differ_little(E):
    """Of random numbers: only entries whose scores are equal in fp32, nearly, may stand for each other."""
    q, keys, w = torch.randn(2, 1, 64, 128), torch.randn(2, E, 128), torch.randn(2, 1, 64) * 64**-0.5
    q, keys, w = q.bfloat16().cuda(), keys.bfloat16().cuda(), w.cuda()
    visible = torch.tensor([[E], [E - 5]], device="cuda")
    pick = indexer(q, keys, w, visible, 512)
    for b in range(2):
        n = int(visible[b, 0])
        score = w[b, 0].double() @ torch.relu(q[b, 0].double() @ keys[b, :n].double().T)
        chosen = torch.zeros(n, dtype=torch.bool, device="cuda")
        chosen[pick[b, 0]] = True
        assert int(chosen.sum()) == 512 and score[chosen].min() >= score[~chosen].max() - 1e-4
