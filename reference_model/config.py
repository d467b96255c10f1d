"""Shape of a DeepSeek-V4 model: one frozen, validated record with Hugging Face's field names.

`DSV4Config` takes what a published `config.json` holds, legacy spellings included (`hf_config.fold` resolves them),
refuses what it does not know, and checks every rule of the architecture once, so that no module has to check again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from . import config_rules, hf_config
from .schedule import CSA, HASH, HCA, LEARNED, RATES, SWA, default_layer_types, default_mlp_layer_types

YARN = {"type": "yarn", "factor": 16, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 65536}


class FrozenDict(dict[str, Any]):
    """A dict that refuses writes, so that a config can be hashed and shared; a plain `dict` to all readers."""

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a DSV4Config is read-only: make a changed copy with config.replace(...)")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)


@dataclass(frozen=True, init=False)
class DSV4Config:
    """Every size and switch of a DeepSeek-V4 model.  Defaults: Flash's sizes and schedule (CSA on even layers from 2).

    Keyword arguments are Hugging Face's, legacy keys too (`compress_ratios`, `compress_rate_csa`, `compress_rate_hca`,
    `num_hash_layers`, `partial_rotary_factor`, `rope_parameters`, `quantization_config` + `expert_dtype`, ...).
    Raises TypeError for an unknown name, with the nearest known one, and ValueError for a value that breaks a rule.
    """

    vocab_size: int = 129280
    hidden_size: int = 4096  # D
    moe_intermediate_size: int = 2048  # I
    num_hidden_layers: int = 43
    num_attention_heads: int = 64  # nh
    num_key_value_heads: int = 1  # one latent is key and value of all heads
    head_dim: int = 512  # d
    qk_rope_head_dim: int = 64  # dr, the last channels of a head
    q_lora_rank: int = 1024
    o_groups: int = 8  # g
    o_lora_rank: int = 1024  # dg
    sliding_window: int = 128  # W, self included
    compress_rates: Mapping[str, int] = FrozenDict(RATES)
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 512  # K
    n_routed_experts: int = 256  # E
    n_shared_experts: int = 1
    num_experts_per_tok: int = 6  # k
    scoring_func: str = "sqrtsoftplus"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.5
    swiglu_limit: float = 10.0
    hc_mult: int = 4  # n, residual streams
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    rope_scaling: Mapping[str, Any] | None = None  # YaRN, compress rope only; None is plain rope
    max_position_embeddings: int = 1048576
    num_nextn_predict_layers: int = 1  # MTP blocks
    layer_types: tuple[str, ...] = ()
    mlp_layer_types: tuple[str, ...] = ()
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 1
    pad_token_id: int | None = None
    hidden_act: str = "silu"
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    # Not Hugging Face's: readings of the architecture that differ between sources, and how the weights are stored.
    sink_mode: str = "denominator"  # or "swa_scale"
    hash_gate: str = "scored"  # or "uniform"
    linear_format: str = "none"  # or "fp8": attention, indexer, shared experts, MTP projections
    expert_format: str = "none"  # or "fp8" "mxfp4" "nvfp4": routed experts of the main layers
    mtp_expert_format: str = (
        "none"  # routed experts of the MTP block; by default expert_format, but mxfp4 where that is nvfp4
    )

    def __init__(self, **given: Any) -> None:
        known: dict[str, Any] = {field.name: field.default for field in fields(self)}
        layers = given.get("num_hidden_layers", self.num_hidden_layers)
        config_rules.positive_integer("num_hidden_layers", layers)
        chosen = hf_config.fold(given, known)
        values = known | chosen
        if "qk_rope_head_dim" not in chosen:
            values["qk_rope_head_dim"] = values["head_dim"] // 8
        if "mtp_expert_format" not in chosen:
            values["mtp_expert_format"] = "mxfp4" if values["expert_format"] == "nvfp4" else values["expert_format"]
        if "layer_types" not in chosen:
            values["layer_types"] = default_layer_types(layers)
        if "mlp_layer_types" not in chosen:
            values["mlp_layer_types"] = default_mlp_layer_types(layers)
        for name, value in values.items():
            if isinstance(value, list):
                value = tuple(value)
            elif isinstance(value, dict):
                value = FrozenDict(value)
            object.__setattr__(self, name, value)
        config_rules.check(self)

    def rate(self, layer_type: str) -> int:
        """Tokens in one compressed entry of a layer type; 0 for sliding_attention, which has no entries."""
        if layer_type != SWA and layer_type not in self.compress_rates:
            raise ValueError(f"layer type {layer_type!r}: expected one of {SWA!r}, {CSA!r}, {HCA!r}")
        return 0 if layer_type == SWA else self.compress_rates[layer_type]

    @property
    def num_hash_layers(self) -> int:
        """How many leading layers choose their experts by token id."""
        return self.mlp_layer_types.count(HASH)

    @property
    def compress_ratios(self) -> tuple[int, ...]:
        """The schedule in the released spelling: one rate a layer, then a 0 for every MTP block."""
        return tuple(self.rate(kind) for kind in self.layer_types) + (0,) * self.num_nextn_predict_layers

    def replace(self, **changes: Any) -> DSV4Config:
        """A changed and newly validated copy; takes the same names as the constructor.

        Another `num_hidden_layers` alone cuts the schedule, or continues it (CSA on even layers, HCA on odd, learned
        routers); another `expert_format` alone sets `mtp_expert_format` to its default again.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for replaced, by in hf_config.SUPERSEDES.items():
            if by & changes.keys():
                values.pop(replaced, None)
        layers = changes.get("num_hidden_layers", self.num_hidden_layers)
        config_rules.positive_integer("num_hidden_layers", layers)
        if "layer_types" in values:
            values["layer_types"] = (self.layer_types + default_layer_types(layers)[self.num_hidden_layers :])[:layers]
        if "mlp_layer_types" in values:
            values["mlp_layer_types"] = (self.mlp_layer_types + (LEARNED,) * layers)[:layers]
        return type(self)(**(values | changes))

    @classmethod
    def from_hf(cls, config: Any) -> DSV4Config:
        """From a Hugging Face `DeepseekV4Config` (anything with `to_dict()`), or the mapping in a `config.json`."""
        return cls(**(config if isinstance(config, Mapping) else config.to_dict()))

    @classmethod
    def from_json(cls, path: str | Path) -> DSV4Config:
        """From a `config.json`, or from the folder that holds one."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not valid JSON ({error}): fetch the file again") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path} holds a {type(content).__name__}, expected an object of config fields")
        return cls(**content)

    def to_hf_dict(self) -> dict[str, Any]:
        """The content of a `config.json` that Hugging Face and this class both read back to the same model."""
        return hf_config.unfold(self)

    @classmethod
    def flash(cls) -> DSV4Config:
        """DeepSeek-V4-Flash as released: 284 B parameters, FP8 linears, MXFP4 experts."""
        return cls(num_hash_layers=3, rope_scaling=YARN, linear_format="fp8", expert_format="mxfp4")

    @classmethod
    def pro(cls) -> DSV4Config:
        """DeepSeek-V4-Pro as released: 1.57 T parameters, FP8 linears, MXFP4 experts."""
        layers = 61
        return cls.flash().replace(
            hidden_size=7168,
            moe_intermediate_size=3072,
            num_hidden_layers=layers,
            num_attention_heads=128,
            q_lora_rank=1536,
            o_groups=16,
            index_topk=1024,
            n_routed_experts=384,
            routed_scaling_factor=2.5,
            layer_types=(HCA, HCA, *default_layer_types(layers)[2:]),
        )

    @classmethod
    def tiny(cls) -> DSV4Config:
        """Odd sizes that no tile divides, every layer kind, about 1.3 M parameters: for tests of masks and indexing."""
        return cls(
            vocab_size=331,
            hidden_size=96,
            moe_intermediate_size=40,
            num_hidden_layers=6,
            num_attention_heads=6,
            head_dim=48,
            qk_rope_head_dim=16,
            q_lora_rank=56,
            o_groups=3,
            o_lora_rank=20,
            sliding_window=12,
            compress_rates={CSA: 4, HCA: 8},
            # With few index heads their ReLUs are often all zero, and exact ties make the selection ambiguous.
            index_n_heads=16,
            index_head_dim=32,
            index_topk=3,
            n_routed_experts=10,
            num_experts_per_tok=3,
            rope_scaling=YARN | {"original_max_position_embeddings": 64},
            max_position_embeddings=4096,
            layer_types=(SWA, HCA, CSA, HCA, CSA, SWA),
            num_hash_layers=2,
        )

    @classmethod
    def nano(cls) -> DSV4Config:
        """A byte-level model that trains on a CPU: 256 bytes, then bos 256, eos 257, pad 258; 259 is unused."""
        return cls(
            vocab_size=260,
            hidden_size=192,
            moe_intermediate_size=64,
            num_hidden_layers=5,
            num_attention_heads=6,
            head_dim=64,
            qk_rope_head_dim=16,
            q_lora_rank=96,
            o_groups=3,
            o_lora_rank=64,
            index_n_heads=8,
            index_head_dim=32,
            index_topk=64,
            n_routed_experts=24,
            num_experts_per_tok=4,
            max_position_embeddings=2048,
            layer_types=(SWA, CSA, HCA, CSA, HCA),
            num_hash_layers=2,
            bos_token_id=256,
            eos_token_id=257,
            pad_token_id=258,
        )


def rope_frequencies(config: DSV4Config, which: str) -> torch.Tensor:
    """Angles per position of the rotary pairs, fp32 [qk_rope_head_dim / 2] on the CPU.

    `which` is "main" (sliding layers: theta 1e4, never scaled) or "compress" (CSA and HCA layers, their entries and the
    indexer: theta 1.6e5, YaRN by parts where `rope_scaling` is set, without its attention factor).  Written in the
    order of operations of transformers, so that both give the same bits.  Source: DeepSeek-V4, RoPE.
    """
    if which not in ("main", "compress"):
        raise ValueError(f"rope {which!r}: expected 'main' or 'compress'")
    theta, dim = (config.rope_theta if which == "main" else config.compress_rope_theta), config.qk_rope_head_dim
    # Explicitly on the CPU: under a `torch.device("meta")` block the table must still hold numbers.
    period = theta ** (torch.arange(0, dim, 2, dtype=torch.float, device="cpu") / dim)
    yarn = config.rope_scaling
    if which == "main" or yarn is None:
        return 1.0 / period

    def turning(rotations: float) -> float:
        """The (fractional) dimension that makes `rotations` turns within the original context."""
        turns = yarn["original_max_position_embeddings"] / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(theta))

    low = max(math.floor(turning(yarn["beta_fast"])), 0)
    high = min(math.ceil(turning(yarn["beta_slow"])), dim - 1)
    width = (high - low) or 0.001
    keep = 1 - ((torch.arange(dim // 2, dtype=torch.float, device="cpu") - low) / width).clamp(0, 1)
    return 1.0 / (yarn["factor"] * period) * (1 - keep) + 1.0 / period * keep
