"""The reference model against the independent implementation in `transformers`: random configs, fp32, CPU.

A row of a batch is judged up to the first position at which a discrete choice (experts, entries) hangs on a margin below
1e-5: past such a near tie two right implementations may part. Tolerance: 1e-4 for logits of size 7, in proportion.
"""

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv4_compile.reference_model import DSV4, DSV4Config, from_hf, generate
from dsv4_compile.reference_model.schedule import CSA, HCA, SWA

EXAMPLES = 50
MARGIN, GAP, EXCLUDED = 1e-5, 2e-4, 0.02


@dataclass
class Tally:
    """What the suite saw; printed at the end."""

    worst: float = 0.0
    worst_decode: float = 0.0
    rows: int = 0
    excluded: int = 0
    configs: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def tally(request):
    tally = Tally()
    yield tally
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(
            f"\nparity with transformers: {len(tally.configs)} configs, worst error {tally.worst:.2f} of the tolerance, decode "
            f"against prefill {tally.worst_decode:.2f}; {tally.excluded} of {tally.rows} positions past a near tie"
        )


@st.composite
def configs(draw):
    """HF fields of a small model with odd sizes, every kind of layer and both routers."""
    size = st.integers
    kinds = draw(st.permutations([SWA, CSA, HCA]))[: draw(size(1, 3))]
    groups, dr = draw(size(1, 3)), 2 * draw(size(1, 6))
    d = draw(st.integers(dr + 1, dr + 25).filter(lambda d: int(d * (dr / d)) == dr))  # HF recomputes dr with truncation
    experts = draw(size(2, 9))
    few = draw(st.booleans())
    yarn = dict(type="yarn", factor=16, beta_fast=32, beta_slow=1, original_max_position_embeddings=64)
    return dict(
        vocab_size=draw(size(20, 90)),
        hidden_size=draw(size(9, 70)),
        moe_intermediate_size=draw(size(3, 30)),
        num_hidden_layers=len(kinds),
        num_attention_heads=groups * draw(size(1, 3)),
        head_dim=d,
        qk_rope_head_dim=dr,
        q_lora_rank=draw(size(3, 30)),
        o_groups=groups,
        o_lora_rank=draw(size(2, 20)),
        sliding_window=draw(size(1, 14)),
        compress_rates={CSA: 4, HCA: draw(size(5, 12))},
        index_n_heads=draw(size(16, 19)),
        index_head_dim=2 ** draw(size(4, 5)),
        index_topk=draw(size(1, 4)) if few else 64,
        n_routed_experts=experts,
        num_experts_per_tok=draw(size(1, min(4, experts))),
        routed_scaling_factor=draw(st.sampled_from([1.0, 1.5, 2.5])),
        swiglu_limit=draw(st.sampled_from([0.7, 10.0])),
        hc_mult=draw(size(1, 5)),
        hc_sinkhorn_iters=draw(size(1, 20)),
        num_hash_layers=draw(size(0, len(kinds))),
        layer_types=kinds,
        rope_scaling=draw(st.sampled_from([None, yarn])),
        max_position_embeddings=4096,
        num_nextn_predict_layers=0,
        tie_word_embeddings=False,
    )


@torch.no_grad()
def randomise(hf, experts: int, seed: int) -> None:
    """Every parameter: defaults such as zero sinks, zero biases and unit norms hide bugs."""
    g = torch.Generator().manual_seed(seed)
    for name, p in [*hf.named_parameters(), *hf.named_buffers()]:
        if "inv_freq" in name:
            continue
        if p.dtype == torch.int64:  # the hash table
            p.copy_(torch.rand(len(p), experts, generator=g).topk(p.shape[1], -1).indices)
            continue
        noise = torch.randn(p.shape, generator=g)
        if "norm" in name:
            p.copy_(1 + 0.2 * noise)
        elif p.dim() == 1:
            p.copy_((0.3 if "bias" in name else 0.5) * noise)
        else:
            p.copy_(1.5 * noise * p.shape[-1] ** -0.5)


def pair(fields: dict, seed: int):
    """A random Hugging Face model and ours with the same weights."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.deepseek_v4 import DeepseekV4Config, DeepseekV4ForCausalLM

    transformers.logging.set_verbosity_error()
    clean = {k: v for k, v in fields.items() if v is not None}
    hf = DeepseekV4ForCausalLM(DeepseekV4Config(**clean)).eval()
    hf.set_experts_implementation("eager")  # its grouped matmul refuses odd sizes
    randomise(hf, fields["n_routed_experts"], seed)
    return hf, from_hf(hf)


def margins(model: DSV4, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and for each position [B, T] the smallest margin of a discrete choice in any layer."""
    B, T = tokens.shape
    smallest = torch.full((B, T), float("inf"))

    def note(score: torch.Tensor, k: int) -> None:
        nonlocal smallest
        if score.shape[-1] > k:
            best = score.topk(k + 1, -1).values
            gap = (best[..., k - 1] - best[..., k]).nan_to_num(nan=float("inf"))  # both invisible
            smallest = torch.minimum(smallest, gap.view(B, T))

    def router(module, args):
        if module.bias is not None:
            note(module.score(args[0]) + module.bias, module.k)

    def indexer(module, args):
        score = module.score(*args)
        visible = args[2].windows[CSA].visible.unsqueeze(-1)
        note(score.masked_fill(torch.arange(score.shape[-1]) >= visible, float("-inf")), module.k)

    hooks = []
    for layer in model.layers:
        hooks.append(layer.ffn.gate.register_forward_pre_hook(router))
        if layer.attn.kind == CSA:
            hooks.append(layer.attn.indexer.register_forward_pre_hook(indexer))
    logits = model(tokens)
    for hook in hooks:
        hook.remove()
    return logits, smallest


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    fields=configs(),
    batch=st.integers(1, 3),
    extra=st.integers(1, 9),
    windows=st.integers(0, 2),
    seed=st.integers(0, 999),
)
def test_logits_equal_those_of_transformers(tally, fields, batch, extra, windows, seed):
    hf, model = pair(fields, seed)
    T = windows * fields["compress_rates"][HCA] + extra
    tokens = torch.randint(0, fields["vocab_size"], (batch, T), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        want = hf(tokens, use_cache=False).logits
    got, margin = margins(model, tokens)
    clear = (margin >= MARGIN).cumprod(-1).bool()  # [B, T], up to the first near tie
    tally.rows += clear.numel()
    tally.excluded += int((~clear).sum())
    tally.configs.append(f"{fields['layer_types']}")
    tolerance = 1e-4 * max(1.0, want.abs().max().item() / 7)
    error = (got - want).abs().amax(-1)[clear].max().item() if clear.any() else 0.0
    tally.worst = max(tally.worst, error / tolerance)
    assert error <= tolerance
    best = want.topk(2, -1)
    sure = clear & (best.values[..., 0] - best.values[..., 1] > GAP)
    assert torch.equal(got.argmax(-1)[sure], want.argmax(-1)[sure])

    state = model.new_state(batch, T, draft=seed % 3)
    steps = [model(t, state) for t in (tokens.split(1, 1) if seed % 2 else tokens.split(1 + seed % 5, 1))]
    error = (torch.cat(steps, 1) - got).abs().amax(-1)[clear].max().item() if clear.any() else 0.0
    tally.worst_decode = max(tally.worst_decode, error / tolerance)
    assert error <= tolerance


def test_at_most_2_percent_of_the_positions_were_past_a_near_tie(tally):
    assert len(tally.configs) >= EXAMPLES and tally.rows > 0
    assert tally.excluded <= EXCLUDED * tally.rows


def test_64_greedy_tokens_are_those_of_transformers():
    """Across every boundary: windows of 4 and 8 close, the ring of 12 wraps."""
    config = DSV4Config.tiny()
    hf, model = pair({**config.to_hf_dict(), "index_topk": 64}, seed=3)
    prompt = torch.randint(0, config.vocab_size, (1, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = hf.generate(prompt, max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=0)[0, 11:]
    got = torch.cat(list(generate(model, prompt, 64)))
    assert torch.equal(got, want)
