"""The kernel of attention over rows in bytes: configurations on any machine; on a GPU, against a formula in fp64 of the numbers
that they stand for, and against plain bf16 on those."""

from functools import partial
from importlib.util import find_spec

import pytest
import torch

if find_spec("cutlass") is None:
    pytest.skip("GPU kernels need CuTeDSL, which has wheels for Linux only", allow_module_level=True)

from dsv4_compile.backend import backend
from dsv4_compile.kernels import attention_stored as kernel
from dsv4_compile.kernels.attention import Plan, at_once
from dsv4_compile.lowerings.append import norm_rope_append
from dsv4_compile.lowerings.attention import attention
from dsv4_compile.lowerings.compressor_append import compressor_append
from dsv4_compile.lowerings.kv import layout, pack_kv, unpack_kv
from dsv4_compile.reference_model import DSV4, DSV4Config
from dsv4_compile.reference_model.schedule import CSA, HCA, SWA

E4M3, DR = torch.float8_e4m3fn, 64


@pytest.mark.parametrize(("d", "heads"), [(512, 64), (512, 128), (256, 6)])
def test_every_configuration_fits(d, heads):
    shape = kernel.Shape(d, heads, True, False, DR)
    assert shape.row_bytes == layout(d, DR)[-1] and shape.row_bytes // 16 % 2 == 1  # no two of 8 rows in one bank
    found = list(kernel.configs(shape))
    assert len(set(found)) == len(found) > 5
    for config in found:
        plan = Plan(shape, config)
        assert at_once(shape, config) * 4 * plan.words <= 227 * 1024
        assert plan.values + config.heads * plan.value_row <= plan.rescale
    assert all(set(kernel.rank(shape, (n, 640))) == set(found) for n in (1, 4096))


# On a GPU

CONFIGS = [
    c
    for c in kernel.configs(kernel.Shape(512, 70, True, False, 0))
    if c.splits in (1, 8) and (c.splits == 1 or c.stages == 3) and c.chunks < 4
]


def case(B=2, T=3, h=6, d=512, S=200, W=40, E=300, K=70, seed=0, none=0.2):
    """Random arguments of the op, up to the sink's place; rows of sizes from 1/100 to 30; a share of both lists is -1."""
    g = torch.Generator().manual_seed(seed)
    q, sink, found = torch.randn(B, T, h, d, generator=g).bfloat16(), torch.randn(h, generator=g), []
    for rows, length in ((S, W), (E, K)):
        x = torch.randn(B, rows, d, generator=g) * 10 ** (torch.rand(B, rows, 1, generator=g) * 2 - 1.5)
        lists = torch.randint(0, rows, (B, T, length or 0), generator=g)
        lists[torch.rand(lists.shape, generator=g) < none] = -1
        found += [pack_kv(x, DR), lists] if length is not None else [None, None]
    return [q, found[0], found[1], sink, found[2], found[3], 0.3 * d**-0.5]


def plain(args):
    """With the numbers that rows stand for, bf16, where none is named zeros; and the lists in one."""
    q, keys, window, _, entries, index, _ = args
    pairs = [(keys, window)] if index is None else [(keys, window), (entries, index)]
    batch = torch.arange(len(q), device=q.device).view(-1, 1, 1)
    rows = [
        unpack_kv(x, q.shape[-1], DR)[batch, i.clamp(min=0)].masked_fill((i < 0).unsqueeze(-1), 0) for x, i in pairs
    ]
    return torch.cat(rows, 2), torch.cat([i for _, i in pairs], 2)


def softmaxed(args, on_window, dtype):
    """By the formula in fp64, or as eager PyTorch does it in bf16: scores and weights rounded."""
    q, _, window, sink, *_, scale = args
    rows, lists = plain(args)
    s = (q.to(dtype) @ rows.to(dtype).mT * scale).to(torch.promote_types(dtype, torch.float32))
    if on_window:
        s[..., : window.shape[-1]] += sink.view(-1, 1)
    s = s.masked_fill((lists < 0).unsqueeze(2), float("-inf"))
    if not on_window:
        s = torch.cat([s, sink.view(1, 1, -1, 1).expand(*s.shape[:3], 1).to(s.dtype)], -1)
    p = torch.softmax(s, -1)[..., : rows.shape[2]].to(dtype)
    return (p @ rows.to(dtype)).nan_to_num()


def error(got, want):
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-30)).item()


def checked(args, on_window=False, run=None):
    """Three launches; unnamed rows are NaN. No worse than plain bf16."""
    args = [a.cuda() if isinstance(a, torch.Tensor) else a for a in args]
    want, eager = (softmaxed(args, on_window, dtype) for dtype in (torch.float64, torch.bfloat16))
    for x, lists in ((args[1], args[2]), (args[4], args[5])):
        for b in range(len(x) if x is not None else 0):
            unnamed = torch.ones(x.shape[1], dtype=torch.bool, device="cuda")
            unnamed[lists[b][lists[b] >= 0]] = False
            x[b, unnamed] = 0xFF
    given = (*args, on_window, None, None, DR)
    implementation, reasons = attention.claim(attention.arguments(*given))
    assert implementation is not None and implementation.device == "cuda", reasons
    for _ in range(3):
        got = (run or attention)(*given)
        assert got.shape == args[0].shape and got.dtype == torch.bfloat16 and got.is_contiguous()
        torch.testing.assert_close(got.double(), want, rtol=3e-2, atol=2e-2)
        assert error(got, want) <= 1.05 * error(eager, want) + 1e-9


@pytest.mark.gpu
@pytest.mark.parametrize("on_window", [False, True])
@pytest.mark.parametrize(
    "lengths", [(1, None), (0, 1), (31, None), (33, 0), (5, 59), (64, None), (40, 89), (128, 512)], ids=str
)
def test_lengths(lengths, on_window, poisoned):
    if on_window and lengths[0] == 0:
        lengths = (1, 1)
    checked(case(W=lengths[0], K=lengths[1], none=0.0 if sum(n or 0 for n in lengths) < 3 else 0.2), on_window)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape",
    [
        *(dict(B=B, T=1, h=64) for B in (1, 8, 64)),
        *(dict(B=3, T=40, h=128), dict(d=256, h=33), dict(B=1, T=1, h=64, K=8192, E=9000), dict(none=1.0)),
    ],
    ids=str,
)
def test_queries_heads_and_channels(shape, poisoned):
    checked(case(**dict(W=128, K=512, S=128, E=600) | shape))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "config", [c for c in kernel.configs(kernel.Shape(512, 70, True, False, 0)) if c.splits != 4], ids=str
)
def test_every_kind_of_configuration(config):
    def run(q, keys, window, sink, entries, index, scale, *_):
        B, T, h, d = q.shape
        room = torch.full((B * T + 2, h, d), float("nan"), dtype=torch.bfloat16, device="cuda")
        flat = [x.flatten(0, 1) for x in (q, window, index)]
        shape, given = kernel.Shape(d, h, True, False, 0), (None, None, room[1:-1], scale, T)
        kernel.attention.run(
            shape, config, flat[0], keys, flat[1], entries, flat[2], sink, *given, kernel=kernel.KERNEL
        )
        assert room[0].isnan().all() and room[-1].isnan().all()
        return room[1:-1].view_as(q)

    checked(case(h=70, W=50, K=300), run=run)


@pytest.mark.gpu
def test_a_part_of_a_cache_is_read_in_place_and_turned_back(poisoned):
    args = [a.cuda() if isinstance(a, torch.Tensor) else a for a in case(B=3, T=1, h=64)]
    angle = torch.rand(3, 1, 1, DR // 2, device="cuda") * 6
    cpu = [
        a.cpu().double() if i in (0, 3) else a.cpu() if isinstance(a, torch.Tensor) else a for i, a in enumerate(args)
    ]
    want = attention.meaning(*cpu, False, angle.cos().cpu().double(), angle.sin().cpu().double(), DR)
    args[4] = torch.cat([args[4], torch.full_like(args[4][:, :1], 0xFF)], 1)[:, :-1]
    got = attention(*args, False, angle.cos(), angle.sin(), DR)
    torch.testing.assert_close(got.cpu().double(), want, rtol=3e-2, atol=2e-2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = attention(*args, False, angle.cos(), angle.sin(), DR)
    for _ in range(2):
        graph.replay()
        assert torch.equal(again, got)


def same_rows(got, want, d, dr):
    """Codes of two roundings of nearly equal numbers are one step apart at most, and few are."""
    apart = (got.int() - want.int()).abs()
    assert apart.max() <= 1 and (apart > 0).float().mean() < 0.02, (apart.max(), (apart > 0).float().mean())


@pytest.mark.gpu
@pytest.mark.parametrize(("B", "T", "d", "dr"), [(1, 1, 512, 64), (64, 1, 512, 64), (3, 5, 144, 16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_keys_are_written(B, T, d, dr, dtype):
    g = torch.Generator("cuda").manual_seed(0)
    drawn = partial(torch.randn, generator=g, device="cuda")
    ring, angle = pack_kv(drawn(B, 9, d), dr), drawn(B, T, dr // 2)
    slot = torch.rand(B, 9, generator=g, device="cuda").argsort(-1)[:, :T] + 18
    args = ring, slot, drawn(B, T, d).to(dtype), drawn(d).abs(), 1e-6, angle.cos(), angle.sin()
    implementation, reasons = norm_rope_append.claim(norm_rope_append.arguments(*args))
    assert implementation is not None and implementation.device == "cuda", reasons
    want = norm_rope_append.meaning(*args)
    same_rows(norm_rope_append(*args), want, d, dr)
    norm_rope_append.writing_target(*args)
    same_rows(ring, want, d, dr)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("B", "d", "dr", "overlap", "closed"),
    [(1, 512, 64, True, True), (5, 512, 64, False, True), (2, 72, 8, True, True), (3, 512, 64, True, False)],
)
def test_entries_are_written(B, d, dr, overlap, closed):
    g = torch.Generator("cuda").manual_seed(0)
    drawn, m = partial(torch.randn, generator=g, device="cuda"), 4
    R, C = m * (1 + overlap), d * (1 + overlap)
    place = torch.full((B, 1), R - 1, device="cuda")
    index = torch.arange(R, device="cuda").expand(B, 1, R) if closed else torch.full((B, 1, R), -1, device="cuda")
    angle, target = drawn(B, 1, dr // 2), torch.full((B, 1), 3, device="cuda")
    memory = drawn(B, R, C), drawn(B, R, C), pack_kv(drawn(B, 6, d), dr)
    new = drawn(B, 1, C), drawn(B, 1, C), drawn(m, C)
    args = *memory, place, *new, place, index, drawn(d).abs(), angle.cos(), angle.sin(), target, 1e-6, overlap
    implementation, reasons = compressor_append.claim(compressor_append.arguments(*args))
    assert implementation is not None and implementation.device == "cuda", reasons
    want, got = compressor_append.meaning(*args), compressor_append(*args)
    torch.testing.assert_close(got[:2], want[:2])
    same_rows(got[2], want[2], d, dr)


@pytest.mark.gpu
def test_whole_steps_of_decoding():
    """Compiled, against eager, from one prompt; all that attention and its caches do in kernels. Every expert and every entry
    is chosen: else a rounding now and then becomes another choice, which no bound holds."""
    torch.manual_seed(0)
    kinds = (SWA, CSA, HCA)
    config = DSV4Config.tiny().replace(
        num_hidden_layers=3, layer_types=kinds, mlp_layer_types=("moe",) * 3, num_nextn_predict_layers=0
    )
    config = config.replace(head_dim=512, qk_rope_head_dim=64, index_head_dim=128, sliding_window=20)
    config = config.replace(n_routed_experts=4, num_experts_per_tok=4, index_topk=24)
    model = DSV4(config).cuda().bfloat16().eval().requires_grad_(False)
    tokens, reports = torch.randint(0, config.vocab_size, (2, 60), device="cuda"), []
    mine, theirs = (model.new_state(2, 96, index_dtype=E4M3, kv_dtype=E4M3) for _ in "ab")
    step = torch.compile(
        model, backend=partial(backend, options={"strict": True}, observe=reports.append), fullgraph=True
    )
    with torch.no_grad():
        for state in (mine, theirs):
            model(tokens[:, :40], state)
        for i in range(40, 60):
            got, want = step(tokens[:, i : i + 1], mine), model(tokens[:, i : i + 1], theirs)
            assert error(got, want.double()) < 0.05
    by_kernels = {op for op, who in reports[0].runs if who.startswith("cuda")}
    assert by_kernels >= {"attention", "prologue_0", "prologue_1", "prologue_2_fp8"}, reports[0].runs
