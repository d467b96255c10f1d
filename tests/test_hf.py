"""Hugging Face's DeepseekV4ForCausalLM, as it is: the same ops are found in it as in the reference model."""

import copy
import os
from functools import partial

import pytest
import torch

from dsv4_compile import hf
from dsv4_compile.backend import backend
from dsv4_compile.lowerings.attention import dense_attention
from dsv4_compile.reference_model.schedule import CSA, HCA, SWA
from dsv4_compile.reporting.sites import expected

transformers = pytest.importorskip("transformers")
modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
transformers.logging.set_verbosity_error()

CONFIG = dict(
    vocab_size=61,
    hidden_size=40,
    moe_intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    head_dim=24,
    qk_rope_head_dim=8,
    q_lora_rank=20,
    o_groups=2,
    o_lora_rank=10,
    sliding_window=7,
    compress_rates={CSA: 4, HCA: 8},
    index_n_heads=16,
    index_head_dim=16,
    index_topk=3,
    n_routed_experts=6,
    num_experts_per_tok=2,
    routed_scaling_factor=1.5,
    swiglu_limit=2.0,
    hc_mult=4,
    hc_sinkhorn_iters=2,
    num_hash_layers=1,
    layer_types=[SWA, CSA, HCA],
    max_position_embeddings=4096,
    num_nextn_predict_layers=0,
    tie_word_embeddings=False,
)


def config(**change):
    return transformers.DeepseekV4Config(**(CONFIG | change))


@torch.no_grad()
def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """Frozen, every number drawn: zero sinks, zero biases and unit norms would hide mistakes."""
    g = torch.Generator().manual_seed(0)
    for name, p in [*module.named_parameters(), *module.named_buffers()]:
        if p.dtype == torch.int64:  # the hash table
            experts = CONFIG["n_routed_experts"]
            p.copy_(torch.rand(len(p), experts, generator=g).topk(p.shape[1], -1).indices)
        elif "inv_freq" not in name:
            noise = torch.randn(p.shape, generator=g)
            scale = 0.4 if p.dim() == 1 else 1.5 * p.shape[-1] ** -0.5
            p.copy_(1 + 0.2 * noise if "norm" in name else scale * noise)
    return module.eval().requires_grad_(False)


def random_model(**change):
    return randomised(transformers.DeepseekV4ForCausalLM(config(**change)))


def tokens(B: int, T: int) -> torch.Tensor:
    return torch.randint(0, CONFIG["vocab_size"], (B, T), generator=torch.Generator().manual_seed(1))


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    """1e-4 for numbers of size 7, in proportion."""
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * max(1.0, want.abs().max().item() / 7))


def all_found(report, model) -> bool:
    wanted = expected(model)
    assert report.unexplained == []
    return {f: report.counts[f] for f in wanted} == wanted


def ran(report) -> set[str]:
    return {name for name, _ in report.runs}


# Whole models


def test_every_site_of_prefill_is_found():
    model, ids, reports = random_model(), tokens(2, 29), []
    want = model(ids, use_cache=False).logits
    close(compiled(model, reports)(ids, use_cache=False).logits, want)
    (report,) = reports
    assert all_found(report, model)
    assert {"attention", "compressor", "moe", "router", "expert_gates", "mhc_pre", "mhc_post", "mhc_head"} <= ran(
        report
    )
    assert "dense_attention" not in ran(report)


@pytest.mark.skipif(os.environ.get("DSV4_TEST_ROBUST") != "all", reason="set DSV4_TEST_ROBUST=all")
def test_prefill_of_many_lengths_is_one_graph_with_every_site():
    model, reports = random_model(), []
    run = compiled(model, reports, dynamic=True)
    for T in (29, 33, 41):
        close(run(tokens(2, T), use_cache=False).logits, model(tokens(2, T), use_cache=False).logits)
    (report,) = reports
    wanted = expected(model)
    assert {f: report.counts[f] for f in wanted} == wanted
    assert "dense_attention" in ran(report)  # which column a mask hides depends on the length


def compiled(model, reports, **how):
    options = {"inner": "eager", "strict": True, "lowerings": "c*"}
    return torch.compile(
        model, backend=partial(backend, options=options, observe=reports.append), fullgraph=True, **how
    )


def greedy(model, ids, steps, cache):
    """Logits [B, 1, V] of each step after the prompt, and the tokens."""
    logits, found = model(ids, past_key_values=cache).logits[:, -1:], []
    for _ in range(steps):
        found.append(logits)
        logits = model(logits.argmax(-1), past_key_values=cache).logits
    return torch.cat(found, 1), torch.cat(found, 1).argmax(-1)


def test_decode_is_one_graph_with_every_site():
    """41 tokens after 13: windows of 4 and 8 close, the ring of 7 wraps."""
    model, ids, reports = random_model(index_topk=64), tokens(2, 13), []
    want, best = greedy(model, ids, 41, transformers.DynamicCache(config=model.config))
    cache = hf.StaticCache(hf.prepare(model), batch=2, max_len=54)
    memory = [t.data_ptr() for t in cache.tensors()]
    got, _ = greedy(model, ids, 41, cache)
    close(got, want)

    cache.reset()
    step, logits = compiled(model, reports), [model(ids, past_key_values=cache).logits[:, -1:]]
    for token in best.split(1, 1)[:-1]:
        logits.append(step(token, past_key_values=cache).logits)
    close(torch.cat(logits, 1), want)
    assert torch.equal(torch.cat(logits, 1).argmax(-1), best)
    assert len(reports) == 1 and memory == [t.data_ptr() for t in cache.tensors()]
    assert all_found(reports[0], model)
    assert "attention" in ran(reports[0]) and "dense_attention" not in ran(reports[0])
    assert reports[0].counts["keys"] == model.config.num_hidden_layers


# The static cache


@pytest.mark.parametrize("T", [2, 3, 8, 9], ids="{} tokens".format)
def test_prompts_of_any_length_leave_the_cache_right(T):
    """Shorter than a window, as long, and longer; then steps across the next boundaries."""
    model, ids = random_model(index_topk=64), tokens(1, T)
    want, _ = greedy(model, ids, 14, transformers.DynamicCache(config=model.config))
    cache = hf.StaticCache(hf.prepare(model), batch=1, max_len=T + 14)
    close(greedy(model, ids, 14, cache)[0], want)
    cache.reset()
    one_by_one = torch.cat([model(t, past_key_values=cache).logits for t in ids.split(1, 1)], 1)
    close(one_by_one[:, -1], want[:, 0])


def test_a_prompt_goes_into_the_cache_as_one_graph():
    model, ids, reports = random_model(num_hidden_layers=1, layer_types=[HCA]), tokens(2, 13), []
    want = model(ids, use_cache=False).logits
    caches = [hf.StaticCache(hf.prepare(model), batch=2, max_len=20) for _ in range(2)]
    close(compiled(model, reports)(ids, past_key_values=caches[0]).logits, want)
    close(model(ids, past_key_values=caches[1]).logits, want)
    for got, right in zip(*(c.tensors() for c in caches), strict=True):
        torch.testing.assert_close(got, right)
    assert all_found(reports[0], model)
    assert "dense_attention" not in ran(reports[0])


def test_what_the_cache_cannot_do_is_said():
    model = random_model()
    with pytest.raises(ValueError, match=r"prepare\(model\)"):
        hf.StaticCache(model, batch=1, max_len=8)
    with pytest.raises(ValueError, match="batch >= 1"):
        hf.StaticCache(hf.prepare(model), batch=0, max_len=8)
    cache = hf.StaticCache(model, batch=1, max_len=8)
    model(tokens(1, 3), past_key_values=cache)
    with pytest.raises(ValueError, match="one token at a time"):
        model(tokens(1, 2), past_key_values=cache)


def test_a_copy_of_the_cache_is_one_of_its_own():
    """As `explain` makes it."""
    model = hf.prepare(random_model())
    cache = hf.StaticCache(model, batch=1, max_len=8)
    model(tokens(1, 3), past_key_values=copy.deepcopy(cache))
    assert cache.length.item() == 0 and not any(t.nan_to_num(neginf=0).any() for t in cache.tensors())


def test_prepare_leaves_experts_that_trace():
    model = random_model()
    for before, after in (("eager", "grouped_mm"), ("batched_mm", "batched_mm"), ("grouped_mm", "grouped_mm")):
        model.set_experts_implementation(before)
        assert hf.prepare(model).config._experts_implementation == after


# Experts


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("N", [1, 9])
def test_packed_experts(rewritten, implementation, N):
    settings = config()
    settings._experts_implementation = implementation
    experts = randomised(modeling.DeepseekV4Experts(settings))
    x, index = torch.randn(N, CONFIG["hidden_size"]), torch.randint(0, CONFIG["n_routed_experts"], (N, 2))
    gate = torch.rand(N, 2)
    got, report = rewritten(experts, x, index, gate)
    assert report.counts["moe"] == 1 and ran(report) == {"moe"}
    close(got, experts(x, index, gate))


def test_packed_experts_in_bf16(rewritten):
    settings = config(hidden_size=48)
    settings._experts_implementation = "grouped_mm"
    experts = randomised(modeling.DeepseekV4Experts(settings)).bfloat16()
    x, index = torch.randn(9, 48).bfloat16(), torch.randint(0, CONFIG["n_routed_experts"], (9, 2))
    gate = torch.rand(9, 2).bfloat16()
    got, report = rewritten(experts, x, index, gate)
    assert report.counts["moe"] == 1
    torch.testing.assert_close(got, experts(x, index, gate), rtol=2**-6, atol=2**-5)


# Compressors


@pytest.mark.parametrize("kind, sites, T", [("HCA", 1, 9), ("HCA", 1, 27), ("CSA", 2, 5), ("CSA", 2, 27)])
def test_compressors_of_windows(rewritten, kind, sites, T):
    compressor = randomised(getattr(modeling, f"DeepseekV4{kind}Compressor")(config()))
    x, q = torch.randn(2, T, CONFIG["hidden_size"]), torch.randn(2, T, CONFIG["q_lora_rank"])

    def run(x, q):
        positions = torch.arange(x.shape[1]).unsqueeze(0)
        return compressor(x, q, positions, None, 0)

    (entries, bias), report = rewritten(run, x, q)
    assert report.counts["compressor"] == sites
    want, want_bias = run(x, q)
    close(entries, want)
    assert torch.equal(bias, want_bias)


# Attention

B, H, T, D = 2, 4, 11, 6


def sliding(width, T=T, S=T):
    row, column = torch.arange(T).unsqueeze(1) + S - T, torch.arange(S)
    return (column <= row) & (column > row - width)


def additive(seen):
    return torch.where(seen.view(-1, 1, *seen.shape[-2:]), torch.zeros(()), torch.finfo(torch.float32).min).expand(
        B, -1, -1, -1
    )


class Core(torch.nn.Module):
    """What Hugging Face's attention function reads of its module."""

    def __init__(self):
        super().__init__()
        self.register_buffer("sinks", torch.randn(H))
        self.num_key_value_groups = H
        self.eval()

    def forward(self, q, rows, mask):
        return modeling.eager_attention_forward(self, q, rows, rows, mask, 0.4)[0]


def drawn(T=T, S=T):
    return Core(), torch.randn(B, H, T, D), torch.randn(B, 1, S, D)


def test_a_constant_sliding_mask_becomes_lists(rewritten):
    core, q, rows = drawn(S=T + 3)

    def attend(q, rows):
        return core(q, rows, additive(sliding(4, S=T + 3)))

    got, report = rewritten(attend, q, rows)
    assert ran(report) == {"attention"}
    close(got, attend(q, rows))


def test_chosen_and_permitted_entries_become_lists(rewritten):
    core, q, x = drawn(S=T + 5)
    score, number = torch.randn(B, T, 5), torch.arange(T).view(1, T) // 2

    def attend(q, x, bias):
        return core(q, torch.cat([x[:, :, :T], x[:, :, T:]], 2), torch.cat([additive(sliding(4)), bias], -1))

    def placed(q, x, index):
        place = torch.where(index >= 0, index, torch.full_like(index, 5)).unsqueeze(1)
        bias = q.new_full((B, 1, T, 6), float("-inf")).scatter_(-1, place, 0.0)[..., :5]
        return attend(q, x, bias)

    def chosen(q, x, score, number):
        index = score.topk(3).indices
        return placed(q, x, torch.where(index >= number.unsqueeze(-1), torch.full_like(index, -1), index))

    def repeated(q, x, score, number):
        """A row that a list names twice counts twice, in a mask once."""
        return placed(q, x, (2 * score).long().clamp(-1, 4))

    def permitted(q, x, score, number):
        late = torch.arange(5).view(1, 1, 1, 5) >= number[:, None, :, None]
        bias = q.new_zeros(B, 1, T, 5).masked_fill(late, float("-inf"))
        return attend(q, x, bias)

    for f, op in ((chosen, "attention"), (permitted, "attention"), (repeated, "dense_attention")):
        got, report = rewritten(f, q, x, score, number)
        assert ran(report) == {op}, report
        close(got, f(q, x, score, number))


def test_the_mask_of_a_step(rewritten):
    """A token at position 8 with a ring of 5 slots: SWA looks at the first columns of a mask that HCA needs more of."""
    core, q, rows = drawn(T=1, S=5)
    core.sliding_window = 5

    def step(q, rows, now):
        position = torch.cat([now - (now - torch.arange(5)) % 5, torch.where(torch.arange(3) < 2, now, now + 1)])
        mask = additive(((position > now - 4) & (position <= now)).view(1, 8))
        swa = hf.attention(core, q, rows, rows, mask, scaling=0.4)[0]
        more = torch.cat([rows, rows[:, :, :3]], 2)
        return swa, hf.attention(core, q, more, more, mask, scaling=0.4)[0]

    got, report = rewritten(step, q, rows, torch.tensor([8]))
    assert report.counts["attention"] == 2 and ran(report) == {"attention"}
    for one, other in zip(got, step(q, rows, torch.tensor([8])), strict=True):
        close(one, other)


@pytest.mark.parametrize(
    "mask",
    [
        lambda given: given,
        lambda given: additive(sliding(4) & (given > -1)),
        lambda given: additive(torch.arange(T) <= torch.arange(T).unsqueeze(1) - torch.arange(T).unsqueeze(1) % 2),
        lambda given: torch.where(sliding(4), torch.zeros(()), -3.0).expand(B, 1, T, T),
    ],
    ids=["an input", "padding", "not sliding", "soft"],
)
def test_other_masks_stay_dense(rewritten, mask):
    core, q, rows = drawn()
    given = torch.randn(B, 1, T, T)

    def attend(q, rows, given):
        return core(q, rows, mask(given))

    got, report = rewritten(attend, q, rows, given)
    assert report.counts["attention"] == 1 and ran(report) == {"dense_attention"}
    close(got, attend(q, rows, given))


def test_dense_attention_says_what_the_formula_says():
    sink, q, rows = torch.randn(H).double(), *(x.double() for x in drawn(S=9)[1:])
    mask = torch.randn(B, 1, T, 9).double()
    mask[:, :, 3:5] = float("-inf")
    s = torch.einsum("bhtd,bsd->bhts", q, rows[:, 0]) * 0.3 + mask
    weight = s.exp() / (s.exp().sum(-1, keepdim=True) + sink.exp().view(1, -1, 1, 1))
    args = q.transpose(1, 2), rows[:, 0], mask, sink, 0.3
    torch.testing.assert_close(dense_attention(*args), torch.einsum("bhts,bsd->bthd", weight, rows[:, 0]))
    torch.library.opcheck(dense_attention.target, (*(a.float() for a in args[:-1]), 0.3, None, None))
    assert dense_attention.symbolic_cost().flops.free_symbols
