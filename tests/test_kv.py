"""Keys in rows of bytes: the ops against the reference model and against formulas, in graphs, in whole steps of decoding."""

from functools import partial

import pytest
import torch

from dsv4_compile.backend import backend
from dsv4_compile.lowerings.append import append, norm_rope_append
from dsv4_compile.lowerings.attention import attention
from dsv4_compile.lowerings.compressor import compressor
from dsv4_compile.lowerings.compressor_append import compressor_append
from dsv4_compile.lowerings.kv import layout, pack_kv, unpack_kv
from dsv4_compile.lowerings.rope import norm_rope
from dsv4_compile.patterns import kv as of_kv
from dsv4_compile.reference_model import DSV4, DSV4Config, quant
from dsv4_compile.reference_model.schedule import CSA, HCA, SWA

E4M3 = torch.float8_e4m3fn
SIZES = (512, 64), (48, 16), (64, 16), (22, 6)


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(("d", "dr"), SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_ops_are_the_functions_of_the_reference_model(d, dr, dtype):
    x = drawn(2, 3, d, dtype=dtype)
    rows = pack_kv(x, dr)
    assert torch.equal(rows, quant.pack_kv(x, dr)) and rows.shape[-1] == layout(d, dr)[-1]
    assert torch.equal(unpack_kv(rows, d, dr), quant.unpack_kv(rows, d, dr))


def test_opcheck():
    x = drawn(2, 3, 48)
    torch.library.opcheck(pack_kv.target, (x, 16))
    torch.library.opcheck(unpack_kv.target, (pack_kv(x, 16), 48, 16))


@pytest.mark.parametrize(("d", "dr"), SIZES)
@pytest.mark.parametrize("lead", [(2, 5), (1, 1)], ids=str)
def test_they_are_found(d, dr, lead, rewritten_by):
    x = drawn(*lead, d, dtype=torch.bfloat16)
    rows = quant.pack_kv(x, dr)
    got, report = rewritten_by([of_kv.pack, of_kv.unpack], lambda x: quant.pack_kv(x, dr), x)
    assert torch.equal(got, rows) and report.rules["raise.kv"] == 1
    got, report = rewritten_by([of_kv.pack, of_kv.unpack], lambda r: quant.unpack_kv(r, d, dr), rows)
    assert torch.equal(got, quant.unpack_kv(rows, d, dr)) and report.rules["raise.kv"] == 1


def test_other_blocks_are_others(rewritten_by, monkeypatch):
    monkeypatch.setattr(quant, "KV_BLOCK", 16)
    got, report = rewritten_by([of_kv.pack, of_kv.unpack], lambda x: quant.pack_kv(x, 64), drawn(3, 512))
    assert report.rules["raise.kv"] == 0 and torch.equal(got, quant.pack_kv(drawn(3, 512), 64))


def stored(second=True, dtype=torch.float32, B=2, T=3, h=5, d=48, dr=16, W=7, K=5):
    """Arguments of attention whose rows are bytes, and those of the numbers that they stand for."""
    g = torch.Generator().manual_seed(0)
    window, index = (torch.randint(-1, n, (B, T, m), generator=g) for n, m in ((11, W), (6, K)))
    q, keys, entries = drawn(B, T, h, d, dtype=dtype), drawn(B, 11, d, seed=1), drawn(B, 6, d, seed=2)
    rows = [pack_kv(x, dr) for x in (keys, entries)]
    both = rows, [unpack_kv(x, d, dr).to(dtype) for x in rows]
    return [(q, k, window, drawn(h), e if second else None, index if second else None) for k, e in both]


@pytest.mark.parametrize("second", [True, False])
@pytest.mark.parametrize("on_window", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_attention_reads_what_they_stand_for(second, on_window, dtype):
    (args, plain), scale = stored(second, dtype), 0.2
    angle = drawn(2, 3, 1, 8)
    for tables in (None, None), (angle.cos(), angle.sin()):
        want = attention.meaning(*plain, scale, on_window, *tables)
        for run in (attention, attention.meaning):
            got = run(*args, scale, on_window, *tables, 16)
            torch.testing.assert_close(got, want, **({} if dtype == torch.float64 else dict(rtol=2**-7, atol=2**-8)))
    if dtype == torch.float64 and second and on_window:
        torch.library.opcheck(attention.target, (*args, scale, on_window, None, None, 16))


def test_writers_write_such_rows():
    ring, entries = (quant.pack_kv(drawn(2, n, 48, seed=n), 16) for n in (11, 9))
    slot, x, weight, angle = torch.tensor([[3, 14], [0, 7]]), drawn(2, 2, 48), drawn(48).abs(), drawn(2, 2, 8)
    turned = norm_rope(x, weight, 1e-6, angle.cos(), angle.sin())
    args = ring, slot, x, weight, 1e-6, angle.cos(), angle.sin()
    for run in (norm_rope_append, norm_rope_append.meaning):
        assert torch.equal(run(*args), append(ring, slot % 11, quant.pack_kv(turned, 16)))
    torch.library.opcheck(norm_rope_append.target, args)
    memory = drawn(2, 8, 48), drawn(2, 8, 48, seed=1)
    c, z, ape, place = drawn(2, 1, 48, seed=3), drawn(2, 1, 48, seed=4), drawn(4, 48), torch.tensor([[2], [7]])
    index = torch.tensor([[[-1, 3, 1, 2]], [[0, 1, 2, 5]]])
    rest = index, weight, angle[:, :1].cos(), angle[:, :1].sin()
    target = torch.tensor([[4], [8]])
    args = *memory, entries, slot[:, :1], c, z, ape, place, *rest, target, 1e-6, False
    values, gates, got = compressor_append.meaning(*args)
    e = compressor(values, gates, *rest, 1e-6, False)
    assert torch.equal(got, append(entries, target, quant.pack_kv(e, 16))) and not torch.equal(got, entries)
    torch.library.opcheck(compressor_append.target, args)


KINDS = (SWA, CSA, HCA)


def model(sink_mode="denominator", kinds=KINDS, **change) -> DSV4:
    config = DSV4Config.tiny().replace(
        num_hidden_layers=len(kinds),
        layer_types=kinds,
        mlp_layer_types=("moe",) * len(kinds),
        hc_sinkhorn_iters=2,
        num_nextn_predict_layers=0,
        sink_mode=sink_mode,
        **change,
    )
    torch.manual_seed(0)
    return DSV4(config).eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("T", "draft", "sink_mode", "kinds"),
    [(1, 0, "denominator", KINDS[1:2]), (16, 0, "swa_scale", KINDS[2:])],
    ids=str,
)
def test_a_step_finds_every_place_and_gives_eagers_logits(T, draft, sink_mode, kinds):
    """In fp64, where nothing is rounded to another code of 8 bits."""
    m, reports, layers = model(sink_mode, kinds).double(), [], len(kinds)
    tokens = torch.randint(0, m.config.vocab_size, (2, 40))
    mine, theirs = (m.new_state(2, 45, draft, E4M3, E4M3) for _ in "ab")
    for state in (mine, theirs):
        m(tokens[:, :20], state)
    options = {"inner": "eager", "strict": True, "lowerings": "c*"}
    step = torch.compile(m, backend=partial(backend, options=options, observe=reports.append), fullgraph=True)
    with torch.no_grad():
        got, want = step(tokens[:, 20 : 20 + T], mine), m(tokens[:, 20 : 20 + T], theirs)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    report = reports[0]
    assert {f: report.counts[f] for f in report.sites} == dict(report.sites) and report.sites["attention"] == layers
    assert report.rules["fuse.attention"] == layers and not report.unexplained
    found = (layers, 2) if T <= draft + 1 else (0, 0)  # CSA has a second compressor, without bytes
    assert (report.counts["keys"], report.counts["entries"]) == found
    for a, b in zip(mine.layers, theirs.layers, strict=True):
        rows = [(a.kv, b.kv), *([(a.compressor.entries, b.compressor.entries)] if a.compressor else [])]
        for x, y in rows:  # zeros of either sign are alike
            assert x.dtype == torch.uint8 and torch.equal(quant.unpack_kv(x, 48, 16), quant.unpack_kv(y, 48, 16))


def test_inductor_compiles_what_nobody_claims():
    def f(x):
        rows = quant.pack_kv(x, 16)
        return rows, quant.unpack_kv(rows, 48, 16)

    x = drawn(3, 48, dtype=torch.bfloat16)
    got = torch.compile(f, backend="dsv4", fullgraph=True)(x)
    assert all(torch.equal(a, b) for a, b in zip(got, f(x), strict=True))
