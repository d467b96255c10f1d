"""The reference model agrees with itself: however tokens are fed, at whatever precision, with whatever options."""

import copy
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dsv4_compile.reference_model import DSV4, DSV4Config, Selection, State, generate, sample
from dsv4_compile.reference_model import model as reference
from dsv4_compile.reference_model.quant import dequantize_rows, pack_kv, unpack_kv
from dsv4_compile.reference_model.schedule import CSA, HCA, SWA

LENGTH = 45  # crosses windows of 4 and 8 and wraps the ring of 12


def randomise(model: DSV4, seed: int = 1) -> DSV4:
    """Every parameter, since default sinks, biases and norms hide bugs."""
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.requires_grad:
            noise = torch.randn(p.shape, generator=g)
            std = 1.5 * p.shape[-1] ** -0.5 if p.dim() > 1 else 0.3 if "bias" in name else 0.5
            p.data.copy_(1 + 0.2 * noise if "norm" in name else std * noise)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return randomise(DSV4(DSV4Config.tiny()))


@pytest.fixture(scope="module")
def tokens(model):
    return torch.randint(0, model.config.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def whole(model, tokens):
    return model(tokens)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("draft", [0, 3])
@pytest.mark.parametrize("chunks", [[1] * LENGTH, [7, 12, 1, 25], [4, 4, 3, 1, 2, 31], [LENGTH]], ids=str)
def test_any_chunking_gives_the_same_logits(model, tokens, whole, chunks, draft):
    state = model.new_state(2, LENGTH, draft)
    close(torch.cat([model(t, state) for t in tokens.split(chunks, 1)], 1), whole)
    assert state.position.tolist() == [LENGTH, LENGTH]


def test_equal_rates_keep_their_windows_apart(tokens):
    """CSA's windows overlap and HCA's do not, whatever their lengths."""
    kinds = (CSA, HCA)
    change = dict(num_hidden_layers=2, layer_types=kinds, mlp_layer_types=("moe", "moe"))
    model = randomise(DSV4(DSV4Config.tiny().replace(compress_rates=dict.fromkeys(kinds, 4), **change)))
    state = model.new_state(2, LENGTH)
    close(torch.cat([model(t, state) for t in tokens.split([7, 12, 1, 25], 1)], 1), model(tokens))


def test_rewinding_a_rejected_draft(model, tokens, whole):
    state = model.new_state(2, LENGTH, draft=3)
    first = model(tokens[:, :20], state)
    wrong = torch.cat([tokens[:, 20:21], tokens[:, 30:33]], 1)  # one right guess, three wrong ones
    accepted = model(wrong, state)[:, :1]
    state.position -= 3
    rest = [model(t, state) for t in tokens[:, 21:].split(4, 1)]
    close(torch.cat([first, accepted, *rest], 1), whole)


@pytest.mark.parametrize("draft", [0, 2])
def test_ragged_rows(model, tokens, whole, draft):
    state = model.new_state(2, 2 * LENGTH, draft)
    lengths = torch.tensor([20, LENGTH])
    last = model(tokens, state, lengths=lengths, last=1)
    close(last[:, 0], torch.stack([whole[0, 19], whole[1, -1]]))
    assert state.position.tolist() == lengths.tolist()
    following = torch.stack([tokens[0, 20:22], tokens[1, :2]])
    close(model(following, state, lengths=torch.tensor([1, 2]))[0, :1], whole[0, 20:21])
    close(model(tokens[:, 21:22], state)[0], whole[0, 21:22])


def test_the_model_is_its_own_fp64_oracle(model, tokens, whole):
    double = DSV4(model.config).double()
    double.load_state_dict(model.state_dict())
    double.requires_grad_(False)
    assert double.layers[0].hc_attn.fn.dtype == torch.float64
    exact = double(tokens)
    assert exact.dtype == torch.float64
    close(whole.double(), exact)


def test_bf16_rounds_matrices_and_nothing_that_must_stay_exact(model, tokens, whole):
    rounded = DSV4(model.config)
    rounded.load_state_dict(model.state_dict())
    rounded = rounded.to(torch.bfloat16).requires_grad_(False)
    layer = rounded.layers[2]
    for exact in (
        layer.hc_ffn.scale,
        layer.attn.attn_sink,
        layer.attn_norm.weight,
        layer.attn.compressor.ape,
        layer.ffn.gate.bias,
    ):
        assert exact.dtype == torch.float32
    assert torch.equal(layer.attn.attn_sink, model.layers[2].attn.attn_sink)
    assert layer.attn.wq_a.weight.dtype == torch.bfloat16
    selection = Selection()
    model(tokens, selection=selection)
    got = rounded(tokens, selection=selection)
    assert got.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(got.flatten(), whole.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("device, tables", [("cpu", "cpu"), ("cuda", "cuda"), ("meta", "cpu")])
def test_a_model_made_on_a_device_is_there_as_a_whole(device, tables):
    """Without memory it still has its tables, which no checkpoint stores."""
    with FakeTensorMode(), torch.device(device):
        model = DSV4(DSV4Config.tiny())
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        assert x.device.type == (tables if name.startswith("tables.") else device), name


def test_selections_are_recorded_and_replayed(model, tokens, whole):
    selection = Selection()
    assert torch.equal(model(tokens, selection=selection), whole)
    config = model.config
    assert [e.shape for e in selection.experts] == [(2 * LENGTH, config.num_experts_per_tok)] * config.num_hidden_layers
    kinds = [CSA == kind for kind in config.layer_types]
    assert [e is not None for e in selection.entries] == kinds
    assert torch.equal(model(tokens, selection=selection), whole)
    others = [(e + 1) % config.n_routed_experts for e in selection.experts]
    forced = model(tokens, selection=Selection(others, selection.entries))
    assert (forced - whole).abs().max() > 0.1


def test_last_and_streams(model, tokens, whole):
    close(model(tokens, last=3), whole[:, -3:])
    logits, streams = model(tokens, model.new_state(2, LENGTH), streams=True)
    close(logits, whole)
    assert streams.shape == (2, LENGTH, 4, model.config.hidden_size)


def test_mtp_drafts_with_a_state_what_it_predicts_without(model, tokens):
    _, want = model(tokens, mtp=True)
    assert want.shape == (2, LENGTH - 1, model.config.vocab_size)
    state, got, at = model.new_state(2, LENGTH), [], 0
    for size in (10, 1, 1, 20, 12):
        _, streams = model(tokens[:, at : at + size], state, streams=True)
        got.append(model.draft(tokens[:, at + 1 : at + 1 + size], streams, state)[0])
        at += size
    close(torch.cat(got, 1), want)


@pytest.mark.parametrize(
    "change", [dict(sink_mode="swa_scale"), dict(hash_gate="uniform"), dict(scoring_func="sigmoid")], ids=str
)
def test_variants_decode_as_they_prefill_and_differ_from_the_default(model, tokens, whole, change):
    variant = DSV4(model.config.replace(**change)).eval().requires_grad_(False)
    variant.load_state_dict(model.state_dict())
    got, state = variant(tokens), variant.new_state(2, LENGTH)
    assert (got - whole).abs().max() > 1e-2
    close(torch.cat([variant(t, state) for t in tokens.split(1, 1)], 1), got)


def test_the_sink_cancels_in_a_window_only_layer_when_it_scales_the_window(model, tokens):
    """o = e^sink e^lse_w o_w / (e^sink e^lse_w): without compressed entries the sink is no part of the result."""
    config = model.config.replace(
        sink_mode="swa_scale", num_hidden_layers=1, layer_types=(SWA,), mlp_layer_types=("moe",)
    )
    one = randomise(DSV4(config))
    before = one(tokens)
    one.layers[0].attn.attn_sink += 3.0
    close(one(tokens), before)


@pytest.mark.parametrize("linear, expert", [("fp8", "mxfp4"), ("none", "nvfp4"), ("fp8", "fp8")])
def test_quantised_weights_mean_their_dequantised_values(linear, expert):
    config = DSV4Config.nano().replace(
        num_hidden_layers=2, layer_types=None, linear_format=linear, expert_format=expert
    )
    torch.manual_seed(0)
    quantised = DSV4(config).eval().requires_grad_(False)
    plain = DSV4(config.replace(linear_format="none", expert_format="none", mtp_expert_format="none")).eval()
    weights = dict(plain.state_dict())
    for name, module in quantised.named_modules():
        if hasattr(module, "dense"):
            weights[f"{name}.weight"] = module.dense(torch.float32)
    held = {k: v for k, v in quantised.state_dict().items() if k in weights and v.shape == weights[k].shape}
    plain.load_state_dict(weights | {k: v for k, v in held.items() if v.dtype == weights[k].dtype})
    tokens = torch.randint(0, 256, (2, 20))
    with torch.no_grad():
        close(quantised(tokens), plain(tokens))  # many tokens: grouped
        close(quantised(tokens[:, :2], last=1), plain(tokens[:, :2], last=1))  # few: gathered
    assert quantised.to(torch.bfloat16).layers[0].attn.wq_a.weight.dtype != torch.bfloat16 or linear == "none"


BAD = [
    (dict(tokens=torch.zeros(3, dtype=torch.int64)), "tokens must be"),
    (dict(tokens=torch.zeros(1, 3)), "int64"),
    (dict(tokens=torch.zeros(1, 0, dtype=torch.int64)), "1 to"),
    (dict(tokens=torch.zeros(1, 4097, dtype=torch.int64)), "4096"),
    (dict(tokens=torch.zeros(1, 3, dtype=torch.int64), last=4), "last=4"),
    (dict(tokens=torch.zeros(1, 3, dtype=torch.int64), lengths=torch.ones(2)), "lengths must be"),
    (dict(tokens=torch.zeros(1, 1, dtype=torch.int64), mtp=True), "at least 2"),
]


@pytest.mark.parametrize("call, message", BAD, ids=[m for _, m in BAD])
def test_bad_calls_name_what_is_wrong(model, call, message):
    with pytest.raises(ValueError, match=message):
        model(**call)


def test_bad_states_name_what_is_wrong(model, tokens):
    with pytest.raises(ValueError, match="4096"):
        model.new_state(1, 5000)
    with pytest.raises(ValueError, match="made for 3"):
        model(tokens, model.new_state(3, 50))
    with pytest.raises(ValueError, match="max_len"):
        model(tokens, model.new_state(2, LENGTH - 1))
    with pytest.raises(ValueError, match="4096"):
        next(generate(model, tokens, 4090))
    for change in (
        dict(head_dim=64),
        dict(sliding_window=5),
        dict(index_head_dim=16),
        dict(num_nextn_predict_layers=0),
    ):
        state = State.empty(model.config.replace(**change), 2, 50, 0, "cpu", torch.float32)
        with pytest.raises(ValueError, match="model of other sizes"):
            model(tokens, state)
    headless = DSV4(model.config.replace(num_nextn_predict_layers=0))
    with pytest.raises(ValueError, match="MTP"):
        headless.draft(tokens, torch.zeros(2, LENGTH, 4, 96), headless.new_state(2, 50))


def test_generation_is_seeded_and_stops(model, tokens):
    def run(**kw):
        return torch.stack(list(generate(model, tokens[:, :5], 6, **kw)), 1)

    greedy = run()
    assert torch.equal(greedy, run()) and greedy.shape == (2, 6)
    logits = model(torch.cat([tokens[:, :5], greedy[:, :5]], 1))[:, 4:]
    assert torch.equal(logits.argmax(-1), greedy)
    warm = run(temperature=1.0, seed=7)
    assert torch.equal(warm, run(temperature=1.0, seed=7)) and not torch.equal(warm, run(temperature=1.0, seed=8))
    one = torch.stack(list(generate(model, tokens[:1, :5], 6, stop=int(greedy[0, 0]))))
    assert len(one) == 1


def by_hand(x):
    """Rows as e4m3 with a scale each holds them, one number at a time."""
    rows = x.flatten(0, -2).clone()
    for row in rows:
        largest = row.abs().max().item()
        exponent = math.ceil(math.log2(largest / 448)) if largest else 0
        for i, value in enumerate((row / 2.0**exponent).tolist()):
            step = 2.0 ** (max(math.frexp(value)[1] - 1, -6) - 3)  # 3 bits behind the first
            row[i] = round(value / step) * step * 2.0**exponent
    return rows.view_as(x)


def test_index_keys_in_e4m3_are_keys_rounded_by_hand(model, tokens, monkeypatch):
    """The text is the same, token by token, and so is all that is remembered."""
    e4m3 = torch.float8_e4m3fn
    got = torch.stack(list(generate(model, tokens[:, :21], 20, index_dtype=e4m3)), 1)
    compress, states = reference.compress, []
    width = model.config.index_head_dim
    rounded = lambda *a: by_hand(e) if (e := compress(*a)).shape[-1] == width else e  # noqa: E731
    for index_dtype, how in ((e4m3, compress), (None, rounded)):
        monkeypatch.setattr(reference, "compress", how)
        states.append(model.new_state(2, LENGTH, index_dtype=index_dtype))
        for part in tokens.split([7, 12, 1, 25], 1):
            last = model(part, states[-1], last=1)
        states[-1].last = last
    want = torch.stack(list(generate(model, tokens[:, :21], 20)), 1)
    assert torch.equal(got, want)
    close(states[0].last, states[1].last)
    for mine, theirs in zip(*(s.layers for s in states), strict=True):
        if mine.indexer is not None:
            entries = dequantize_rows(mine.indexer.entries, mine.indexer.scales, torch.float32)
            torch.testing.assert_close(entries, theirs.indexer.entries, rtol=1e-5, atol=1e-5)


def test_a_state_takes_index_keys_in_e4m3_or_as_the_model_has_them(model):
    sizes = [
        sum(
            t.numel() * t.element_size()
            for layer in s.layers
            if layer.indexer
            for t in layer.indexer.parts()[2:]
            if t is not None
        )
        for s in (model.new_state(2, 64), model.new_state(2, 64, index_dtype=torch.float8_e4m3fn))
    ]
    assert sizes[1] / sizes[0] == (model.config.index_head_dim + 4) / (4 * model.config.index_head_dim)
    with pytest.raises(
        ValueError, match=r"index_dtype torch.float16: expected torch.float8_e4m3fn, or that of the model"
    ):
        model.new_state(2, 64, index_dtype=torch.float16)


def test_kv_in_e4m3_is_kv_rounded_by_hand_however_tokens_are_fed(model, tokens, monkeypatch):
    """Logits of a prefill, of chunks and of single tokens, and all that is remembered, are those of keys that are rounded
    before they are stored. In fp64, for what differs by a bit of fp32 may be rounded to the next of 8 bits."""
    model = copy.deepcopy(model).double()
    e4m3, dr, d = torch.float8_e4m3fn, model.config.qk_rope_head_dim, model.config.head_dim
    rounded = lambda cache, x, rope: unpack_kv(pack_kv(x, rope), d, rope)  # noqa: E731
    states, logits = [], []
    for kv_dtype, chunks in (e4m3, [LENGTH]), (e4m3, [7, 12, 1, 25]), (e4m3, [1] * LENGTH), (None, [7, 12, 1, 25]):
        if kv_dtype is None:  # a compressor asks whether its cache is in bytes, by the same function
            monkeypatch.setattr(reference, "stored_as", lambda c, x, r: x if x.shape[-1] != d else rounded(c, x, r))
        states.append(model.new_state(2, LENGTH, draft=len(states) % 2, kv_dtype=kv_dtype))
        logits.append(torch.cat([model(part, states[-1]) for part in tokens.split(chunks, 1)], 1))
    for other in logits[:-1]:
        close(other, logits[-1])
    for mine, theirs in zip(states[1].layers, states[-1].layers, strict=True):
        for a, b in (
            (mine.kv, theirs.kv),
            *([(mine.compressor.entries, theirs.compressor.entries)] if mine.compressor else []),
        ):
            assert a.dtype == torch.uint8
            rows = min(a.shape[1], b.shape[1]) - 3  # what a draft may write again is the others' own
            torch.testing.assert_close(unpack_kv(a, d, dr)[:, :rows], b[:, :rows].float(), rtol=1e-5, atol=1e-5)


def test_a_state_takes_kv_in_e4m3_or_as_the_model_has_it(model):
    c = model.config
    plain, stored = (model.new_state(2, 64, kv_dtype=kv) for kv in (None, torch.float8_e4m3fn))
    for a, b in zip(plain.layers, stored.layers, strict=True):
        assert a.kv.shape[-1] == c.head_dim and b.kv.shape[-1] == 80 and b.kv.dtype == torch.uint8
        if a.indexer is not None:
            assert b.indexer.entries.dtype == a.indexer.entries.dtype and b.compressor.values.dtype == torch.float32
    tokens = torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="made for a model of other sizes"):
        DSV4(c.replace(head_dim=64))(tokens, stored)
    with pytest.raises(ValueError, match=r"kv_dtype torch.float16: expected torch.float8_e4m3fn, or that of the model"):
        model.new_state(2, 64, kv_dtype=torch.float16)


def test_sampling_follows_the_distribution_and_its_cuts():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = p.log().expand(40_000, 4)

    def shares(**kw):
        picks = sample(logits, 1.0, generator=torch.Generator().manual_seed(0), **kw)
        return torch.bincount(picks, minlength=4) / len(picks)

    for cuts, kept in [
        (dict(), p),
        (dict(top_k=2), torch.tensor([0.5, 0.3, 0, 0])),
        (dict(top_p=0.79), torch.tensor([0.5, 0.3, 0, 0])),
        (dict(top_p=0.1), torch.tensor([1.0, 0, 0, 0])),
        (dict(min_p=0.25), torch.tensor([0.5, 0.3, 0.15, 0])),
    ]:
        torch.testing.assert_close(shares(**cuts), kept / kept.sum(), rtol=0, atol=0.01)
    cold = sample(logits[:9], 0.25, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample(logits[:9]), torch.zeros(9, dtype=torch.int64)) and (cold <= 1).all()
    for bad in (dict(temperature=-1), dict(top_p=0), dict(top_k=-1), dict(min_p=2)):
        with pytest.raises(ValueError, match=next(iter(bad))):
            sample(logits[:1], **({"temperature": 1.0} | bad))
