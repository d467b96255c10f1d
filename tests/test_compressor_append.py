"""A compressor's memory, one call on: the op against its parts, found in decode steps, and the kernel."""

import math

import pytest
import torch

from dsv4_compile.lowerings.append import append
from dsv4_compile.lowerings.compressor import compressor
from dsv4_compile.lowerings.compressor_append import compressor_append, compressor_append_fp8, quantized
from dsv4_compile.patterns import append as of_append
from dsv4_compile.patterns import compressor as of_compressor
from dsv4_compile.patterns import compressor_append as of_memory
from dsv4_compile.patterns import pointwise, rope
from dsv4_compile.reference_model import DSV4, DSV4Config
from dsv4_compile.reference_model.layers import put
from dsv4_compile.reference_model.model import compress
from dsv4_compile.reference_model.schedule import CSA, HCA

KINDS = CSA, HCA


def case(B=2, S=13, T=3, n=2, P=7, m=4, d=20, dr=6, overlap=True, narrow=False, seed=0, open_windows=1, missing=2):
    """Arguments, slots and places as positions are: beyond the rings' rows. The last windows are open, the first lacks its
    oldest rows, and reads one that is written."""
    g = torch.Generator().manual_seed(seed)
    R, C = (1 + overlap) * m, (1 + overlap) * d
    values, gates = torch.randn(B, S, C, generator=g), 2 * torch.randn(B, S, C, generator=g)
    c, z, ape = (torch.randn(*shape, generator=g) for shape in ((B, T, C), (B, T, C), (m, C)))
    slot = torch.rand(B, S, generator=g).argsort(-1)[:, :T]
    target = torch.rand(B, P, generator=g).argsort(-1)[:, :n]
    index = torch.randint(0, S, (B, n, R), generator=g)
    index[:, 0, : min(missing, R - 1)] = -1
    index[:, 0, -1] = slot[:, 0]
    index[:, n - open_windows :] = -1
    weight, angle = 1 + torch.randn(d, generator=g) / 5, 3 * torch.randn(B, n, dr // 2, generator=g)
    entries = torch.randn(B, P, d, generator=g).to(torch.bfloat16 if narrow else torch.float32)
    position, place = slot + 5 * S, torch.randint(0, 9 * m, (B, T), generator=g)
    tables = angle.cos(), angle.sin()
    return [values, gates, entries, position, c, z, ape, place, index, weight, *tables, target, 1e-6, overlap]


def parts(values, gates, entries, slot, c, z, ape, place, index, *rest):
    """The chain, indices in range."""
    *of_windows, target, eps, overlap = rest
    slot, place = slot % values.shape[1], place % len(ape)
    values, gates = append(values, slot, c), append(gates, slot, z + ape[place])
    return values, gates, append(entries, target, compressor(values, gates, index, *of_windows, eps, overlap))


@pytest.mark.parametrize(("overlap", "narrow"), [(True, True), (False, False)])
def test_the_op_is_its_parts(overlap, narrow):
    args = case(overlap=overlap, narrow=narrow)
    want = parts(*args)
    for run in (compressor_append, compressor_append.meaning):
        assert all(torch.equal(a, b) for a, b in zip(run(*args), parts(*args), strict=True))
    assert not torch.equal(want[2], args[2]) and want[2].dtype == args[2].dtype
    torch.library.opcheck(compressor_append.target, args)
    torch.library.opcheck(compressor_append.writing_target, args)
    given = [t.clone() for t in args[:3]]
    assert compressor_append.writing_target(*given, *args[3:]) is None
    torch.testing.assert_close(tuple(given), want)


def scaled(args, seed=0):
    """Arguments of `compressor_append_fp8` from those of `compressor_append`."""
    codes, scales = quantized(args[2].float())
    return [*args[:2], codes, scales, *args[3:]]


def scaled_parts(values, gates, entries, scales, *rest):
    """The chain, quantised row by row."""
    values, gates, e = parts(values, gates, torch.zeros(entries.shape), *rest)
    for b, targets in enumerate(rest[-3].tolist()):
        for target in targets:
            largest = e[b, target].abs().max().item()
            exponent = -100 if largest == 0 else max(-100, math.ceil(math.log2(largest / 448)))
            scales, entries = scales.clone(), entries.clone()
            scales[b, target] = 2.0**exponent
            entries[b, target] = (e[b, target] / 2.0**exponent).to(entries.dtype)
    return values, gates, entries, scales


@pytest.mark.parametrize("overlap", [True, False])
def test_entries_in_e4m3_have_the_least_scale_that_fits(overlap):
    args = scaled(case(overlap=overlap))
    want = scaled_parts(*args)
    for run in (compressor_append_fp8, compressor_append_fp8.meaning):
        got = run(*args)
        assert all(torch.equal(a, b) for a, b in zip(got[:2], want[:2], strict=True)) and torch.equal(got[3], want[3])
        assert torch.equal(got[2].view(torch.uint8), want[2].view(torch.uint8))
    assert not torch.equal(want[3], args[3])
    tried = "test_autograd_registration", "test_faketensor"  # the others multiply numbers in e4m3
    torch.library.opcheck(compressor_append_fp8.target, args, test_utils=tried)
    torch.library.opcheck(compressor_append_fp8.writing_target, args, test_utils=tried)


def test_costs_count_rings_and_windows():
    cost = compressor_append.symbolic_cost().at(B=2, T=1, C=1024, n=1, R=8, d=512, bytes=1024)
    assert cost.write == 2 * (8 * 1024 + 2 * 512) and cost.read == 2 * (12 * 1024 + 8 * 8 * 512 + 8 * 8)


RULES = [
    *(pointwise.last_axis, pointwise.second_last_axis, rope.of_pairs, of_compressor.overlap, of_compressor.plain),
    *(of_append.written, of_memory.overlap, of_memory.plain, of_memory.scaled_overlap, of_memory.scaled_plain),
]


@pytest.mark.parametrize("rows", [17, 3])  # of the ring; another number, below it
@pytest.mark.parametrize("overlap", [True, False])
def test_positions_reach_the_op_where_it_takes_them_round_itself(overlap, rows, rewritten_by):
    """A remainder by any other number than the ring's rows stays."""
    args = case(S=17, T=2, overlap=overlap)

    def step(values, gates, entries, position, c, z, ape, place, index, weight, cos, sin, target):
        z = z + ape[place % 4]
        put(values, position % rows, c)
        put(gates, position % rows, z)
        put(entries, target, compress(values, gates, index, weight, 1e-6, cos, sin, overlap))
        return values.sum() + gates.sum()

    mine, theirs = ([t.clone() for t in args[:3]] for _ in "ab")
    got, report = rewritten_by(RULES, step, *mine, *args[3:-2])
    assert report.counts["entries"] == 1
    torch.testing.assert_close(got, step(*theirs, *args[3:-2]))
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    left = sum(part.times for part in report.graphs[0].left if part.op == "aten.remainder")
    assert left == (0 if rows == 17 else 1)


def compressors(dtype):
    """A model's three, of CSA, of its indexer and of HCA: as a function of hidden states and a state."""
    config = DSV4Config.tiny().replace(
        num_hidden_layers=2, layer_types=KINDS, mlp_layer_types=("moe", "moe"), num_nextn_predict_layers=0
    )
    model = DSV4(config).to(dtype).eval().requires_grad_(False)
    csa, hca = (layer.attn for layer in model.layers)
    for one in (csa, hca, csa.indexer):
        one.compressor.ape.normal_()

    def run(x, state, lengths=None):
        step = model.step(state.position, x.shape[1], lengths, state)
        memories = state.layers[0].compressor, state.layers[1].compressor, state.layers[0].indexer
        found = [a.compressor(x, step, m) for a, m in zip((csa, hca, csa.indexer), memories, strict=True)]
        state.position.copy_(step.chunk.end)
        return [e.clone() for e in found]

    return model, run


@pytest.mark.parametrize(
    ("T", "padded", "count", "dtype", "index_dtype"),
    [
        (1, False, 3, torch.float32, None),
        (1, False, 3, torch.bfloat16, None),
        (1, False, 3, torch.float32, torch.float8_e4m3fn),
        (3, False, 3, torch.bfloat16, torch.float8_e4m3fn),
        (3, False, 3, torch.float32, None),
        (9, False, 0, torch.float32, None),  # reads more rows than the ring has
        (3, True, 0, torch.float32, None),  # writes back some rows as they were
    ],
)
def test_calls_that_write_before_they_read_have_one_for_each_compressor(
    T, padded, count, dtype, index_dtype, rewritten_by
):
    model, run = compressors(dtype)
    lengths = torch.tensor([T, T - 1]) if padded else None
    B = 1 if (T, index_dtype) == (1, torch.float8_e4m3fn) else 2  # one scale then, alone
    x = torch.randn(6, B, T, model.config.hidden_size).to(dtype)
    state, other = (model.new_state(B, 64, draft=3, index_dtype=index_dtype) for _ in "ab")
    for s in (state, other):
        run(x[0], s)
    got, report = rewritten_by(RULES, run, x[1], state, lengths)
    assert report.counts["entries"] == report.sites.get("entries", 0) == count
    assert report.counts["compressor"] == report.sites["compressor"] == 3
    if index_dtype is not None:
        assert ("compressor_append_fp8", "cpu") not in report.runs and got[2].dtype == torch.float32
    tolerance = dict(rtol=1e-4, atol=1e-4) if dtype == torch.float32 else dict(rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(got, run(x[1], other, lengths), **tolerance)
    for mine, want in zip(state.layers, other.layers, strict=True):
        for a, b in zip(mine.parts(), want.parts(), strict=True):
            if torch.is_tensor(a):
                torch.testing.assert_close(a.float(), b.float(), **tolerance)


# On a GPU


GPU_SHAPES = [
    dict(B=1, S=8, P=9, d=512, dr=64),
    dict(B=1, S=8, P=9, d=512, dr=64, open_windows=1),
    dict(B=3, S=8, P=40, d=128, dr=64),
    dict(B=2, S=128, P=5, d=512, dr=64, m=128, overlap=False),
    dict(B=5, S=9, P=3, d=20, dr=6, m=3),
    dict(B=2, S=2, P=3, d=132, dr=132, m=1, overlap=False),
]


def one_token(shape, narrow, seed=0):
    return case(**(dict(open_windows=0) | shape | dict(T=1, n=1, narrow=narrow, seed=seed)))


@pytest.mark.gpu
@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_the_kernel_is_the_meaning(shape, narrow, kernel_parity):
    tolerance = dict(rtol=1e-2, atol=1e-2) if narrow else dict(rtol=2e-4, atol=2e-4)
    kernel_parity(compressor_append, *one_token(shape, narrow), others=one_token(shape, narrow, seed=1), **tolerance)


SCALED_SHAPES = [
    dict(B=1, S=8, P=9, d=128, dr=64),
    dict(B=1, S=8, P=9, d=128, dr=64, open_windows=1),
    dict(B=5, S=9, P=40, d=20, dr=6, m=3),
    dict(B=64, S=12, P=3, d=64, dr=16, overlap=False),
]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SCALED_SHAPES, ids=str)
def test_the_kernel_quantises_what_the_compressor_gives(shape):
    """To the bit, where the compressor's own kernel has made the entries; and writes nothing else."""
    args = scaled([a.cuda() if torch.is_tensor(a) else a for a in one_token(shape, False)])
    values, gates, e = parts(args[0], args[1], torch.zeros(args[2].shape, device="cuda"), *args[4:])
    target, before = args[-3].unsqueeze(-1), [t.clone() for t in args[:4]]
    codes, scale = quantized(e.take_along_dim(target, 1))
    got = compressor_append_fp8(*args)
    assert torch.equal(got[0], values) and torch.equal(got[1], gates)
    assert torch.equal(got[3], before[3].scatter(1, target, scale))
    as_bytes = before[2].view(torch.uint8).scatter(1, target.expand_as(codes), codes.view(torch.uint8))
    assert torch.equal(got[2].view(torch.uint8), as_bytes)
    compressor_append_fp8.writing_target(*args)
    for mine, theirs in zip(args[:4], got, strict=True):
        assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))


def alone(args):
    """By the compressor's own kernel, of which one team has all rows, as here."""
    from dsv4_compile.kernel import trying
    from dsv4_compile.kernels import compressor as of_kernels

    with trying() as first:
        parts(*args)
    forced = {which: next(of_kernels.configs(which[1])) for which in first.seen if which[0] is of_kernels.KERNEL}
    with trying(forced):
        return parts(*args)


@pytest.mark.gpu
@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_the_kernel_gives_the_bits_of_the_chain_in_place_and_writes_nothing_else(shape, narrow):
    args = [a.cuda() if torch.is_tensor(a) else a for a in one_token(shape, narrow)]
    before, want = [t.clone() for t in args[:3]], alone(args)
    memory = [t.data_ptr() for t in args[:3]]
    functional = compressor_append(*args)
    assert all(torch.equal(a, b) for a, b in zip(args[:3], before, strict=True))  # of copies
    compressor_append.writing_target(*args)
    assert memory == [t.data_ptr() for t in args[:3]]
    places = args[3] % args[0].shape[1], args[3] % args[0].shape[1], args[12]
    for got, w, also, old, place in zip(args[:3], want, functional, before, places, strict=True):
        assert torch.equal(got, w) and torch.equal(also, w)
        written = torch.zeros(got.shape[:2], dtype=torch.bool, device="cuda").scatter_(1, place, True)
        assert torch.equal(got[~written], old[~written])
