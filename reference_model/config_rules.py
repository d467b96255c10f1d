"""The rules of a DeepSeek-V4 config.  Every error names the field, its value, what was expected and the way out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .schedule import CSA, HASH, HCA, LEARNED, SWA

if TYPE_CHECKING:
    from .config import DSV4Config

CHOICES: dict[str, tuple[Any, ...]] = {
    "num_key_value_heads": (1,),
    "n_shared_experts": (1,),
    "scoring_func": ("sqrtsoftplus", "softmax", "sigmoid"),
    "norm_topk_prob": (True, False),
    "hidden_act": ("silu",),
    "tie_word_embeddings": (False,),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0,),
    "sink_mode": ("denominator", "swa_scale"),
    "hash_gate": ("scored", "uniform"),
    "linear_format": ("none", "fp8"),
    "expert_format": ("none", "fp8", "mxfp4", "nvfp4"),
    "mtp_expert_format": ("none", "fp8", "mxfp4", "nvfp4"),
}
POSITIVE_INTEGERS = (
    "vocab_size",
    "hidden_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "qk_rope_head_dim",
    "q_lora_rank",
    "o_groups",
    "o_lora_rank",
    "sliding_window",
    "index_n_heads",
    "index_head_dim",
    "index_topk",
    "n_routed_experts",
    "num_experts_per_tok",
    "hc_mult",
    "hc_sinkhorn_iters",
    "max_position_embeddings",
)
POSITIVE = ("routed_scaling_factor", "swiglu_limit", "hc_eps", "rms_norm_eps", "initializer_range")
BLOCK = {
    "none": 1,
    "fp8": 1,
    "mxfp4": 32,
    "nvfp4": 16,
}  # columns that share a scale and must divide a row (fp8 may be ragged)


def positive_integer(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is an int above 0."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r}: expected a positive integer")


def _require(holds: bool, config: DSV4Config, name: str, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name}={getattr(config, name)!r}: {expected}")


def check(c: DSV4Config) -> None:
    """Raise ValueError for the first rule that the config breaks."""
    for name, allowed in CHOICES.items():
        _require(getattr(c, name) in allowed, c, name, "expected " + " or ".join(map(repr, allowed)))
    for name in POSITIVE_INTEGERS:
        positive_integer(name, getattr(c, name))
    for name in POSITIVE:
        value = getattr(c, name)
        fix = (
            "; to switch the clamp off pass a large number, sources disagree about 0" if name == "swiglu_limit" else ""
        )
        _require(_number(value) and value > 0, c, name, f"expected a number above 0{fix}")
    for name in ("rope_theta", "compress_rope_theta"):
        _require(_number(getattr(c, name)) and getattr(c, name) > 1, c, name, "expected a number above 1")
    mtp = c.num_nextn_predict_layers
    _require(type(mtp) is int and mtp >= 0, c, "num_nextn_predict_layers", "expected an integer, 0 or more")
    _check_shapes(c)
    _check_schedule(c)
    _check_tokens(c)
    _check_yarn(c)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_shapes(c: DSV4Config) -> None:
    heads, dim, rope = c.num_attention_heads, c.head_dim, c.qk_rope_head_dim
    _require(heads % c.o_groups == 0, c, "o_groups", f"must divide num_attention_heads={heads}")
    _require(rope % 2 == 0, c, "qk_rope_head_dim", "must be even, channels rotate in pairs")
    _require(rope < dim, c, "qk_rope_head_dim", f"must be below head_dim={dim}, some channels carry no position")
    _require(rope <= c.index_head_dim, c, "index_head_dim", f"must be at least qk_rope_head_dim={rope}")
    experts = c.n_routed_experts
    _require(c.num_experts_per_tok <= experts, c, "num_experts_per_tok", f"must not exceed n_routed_experts={experts}")
    formats = {"expert_format": c.expert_format} | (
        {"mtp_expert_format": c.mtp_expert_format} if c.num_nextn_predict_layers else {}
    )
    for field, format in formats.items():
        for name in ("hidden_size", "moe_intermediate_size"):
            block = BLOCK[format]
            expected = f"must be a multiple of {block}, the block of {field}={format!r}; or choose 'none' or 'fp8'"
            _require(getattr(c, name) % block == 0, c, name, expected)


def _check_schedule(c: DSV4Config) -> None:
    _require(
        c.compress_rates.keys() == {CSA, HCA}, c, "compress_rates", f"expected exactly the keys {CSA!r} and {HCA!r}"
    )
    for kind, rate in c.compress_rates.items():
        positive_integer(f"compress_rates[{kind!r}]", rate)
    for name, allowed in (("layer_types", (SWA, CSA, HCA)), ("mlp_layer_types", (HASH, LEARNED))):
        kinds = getattr(c, name)
        if len(kinds) != c.num_hidden_layers:
            raise ValueError(
                f"{name} has {len(kinds)} entries: expected one a layer, num_hidden_layers={c.num_hidden_layers}"
            )
        for layer, kind in enumerate(kinds):
            if kind not in allowed:
                raise ValueError(f"{name}[{layer}]={kind!r}: expected one of {', '.join(map(repr, allowed))}")
    if HASH in c.mlp_layer_types[c.num_hash_layers :]:
        raise ValueError(
            f"mlp_layer_types={c.mlp_layer_types!r}: {HASH!r} layers must come first; or pass num_hash_layers alone"
        )


def _check_tokens(c: DSV4Config) -> None:
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(c, name)
        for token in value if isinstance(value, tuple) else () if value is None else (value,):
            valid = type(token) is int and 0 <= token < c.vocab_size
            _require(valid, c, name, f"expected token ids of 0 to {c.vocab_size - 1} (vocab_size - 1) or None")


def _check_yarn(c: DSV4Config) -> None:
    if c.rope_scaling is None:
        return
    _require(c.rope_scaling["type"] == "yarn", c, "rope_scaling", "expected type 'yarn', or None for plain rope")
    for key in ("factor", "beta_fast", "beta_slow", "original_max_position_embeddings"):
        value = c.rope_scaling[key]
        if not _number(value) or value <= 0:
            raise ValueError(f"rope_scaling[{key!r}]={value!r}: expected a number above 0")
