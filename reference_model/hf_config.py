"""Hugging Face's config spellings, new and legacy, to and from the fields of `DSV4Config`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from . import formats
from .schedule import CSA, HCA, RATES, SWA, default_mlp_layer_types

if TYPE_CHECKING:
    from .config import DSV4Config

LEGACY = (
    "compress_ratios",
    "compress_rate_csa",
    "compress_rate_hca",
    "num_hash_layers",
    "partial_rotary_factor",
    "rope_parameters",
    "quantization_config",
    "expert_dtype",
    "num_local_experts",
    "intermediate_size",
)
# Said by a config.json, of no meaning to the mathematics of inference.
INFORMATIVE = {
    "architectures",
    "auto_map",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "use_cache",
    "topk_method",
    "output_router_logits",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "output_hidden_states",
    "output_attentions",
    "return_dict",
    "chunk_size_feed_forward",
    "is_encoder_decoder",
    "id2label",
    "label2id",
    "problem_type",
    "name_or_path",
    "pretraining_tp",
    "n_group",
    "topk_group",
    "ep_size",
    "first_k_dense_replace",
    "moe_layer_freq",
    "aux_loss_alpha",
    "seq_aux",
    "attn_implementation",
    "experts_implementation",
}
# A changed name on the right makes the present value of the field on the left void (see DSV4Config.replace).
SUPERSEDES = {
    "layer_types": {"compress_ratios"},
    "mlp_layer_types": {"num_hash_layers"},
    "compress_rates": {"compress_rate_csa", "compress_rate_hca"},
    "qk_rope_head_dim": {"partial_rotary_factor"},
    "rope_scaling": {"rope_parameters"},
    "rope_theta": {"rope_parameters"},
    "compress_rope_theta": {"rope_parameters"},
    "n_routed_experts": {"num_local_experts"},
    "moe_intermediate_size": {"intermediate_size"},
    "linear_format": {"quantization_config"},
    "expert_format": {"quantization_config"},
    "mtp_expert_format": {"quantization_config", "expert_format"},
}
YARN_DEFAULTS = {"beta_fast": 32, "beta_slow": 1}
YARN_KEYS = ("type", "factor", "beta_fast", "beta_slow", "original_max_position_embeddings")
# In a rope dict but said elsewhere (theta, rotary share), or of no effect here: V4 never scales cos and sin.
ROPE_ASIDES = {"rope_type", "rope_theta", "partial_rotary_factor", "attention_factor", "mscale", "mscale_all_dim"}


def fold(given: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Hugging Face keyword arguments -> those fields of DSV4Config (`known`: field -> default) that they settle.

    Raises TypeError for an unknown name, ValueError where two spellings disagree or a value is not DeepSeek-V4's.
    """
    _refuse_unknown(given, known)
    model_type = given.get("model_type", "deepseek_v4")
    if model_type != "deepseek_v4":
        raise ValueError(f"model_type={model_type!r}: expected 'deepseek_v4', other architectures are not this model")
    chosen = {name: value for name, value in given.items() if name in known}
    for name in ("layer_types", "mlp_layer_types", "compress_rates", "qk_rope_head_dim", "mtp_expert_format"):
        if chosen.get(name, 0) is None:  # config.json may say null for "use the default"
            del chosen[name]
    _agree(chosen, "n_routed_experts", "num_local_experts", given.get("num_local_experts"))
    _agree(chosen, "moe_intermediate_size", "intermediate_size", given.get("intermediate_size"))
    value = {**known, **chosen}
    _fold_rope(chosen, given, value)
    _fold_schedule(chosen, given, value)
    for name, format in formats.folded(given, value["num_hidden_layers"]).items():
        chosen.setdefault(name, format)
    if isinstance(chosen.get("eos_token_id"), list | tuple) and len(chosen["eos_token_id"]) == 1:
        chosen["eos_token_id"] = chosen["eos_token_id"][0]
    return chosen


def _refuse_unknown(given: Iterable[str], known: Iterable[str]) -> None:
    names = {*known, *LEGACY, *INFORMATIVE, "model_type"}
    for name in given:
        if name not in names and not name.startswith("_"):
            near = difflib.get_close_matches(name, names, 1, 0.5)
            raise TypeError(
                f"unknown config field {name!r}" + (f": did you mean {near[0]!r}?" if near else ": remove it")
            )


def _agree(chosen: dict[str, Any], name: str, spelling: str, value: Any) -> None:
    """Settle a field by another spelling of it; both may be given, if they say the same."""
    if value is None:
        return
    if chosen.setdefault(name, value) != value:
        raise ValueError(f"{spelling}={value!r} and {name}={chosen[name]!r} disagree: pass one of them")


def _fold_rope(chosen: dict[str, Any], given: Mapping[str, Any], value: Mapping[str, Any]) -> None:
    """Both keys may be flat or nested by rope ("main", "compress"); nested thetas are those that Hugging Face uses."""
    share = given.get("partial_rotary_factor")
    if share is not None:
        _agree(chosen, "qk_rope_head_dim", "head_dim * partial_rotary_factor", int(value["head_dim"] * share))
    for spelling in ("rope_scaling", "rope_parameters"):
        rope = given.get(spelling)
        if rope is None:
            continue
        if spelling == "rope_scaling":
            del chosen["rope_scaling"]
        main, compress = rope.get("main"), rope.get("compress")
        if isinstance(main, Mapping) and isinstance(compress, Mapping):
            if main.get("rope_type", "default") != "default":
                raise ValueError(
                    f"{spelling}['main'] has rope_type={main['rope_type']!r}: sliding layers use plain rope"
                )
            chosen["rope_theta"] = main.get("rope_theta", value["rope_theta"])
            chosen["compress_rope_theta"] = compress.get("rope_theta", value["compress_rope_theta"])
            rope = compress
        scaling = yarn(rope, value["max_position_embeddings"])
        if (
            spelling == "rope_parameters"
            and given.get("rope_scaling") is not None
            and chosen.get("rope_scaling") != scaling
        ):
            raise ValueError(
                f"rope_parameters={rope!r} and rope_scaling={given['rope_scaling']!r} disagree: pass one of them"
            )
        chosen["rope_scaling"] = scaling


def yarn(rope: Mapping[str, Any], max_position: int) -> dict[str, Any] | None:
    """One rope dict of either spelling (`type` or `rope_type`) -> the five YaRN numbers, or None for plain rope."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "yarn":
        raise ValueError(
            f"rope type {kind!r}: DeepSeek-V4 scales its compress rope by 'yarn' or not at all ('default')"
        )
    for key in rope:
        if key not in ROPE_ASIDES and key not in YARN_KEYS:
            raise ValueError(f"rope key {key!r} is unknown: expected {', '.join(YARN_KEYS)}")
    if rope.get("attention_factor") not in (None, 1, 1.0):
        raise ValueError(
            f"rope attention_factor={rope['attention_factor']!r}: expected 1.0, V4 does not scale cos and sin"
        )
    original = rope.get("original_max_position_embeddings")
    if original is None:
        raise ValueError(
            "rope type 'yarn' without original_max_position_embeddings: add it (65536 in the released models)"
        )
    factor = max_position / original if rope.get("factor") is None else rope["factor"]
    betas = {name: rope.get(name) or default for name, default in YARN_DEFAULTS.items()}
    return {"type": "yarn", "factor": factor, **betas, "original_max_position_embeddings": original}


def _fold_schedule(chosen: dict[str, Any], given: Mapping[str, Any], value: Mapping[str, Any]) -> None:
    rates = dict(chosen.get("compress_rates", RATES))
    for kind, name in ((CSA, "compress_rate_csa"), (HCA, "compress_rate_hca")):
        if given.get(name) is not None:
            rates[kind] = given[name]
            chosen["compress_rates"] = rates
    layers, ratios, hashed = value["num_hidden_layers"], given.get("compress_ratios"), given.get("num_hash_layers")
    if ratios is not None:
        kinds = {0: SWA, rates.get(CSA): CSA, rates.get(HCA): HCA}
        for i, ratio in enumerate(ratios):
            if ratio not in kinds:
                raise ValueError(
                    f"compress_ratios[{i}]={ratio!r}: expected one of {sorted(k for k in kinds if k is not None)}"
                )
            if i >= layers and ratio:
                raise ValueError(
                    f"compress_ratios[{i}]={ratio!r} is past num_hidden_layers={layers}, of an MTP block: expected 0"
                )
        _agree(
            chosen,
            "layer_types",
            "compress_ratios",
            _like(chosen.get("layer_types"), [kinds[r] for r in ratios[:layers]]),
        )
    if hashed is not None:
        if type(hashed) is not int or hashed < 0:
            raise ValueError(f"num_hash_layers={hashed!r}: expected an integer, 0 or more")
        types = default_mlp_layer_types(layers, hashed)
        _agree(chosen, "mlp_layer_types", "num_hash_layers", _like(chosen.get("mlp_layer_types"), types))


def _like(present: Any, value: Iterable[str]) -> Any:
    """As the sequence type that it is to be compared with."""
    return list(value) if isinstance(present, list) else tuple(value)


def unfold(config: DSV4Config) -> dict[str, Any]:
    """The `config.json` of a config: published keys and Hugging Face's, and ours only where those cannot say it."""
    ours = ("sink_mode", "hash_gate", "linear_format", "expert_format", "mtp_expert_format")
    written: dict[str, Any] = {"architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4"}
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name not in ours or (field.name in ours[:2] and value != field.default):
            written[field.name] = (
                list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, dict) else value
            )
    if len(set(config.compress_rates.values())) == 2:  # the released keys; equal rates would not tell CSA from HCA
        written["compress_ratios"] = list(config.compress_ratios)
    written["num_hash_layers"] = config.num_hash_layers
    if config.linear_format == "fp8":
        written["quantization_config"] = formats.quantization_config(config)
        written["expert_dtype"] = "fp8" if config.expert_format == "fp8" else "fp4"
    kept = {name: getattr(config, name) for name in ours[2:]}
    if dict.fromkeys(kept, "none") | formats.folded(written, config.num_hidden_layers) != kept:
        written |= kept
    return written
