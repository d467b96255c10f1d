"""The kernels of attention: configurations on any machine; on a GPU, against a formula in fp64 and against plain bf16."""

from importlib.util import find_spec

import pytest
import torch

if find_spec("cutlass") is None:
    pytest.skip("GPU kernels need CuTeDSL, which has wheels for Linux only", allow_module_level=True)

from dsv4_compile.kernels import attention as kernel
from dsv4_compile.kernels import attention_wide as wide
from dsv4_compile.lowerings.attention import attention

FLASH, PRO, NANO = (
    kernel.Shape(512, 64, True, False, 64),
    kernel.Shape(512, 128, True, False, 64),
    kernel.Shape(64, 6, True, False, 0),
)


@pytest.mark.parametrize("shape", [FLASH, PRO, NANO], ids=["flash", "pro", "nano"])
def test_every_configuration_fits_and_covers_all_heads(shape):
    found = list(kernel.configs(shape))
    assert len(set(found)) == len(found) > 10
    for config in found:
        plan = kernel.Plan(shape, config)
        assert 4 * plan.words <= 227 * 1024 and plan.values + config.heads * plan.value_row <= plan.rescale
        assert plan.of_m * plan.of_n * plan.of_k <= kernel.WARPS
        assert plan.of_n * plan.n_tiles * 8 == config.rows and plan.of_m * 16 == config.heads


def test_one_token_is_spread_over_the_gpu_and_many_tokens_are_not_split():
    one, many = (kernel.rank(FLASH, (tokens, 640))[0] for tokens in (1, 4096))
    assert one.splits > 4 and one.heads == 16
    assert many.splits == 1


@pytest.mark.parametrize("shape", [FLASH, PRO, kernel.Shape(256, 20, False, True, 0)], ids=["flash", "pro", "256"])
def test_every_wide_configuration_fits(shape):
    shape = wide.Shape(**vars(shape))
    found = list(wide.configs(shape))
    assert len(set(found)) == len(found) > 10
    for config in found:
        assert wide.used(shape, config) <= 227 * 1024 and config.rows % 16 == 0
        assert config.heads % 16 == 0 and config.splits <= 8


def test_products_of_warpgroups_are_for_many_tokens_of_wide_heads():
    assert all(kernel.wider(shape, (64, rows)) for shape, rows in ((FLASH, 640), (PRO, 1280)))
    assert not any(kernel.wider(shape, (64, 640)) for shape in (NANO, kernel.Shape(512, 64, True, False, 12)))
    assert not kernel.wider(FLASH, (1, 640))


# On a GPU


def case(B=2, T=3, h=6, d=64, S=200, W=40, E=300, K=70, dtype=torch.bfloat16, seed=0, none=0.2):
    """Random arguments of the op, up to the sink's place; a share of both lists is -1; the second list may be absent."""
    g = torch.Generator().manual_seed(seed)
    q, keys = torch.randn(B, T, h, d, generator=g).to(dtype), torch.randn(B, S, d, generator=g).to(dtype)
    sink = torch.randn(h, generator=g)
    lists = []
    for rows, length in ((S, W), (E, K)):
        drawn = torch.randint(0, rows, (B, T, length or 0), generator=g)
        drawn[torch.rand(drawn.shape, generator=g) < none] = -1
        lists.append(drawn)
    if K is None:
        return q, keys, lists[0], sink, None, None, d**-0.5
    return q, keys, lists[0], sink, torch.randn(B, E, d, generator=g).to(dtype), lists[1], d**-0.5


def gathered(keys, window, entries, index):
    """Rows [B, T, W + K, d], with 0 where there is none, and which there are."""
    pairs = [(keys, window)] if index is None else [(keys, window), (entries, index)]
    rows, there = [], []
    for x, i in pairs:
        batch = torch.arange(len(x), device=x.device).view(-1, 1, 1)
        got = x[batch, i.clamp(min=0)] if x.shape[1] else x.new_zeros(*i.shape, x.shape[2])
        rows.append(got.masked_fill((i < 0).unsqueeze(-1), 0))
        there.append(i >= 0)
    return torch.cat(rows, 2), torch.cat(there, 2)


def formula(q, keys, window, sink, entries, index, scale, sink_on_window):
    """In fp64; 0 for a query without rows."""
    rows, there = gathered(keys, window, entries, index)
    rows, s = rows.double(), torch.einsum("bthd,btrd->bthr", q.double(), rows.double()) * scale
    if sink_on_window:
        s[..., : window.shape[-1]] += sink.double().view(-1, 1)
    s = s.masked_fill(~there.unsqueeze(2), float("-inf"))
    floor = (
        torch.full_like(s[..., :1], -1e300) if sink_on_window else sink.double().view(1, 1, -1, 1).expand_as(s[..., :1])
    )
    p = torch.softmax(torch.cat([s, floor], -1), -1)[..., :-1]
    return p @ rows


def plain(q, keys, window, sink, entries, index, scale, sink_on_window):
    """As eager PyTorch does it in q's dtype: scores rounded, softmax in fp32, weights rounded."""
    rows, there = gathered(keys, window, entries, index)
    s = (q @ rows.mT * scale).float()
    if sink_on_window:
        s[..., : window.shape[-1]] += sink.view(-1, 1)
    s = s.masked_fill(~there.unsqueeze(2), float("-inf"))
    if not sink_on_window:
        s = torch.cat([s, sink.view(1, 1, -1, 1).expand(*s.shape[:3], 1)], -1)
    p = torch.softmax(s, -1).to(q.dtype)
    return (p[..., : rows.shape[2]] @ rows).nan_to_num()


def on_gpu(args):
    return [a.cuda() if isinstance(a, torch.Tensor) else a for a in args]


def error(got, want):
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-30)).item()


@pytest.fixture
def check(poisoned):
    """check(*args): three launches, each against the formula; unnamed rows are NaN. In bf16, no worse than plain bf16."""

    def run(*args):
        args = on_gpu(args)
        q, keys, window, _, entries, index, *_ = args
        want, eager = formula(*args), plain(*args)
        for x, lists in ((keys, window), (entries, index)):
            for b in range(len(x) if x is not None else 0):
                unnamed = torch.ones(x.shape[1], dtype=torch.bool, device=x.device)
                unnamed[lists[b][lists[b] >= 0]] = False
                x[b, unnamed] = float("nan")
        implementation, reasons = attention.claim(attention.arguments(*args))
        assert implementation is not None and implementation.device == "cuda", reasons
        for _ in range(3):
            got = attention(*args)
            assert got.shape == q.shape and got.dtype == q.dtype and got.is_contiguous()
            if q.dtype == torch.float32:
                torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
            else:
                torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=1e-2)
                assert error(got, want) <= 1.05 * error(eager, want) + 1e-9

    return run


# tiles are of 32 or 64 rows
LENGTHS = [
    (0, 0),
    (1, None),
    (0, 1),
    (31, None),
    (32, None),
    (33, 0),
    (5, 59),
    (64, None),
    (65, None),
    (40, 89),
    (128, 512),
]


@pytest.mark.gpu
@pytest.mark.parametrize("sink_on_window", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("W", "K"), LENGTHS)
def test_lengths(W, K, dtype, sink_on_window, check):
    check(*case(W=W, K=K, dtype=dtype), sink_on_window)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("B", "T", "h", "d"),
    [(1, 1, 64, 512), (2, 1, 128, 512), (1, 3, 1, 64), (3, 1, 17, 128), (5, 2, 33, 64), (2, 2, 5, 48)],
)
def test_queries_heads_and_channels(B, T, h, d, dtype, check):
    check(*case(B=B, T=T, h=h, d=d, dtype=dtype, W=128, K=300), False)


@pytest.mark.gpu
@pytest.mark.parametrize("sink_on_window", [False, True])
@pytest.mark.parametrize(("h", "d"), [(64, 512), (128, 512), (70, 256)])
def test_many_tokens(h, d, sink_on_window, check):
    shape = kernel.Shape(d, h, True, sink_on_window, 0)
    assert kernel.wider(shape, (64, 512))
    check(*case(B=11, T=6, h=h, d=d, W=128, K=300), sink_on_window)


@pytest.mark.gpu
def test_without_a_second_list_the_sink_in_either_place(check):
    for sink_on_window in (False, True):
        check(*case(B=1, T=1, h=64, d=512, W=128, K=None), sink_on_window)


@pytest.mark.gpu
@pytest.mark.parametrize("sink_on_window", [False, True])
def test_long_lists_are_shared_by_clusters(sink_on_window, check):
    args = case(B=1, T=1, h=64, d=512, S=128, W=128, E=9000, K=8192)
    assert kernel.rank(kernel.Shape(512, 64, True, sink_on_window, 0), (1, 8320))[0].chunks > 1
    check(*args, sink_on_window)
    args[5][:, :, 200:] = -1  # whole clusters have nothing
    check(*args, sink_on_window)


@pytest.mark.gpu
def test_queries_without_any_row_give_zero(check):
    check(*case(none=1.0), False)
    args = case()
    args[2][1, 0], args[5][1, 0] = -1, -1  # one query among others
    check(*args, False)


@pytest.mark.gpu
def test_requests_of_unequal_lengths(check):
    args = case(B=4, T=1, h=64, d=512, W=128, K=512, none=0.0)
    for b, length in enumerate((0, 1, 33, 512)):
        args[5][b, :, length:] = -1
    args[2][2, :, 5:] = -1
    check(*args, False)


@pytest.mark.gpu
def test_a_row_named_twice_counts_twice(check):
    args = case(none=0.0)
    args[2][:], args[5][:, :, ::2] = 7, 3
    check(*args, False)


@pytest.mark.gpu
@pytest.mark.parametrize("place", [0, 31, 32, 64, 200, 639])
def test_the_largest_score_may_come_in_any_tile(place, check):
    """What was summed before must shrink, and what comes after must be small against it."""
    q, keys, window, sink, entries, index, scale = case(B=1, T=1, h=64, d=512, S=128, W=128, E=512, K=512)
    window[:], index[:] = torch.arange(128), torch.arange(512)
    x, at = (keys, place) if place < 128 else (entries, place - 128)
    x[0, at] = q[0, 0, :8].sum(0) * 2
    check(q, keys, window, sink, entries, index, scale, False)


@pytest.mark.gpu
@pytest.mark.parametrize("K", [None, 40, 1000])
def test_the_sum_is_divided_once_however_many_tiles_and_blocks_there_are(K):
    q, keys, window, sink, entries, index, scale = on_gpu(case(B=1, T=2, h=64, d=512, K=K, none=0.0))
    for x in (keys, entries):
        if x is not None:
            x[:] = keys[0, 0].clone()
    got = attention(q, keys, window, sink - 1e4, entries, index, scale, False)
    torch.testing.assert_close(got, keys[:1, :1].expand_as(got), rtol=2**-8, atol=0)


@pytest.mark.gpu
def test_the_sink_goes_where_it_belongs():
    """Compressed logits (1.2, -0.3, 0.7) with values (1, 2, 3), window logits (0.1, 2.0) with values (10, 20), sink 0.5."""
    values = {10.0: 0.1, 20.0: 2.0, 1.0: 1.2, 2.0: -0.3, 3.0: 0.7}
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.06)):
        rows, q = torch.zeros(1, 5, 64), torch.zeros(1, 1, 1, 64)
        rows[0, :, 0], rows[0, :, 1], q[..., 1] = torch.tensor(list(values)), torch.tensor(list(values.values())), 1.0
        rows, q = rows.to(dtype).cuda(), q.to(dtype).cuda()
        window, index = torch.tensor([[[0, 1]]]).cuda(), torch.tensor([[[0, 1, 2]]]).cuda()
        args = q, rows[:, :2].contiguous(), window, torch.tensor([0.5]).cuda(), rows[:, 2:].contiguous(), index, 1.0
        assert abs(attention(*args, False)[0, 0, 0, 0].item() - 10.462428) < tolerance
        assert abs(attention(*args, True)[0, 0, 0, 0].item() - 13.581852) < tolerance


@pytest.mark.gpu
def test_a_part_of_a_cache_is_read_in_place(check):
    q, keys, window, sink, entries, index, scale = case(B=3)
    room = torch.full((3, 1000, entries.shape[2]), float("nan"), dtype=entries.dtype)
    room[:, 100:400] = entries
    check(q, keys, window, sink, room[:, 100:400], index, scale, False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("d", [64, 48, 512])
@pytest.mark.parametrize("of_table", [(2, 3), (1, 3), (2, 1), (1, 1)], ids=str)
def test_the_result_is_turned_back(of_table, d, dtype, poisoned):
    dr = 16
    args = (*on_gpu(case(d=d, dtype=dtype)), False)
    angle = torch.rand(*of_table, 1, dr // 2, device="cuda") * 6
    want = formula(*args)
    a, b, c, s = want[..., -dr::2].clone(), want[..., 1 - dr :: 2].clone(), angle.cos().double(), angle.sin().double()
    want[..., -dr::2], want[..., 1 - dr :: 2] = a * c + b * s, b * c - a * s
    arguments = attention.arguments(*args, angle.cos(), angle.sin())
    implementation, reasons = attention.claim(arguments)
    assert implementation is not None and implementation.device == "cuda", reasons
    tolerance = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=2e-2, atol=1e-2)
    torch.testing.assert_close(attention(*args, angle.cos(), angle.sin()).double(), want, **tolerance)


CONFIGS = [
    *(
        kernel.Config(*c)
        for c in (
            (16, 32, 2, 1),
            (16, 64, 2, 4),
            (32, 32, 3, 2),
            (32, 64, 2, 8),
            (64, 32, 4, 1),
            (64, 64, 2, 2),
            (16, 32, 2, 8, 4),
            (32, 64, 2, 8, 2),
        )
    ),
    *(wide.Config(*c) for c in ((64, 80, 2, 1), (64, 64, 2, 2), (32, 48, 3, 4), (32, 80, 1, 8), (16, 32, 4, 1))),
]


def run(shape, config, *args):
    if isinstance(config, kernel.Config):
        kernel.run(shape, config, *args)
    else:
        wide.KERNEL.launcher(wide.Shape(**vars(shape)), config)(*args)


@pytest.fixture
def guarded():
    """guarded(config, arguments, turned, [on_window]): launched three times with guards around the result, the rows of
    which the caller turns back, if at all; against the formula, no worse than plain bf16."""

    def launched(config, args, turned, on_window=False):
        q, keys, window, sink, entries, index, scale = on_gpu(args)
        (B, T, h, d), dr = q.shape, 64 if turned else 0
        shape = kernel.Shape(d, h, index is not None, on_window, dr)
        angle = torch.rand(B * T, dr // 2, device="cuda") * 6 if turned else None
        cos, sin = (angle.cos(), angle.sin()) if turned else (None, None)
        want, eager = (
            f(q, keys, window, sink, entries, index, scale, on_window).double().view(B * T, h, d)
            for f in (formula, plain)
        )
        for x in (want, eager) if turned else ():
            a, b, c, s = (
                x[..., -dr::2].clone(),
                x[..., 1 - dr :: 2].clone(),
                *(t.double().unsqueeze(1) for t in (cos, sin)),
            )
            x[..., -dr::2], x[..., 1 - dr :: 2] = a * c + b * s, b * c - a * s
        room = torch.empty(B * T + 2, h, d, dtype=torch.bfloat16, device="cuda")
        flat = [None if x is None else x.flatten(0, 1) for x in (q, window, index)]
        results = []
        for _ in range(3):
            room.fill_(float("nan"))
            run(shape, config, flat[0], keys, flat[1], entries, flat[2], sink, cos, sin, room[1:-1], scale, T)
            assert room[0].isnan().all() and room[-1].isnan().all()
            results.append(room[1:-1].clone())
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
        torch.testing.assert_close(results[0].double(), want, rtol=2e-2, atol=1e-2)
        assert error(results[0], want) <= 1.05 * error(eager, want) + 1e-9

    return launched


@pytest.mark.gpu
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_kind_of_configuration_with_guards_around_the_result(config, turned, guarded):
    """Launched as it is; with the inverse rotation behind it."""
    guarded(config, case(B=2, T=2, h=70, d=512, W=50, K=300), turned)


@pytest.mark.gpu
@pytest.mark.parametrize("on_window", [False, True])
@pytest.mark.parametrize("config", [c for c in CONFIGS if isinstance(c, wide.Config)], ids=str)
def test_lengths_of_wide_tiles(config, on_window, guarded):
    """One row, a tile but one, a tile, one more, several tiles; all absent; one row named often."""
    tile = config.rows
    for W, K in ((1, 0), (0, 1), (tile - 1, 0), (tile - 9, 9), (tile - 8, 9), (128, 512), (5, None)):
        args = case(h=64, d=512, W=W, K=K, none=0.0 if W + (K or 0) < 2 else 0.2)
        if K and K > 50:
            args[5][:, :, ::2] = 7
        guarded(config, args, False, on_window)
    if not on_window:
        guarded(config, case(h=64, d=512, none=1.0), False)


@pytest.mark.gpu
def test_a_captured_call_reads_its_inputs_at_replay(check):
    shapes = dict(B=2, T=1, h=64, d=512, W=128, K=512)
    args, others = on_gpu((*case(**shapes), False)), on_gpu((*case(**shapes, seed=1), False))
    attention(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = attention(*args)
    for static, other in zip(args, others, strict=True):
        if isinstance(static, torch.Tensor):
            static.copy_(other)
    for _ in range(2):
        graph.replay()
        torch.testing.assert_close(got.double(), formula(*others), rtol=2e-2, atol=1e-2)
