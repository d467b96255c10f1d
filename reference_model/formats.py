"""Storage formats of the weights, from and to a `quantization_config`.  Source: DeepSeek-V4, Checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import DSV4Config


def folded(given: Mapping[str, Any], layers: int) -> dict[str, str]:
    """Storage formats that a `quantization_config` says; empty without one.

    Official: FP8 linears; experts by `expert_dtype`, "fp4" is MXFP4, else FP8.  NVFP4 if one main layer has it.
    """
    if not given.get("quantization_config"):
        return {}
    *main, mtp = expert_formats(given, layers, 1)
    return {
        "linear_format": "fp8",
        "expert_format": "nvfp4" if "nvfp4" in main else main[0],
        "mtp_expert_format": mtp,
    }


def expert_formats(given: Mapping[str, Any], layers: int, mtp: int) -> tuple[str, ...]:
    """Format of the routed experts of every main layer, then of every MTP block, by the `quantization_config`.

    ModelOpt says NVFP4 once (`moe_quant_algo`) and then which layers have it: those in `quantized_layers`, or without
    that map the main layers that `ignore` does not name.  All others are as official, MTP too unless it is in the map:
    reading it as NVFP4 would silently ruin its drafts.
    """
    quantization = given["quantization_config"]
    method, block = quantization.get("quant_method"), quantization.get("weight_block_size")
    if method not in ("fp8", "modelopt"):
        raise ValueError(f"quantization_config.quant_method={method!r}: expected 'fp8' or 'modelopt'")
    if block is not None and list(block) != [128, 128]:
        raise ValueError(f"quantization_config.weight_block_size={block!r}: expected [128, 128]")
    dtype = quantization.get("expert_dtype") or given.get("expert_dtype") or "fp8"
    if dtype not in ("fp4", "fp8"):
        raise ValueError(f"expert_dtype={dtype!r}: expected 'fp4' or 'fp8'")
    official = "mxfp4" if dtype == "fp4" else "fp8"
    if str(quantization.get("moe_quant_algo") or quantization.get("quant_algo")).upper() != "NVFP4":
        return (official,) * (layers + mtp)
    listed, ignored = quantization.get("quantized_layers"), quantization.get("ignore") or ()

    def has_nvfp4(*spellings: str) -> bool:
        if listed is not None:
            return any(_within(entry, f"{block}.ffn.experts") for entry in listed for block in spellings)
        main = not spellings[0].startswith("mtp.")
        return main and not any(_covers(entry, f"{block}.ffn.experts") for entry in ignored for block in spellings)

    blocks = [(f"layers.{i}",) for i in range(layers)] + [(f"mtp.{i}", f"layers.{layers + i}") for i in range(mtp)]
    return tuple("nvfp4" if has_nvfp4(*spellings) else official for spellings in blocks)


def _within(entry: str, experts: str) -> bool:
    """Whether an entry of a layer map names a block's experts, as a whole or one by one."""
    return f"{_plain(entry)}.".startswith(f"{experts}.")


def _covers(pattern: str, experts: str) -> bool:
    """Whether an ignore pattern (a name, its beginning, or a glob) leaves a block's experts out."""
    pattern = _plain(pattern)
    return f"{experts}.".startswith(f"{pattern}.") or any(fnmatchcase(n, pattern) for n in (experts, f"{experts}.0.w1"))


def _plain(name: str) -> str:
    return name.removeprefix("model.").replace(".mlp.", ".ffn.")


def quantization_config(config: DSV4Config) -> dict[str, Any]:
    """What the official release, or for NVFP4 experts ModelOpt, writes about its formats."""
    official = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
        "activation_scheme": "dynamic",
    }
    if config.expert_format != "nvfp4":
        return official
    blocks = [f"layers.{i}" for i in range(config.num_hidden_layers)]
    kept = ["layers.*.attn.*", "layers.*.ffn.shared_experts.*", "head"]
    if config.mtp_expert_format == "nvfp4":
        blocks += [f"mtp.{i}" for i in range(config.num_nextn_predict_layers)]
    else:
        kept.append("mtp.*")
    listed = {f"{block}.ffn.experts": {"quant_algo": "NVFP4", "group_size": 16} for block in blocks}
    modelopt = {"quant_algo": "MIXED_PRECISION", "moe_quant_algo": "NVFP4", "group_size": 16}
    return official | modelopt | {"quantized_layers": listed, "ignore": kept}
