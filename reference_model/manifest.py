"""Every tensor of a checkpoint, with dtype and shape, from the config alone.  Source: DeepSeek-V4, Checkpoints."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from math import ceil, prod

import torch

from . import names
from .config import DSV4Config
from .schedule import CSA, HASH, SWA

Spec = tuple[torch.dtype, tuple[int, ...]]
BF16, FP32, FP8, E8M0 = torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float8_e8m0fnu


def manifest(config: DSV4Config, format: str = "official") -> dict[str, Spec]:
    """Name -> (dtype, shape) as stored, in file order.

    "official": the released layout: one tensor for each expert matrix, FP8 / MXFP4 / NVFP4 by the config, MTP included.
    For Pro these are 145,116 tensors of 864.7 GB (805.3 GiB), exactly the released number and size; for Flash 69,187
    and 159.6 GB.
    "hf": names and packing of Hugging Face's `DeepseekV4ForCausalLM` in memory, without MTP; ValueError if quantised.
    Plain floats are listed in bf16, the released dtype; a checkpoint may hold them in another.
    """
    if format == "official":
        return {_modelopt(name, config): spec for name, spec in tensors(config).items()}
    if format == "hf":
        for field in ("linear_format", "expert_format"):
            if (value := getattr(config, field)) != "none":
                raise ValueError(
                    f"{field}={value!r}: Hugging Face reads quantised weights in the official layout only; use "
                    "format='official', or load with dequantize=True first"
                )
        return _packed({name: spec for name, spec in tensors(config).items() if not name.startswith("mtp.")})
    raise ValueError(f"checkpoint format {format!r}: expected 'official' or 'hf'")


def stored_bytes(specs: dict[str, Spec]) -> int:
    """Size of all tensors of a manifest in bytes."""
    return sum(dtype.itemsize * prod(shape) for dtype, shape in specs.values())


def tensors(config: DSV4Config, expert_formats: Sequence[str] | None = None) -> dict[str, Spec]:
    """Canonical name -> (dtype, shape).

    `expert_formats`: of the routed experts as stored, main layers then MTP blocks, where that differs from the config
    (a ModelOpt checkpoint may leave some layers as they were)."""
    layers, mtp = config.num_hidden_layers, config.num_nextn_predict_layers
    if expert_formats is None:
        expert_formats = (config.expert_format,) * layers + (config.mtp_expert_format,) * mtp
    D, V = config.hidden_size, config.vocab_size
    found: dict[str, Spec] = {"embed.weight": (BF16, (V, D))}
    kinds = zip(config.layer_types, config.mlp_layer_types, expert_formats, strict=False)
    for i, (attention, router, experts) in enumerate(kinds):
        found.update({f"layers.{i}.{name}": spec for name, spec in _block(config, attention, router, experts)})
    for i, experts in enumerate(expert_formats[layers:]):
        found.update({f"mtp.{i}.{name}": spec for name, spec in _mtp(config, experts)})
    found |= {"norm.weight": (BF16, (D,)), "head.weight": (BF16, (V, D))}
    return found | dict(_hyper_head(config))


def _linear(name: str, rows: int, columns: int, format: str = "none") -> Iterator[tuple[str, Spec]]:
    """A matrix [rows, columns] with what its format stores beside it."""
    if format == "none":
        yield f"{name}.weight", (BF16, (rows, columns))
    elif format == "fp8":
        yield f"{name}.weight", (FP8, (rows, columns))
        yield f"{name}.scale", (E8M0, (ceil(rows / 128), ceil(columns / 128)))
    elif format == "mxfp4":
        yield f"{name}.weight", (torch.int8, (rows, columns // 2))
        yield f"{name}.scale", (E8M0, (rows, columns // 32))
    else:
        yield f"{name}.weight", (torch.uint8, (rows, columns // 2))
        yield f"{name}.scale", (FP8, (rows, columns // 16))
        yield f"{name}.scale_2", (FP32, ())
        yield f"{name}.input_scale", (FP32, ())


def _hyper(name: str, config: DSV4Config) -> Iterator[tuple[str, Spec]]:
    n = config.hc_mult
    yield f"{name}_fn", (FP32, ((2 + n) * n, n * config.hidden_size))
    yield f"{name}_base", (FP32, ((2 + n) * n,))
    yield f"{name}_scale", (FP32, (3,))


def _hyper_head(config: DSV4Config) -> Iterator[tuple[str, Spec]]:
    n = config.hc_mult
    yield "hc_head_fn", (FP32, (n, n * config.hidden_size))
    yield "hc_head_base", (FP32, (n,))
    yield "hc_head_scale", (FP32, (1,))


def _compressor(name: str, config: DSV4Config, rate: int, columns: int, width: int) -> Iterator[tuple[str, Spec]]:
    yield from _linear(f"{name}.wkv", columns, config.hidden_size)
    yield from _linear(f"{name}.wgate", columns, config.hidden_size)
    yield f"{name}.ape", (FP32, (rate, columns))
    yield f"{name}.norm.weight", (BF16, (width,))


def _attention(c: DSV4Config, kind: str) -> Iterator[tuple[str, Spec]]:
    D, heads, d, format = c.hidden_size, c.num_attention_heads, c.head_dim, c.linear_format
    yield "attn.attn_sink", (FP32, (heads,))
    yield from _linear("attn.wq_a", c.q_lora_rank, D, format)
    yield "attn.q_norm.weight", (BF16, (c.q_lora_rank,))
    yield from _linear("attn.wq_b", heads * d, c.q_lora_rank, format)
    yield from _linear("attn.wkv", d, D, format)
    yield "attn.kv_norm.weight", (BF16, (d,))
    yield from _linear("attn.wo_a", c.o_groups * c.o_lora_rank, heads * d // c.o_groups, format)
    yield from _linear("attn.wo_b", D, c.o_groups * c.o_lora_rank, format)
    if kind == SWA:
        return
    streams = 2 if kind == CSA else 1  # CSA entries overlap: one half of the columns belongs to the next entry
    yield from _compressor("attn.compressor", c, c.rate(kind), streams * d, d)
    if kind == CSA:
        width = c.index_head_dim
        yield from _linear("attn.indexer.wq_b", c.index_n_heads * width, c.q_lora_rank, format)
        yield from _linear("attn.indexer.weights_proj", c.index_n_heads, D)
        yield from _compressor("attn.indexer.compressor", c, c.rate(kind), 2 * width, width)


def _block(c: DSV4Config, attention: str, router: str, experts: str) -> Iterator[tuple[str, Spec]]:
    D, inner, count = c.hidden_size, c.moe_intermediate_size, c.n_routed_experts
    yield from _attention(c, attention)
    yield from _linear("ffn.gate", count, D)
    if router == HASH:
        yield "ffn.gate.tid2eid", (torch.int64, (c.vocab_size, c.num_experts_per_tok))
    else:
        yield "ffn.gate.bias", (FP32, (count,))
    owners = [(f"ffn.experts.{e}", experts) for e in range(count)] + [("ffn.shared_experts", c.linear_format)]
    for owner, format in owners:
        yield from _linear(f"{owner}.w1", inner, D, format)
        yield from _linear(f"{owner}.w2", D, inner, format)
        yield from _linear(f"{owner}.w3", inner, D, format)
    yield "attn_norm.weight", (BF16, (D,))
    yield "ffn_norm.weight", (BF16, (D,))
    yield from _hyper("hc_attn", c)
    yield from _hyper("hc_ffn", c)


def _mtp(c: DSV4Config, experts: str) -> Iterator[tuple[str, Spec]]:
    D = c.hidden_size
    yield from _block(c, SWA, "moe", experts)
    yield from _linear("e_proj", D, D, c.linear_format)
    yield from _linear("h_proj", D, D, c.linear_format)
    for norm in ("enorm", "hnorm", "norm"):
        yield f"{norm}.weight", (BF16, (D,))
    yield from _hyper_head(c)


def _modelopt(name: str, config: DSV4Config) -> str:
    """Canonical -> stored name: NVFP4 experts carry ModelOpt's suffixes, all others the official ones."""
    format = config.mtp_expert_format if name.startswith("mtp.") else config.expert_format
    if ".ffn.experts." not in name or format != "nvfp4":
        return name
    return re.sub(r"\.(scale|scale_2)$", r".weight_\1", name)


def _packed(found: dict[str, Spec]) -> dict[str, Spec]:
    """Canonical -> Hugging Face: a layer's experts become one gate_up_proj [E, 2 I, D] and one down_proj [E, D, I]."""
    packed: dict[str, Spec] = {}
    for name, (dtype, shape) in found.items():
        match = re.fullmatch(r"(layers\.\d+)\.ffn\.experts\.(\d+)\.(w[123])\.weight", name)
        if match is None:
            packed[names.hf(name)] = dtype, shape
        elif match[3] != "w3":  # w3 fills the lower half of w1's tensor
            leaf, halves = ("gate_up_proj", 2) if match[3] == "w1" else ("down_proj", 1)
            packed[f"model.{match[1]}.mlp.experts.{leaf}"] = dtype, (int(match[2]) + 1, halves * shape[0], shape[1])
    return packed
