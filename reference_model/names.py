"""Three spellings of one tensor: official checkpoint name, Hugging Face name, parameter path in `DSV4`.

A *canonical* name is the official one with uniform suffixes: `.weight`, `.scale`, `.scale_2`, `.input_scale`.
"""

from __future__ import annotations

import re

# Official module -> Hugging Face module, inside a block; both have a `.weight`, and scales if quantised.
MODULES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn.wq_a": "self_attn.q_a_proj",
    "attn.q_norm": "self_attn.q_a_norm",
    "attn.wq_b": "self_attn.q_b_proj",
    "attn.wkv": "self_attn.kv_proj",
    "attn.kv_norm": "self_attn.kv_norm",
    "attn.wo_a": "self_attn.o_a_proj",
    "attn.wo_b": "self_attn.o_b_proj",
    "attn.compressor.wkv": "self_attn.compressor.kv_proj",
    "attn.compressor.wgate": "self_attn.compressor.gate_proj",
    "attn.compressor.norm": "self_attn.compressor.kv_norm",
    "attn.indexer.wq_b": "self_attn.compressor.indexer.q_b_proj",
    "attn.indexer.weights_proj": "self_attn.compressor.indexer.scorer.weights_proj",
    "attn.indexer.compressor.wkv": "self_attn.compressor.indexer.kv_proj",
    "attn.indexer.compressor.wgate": "self_attn.compressor.indexer.gate_proj",
    "attn.indexer.compressor.norm": "self_attn.compressor.indexer.kv_norm",
    "ffn.gate": "mlp.gate",
    "ffn.shared_experts.w1": "mlp.shared_experts.gate_proj",
    "ffn.shared_experts.w2": "mlp.shared_experts.down_proj",
    "ffn.shared_experts.w3": "mlp.shared_experts.up_proj",
}
# Official tensor -> Hugging Face tensor, inside a block.
TENSORS = {
    "attn.attn_sink": "self_attn.sinks",
    "attn.compressor.ape": "self_attn.compressor.position_bias",
    "attn.indexer.compressor.ape": "self_attn.compressor.indexer.position_bias",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.gate.tid2eid": "mlp.gate.tid2eid",
    "hc_attn_fn": "attn_hc.fn",
    "hc_attn_base": "attn_hc.base",
    "hc_attn_scale": "attn_hc.scale",
    "hc_ffn_fn": "ffn_hc.fn",
    "hc_ffn_base": "ffn_hc.base",
    "hc_ffn_scale": "ffn_hc.scale",
}
# The same, outside all blocks.
TOP = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
    "hc_head_fn": "model.hc_head.hc_fn",
    "hc_head_base": "model.hc_head.hc_base",
    "hc_head_scale": "model.hc_head.hc_scale",
}
# Official, Hugging Face (which stores a multiplier under the name of an inverse) and ModelOpt, to canonical.
SUFFIXES = {
    "weight": "weight",
    "scale": "scale",
    "weight_scale_inv": "scale",
    "weight_scale": "scale",
    "weight_scale_2": "scale_2",
    "input_scale": "input_scale",
}
# transformers' save_pretrained does not undo this one of its renamings.
SAVED = {"attn.norm": "attn.kv_norm"}

_modules = {hf: official for official, hf in MODULES.items()} | SAVED
_tensors = {hf: official for official, hf in TENSORS.items()}
_top = {hf.removeprefix("model."): official for official, hf in TOP.items()}
_block = re.compile(r"((?:layers|mtp)\.\d+\.)(.+)")
_expert = re.compile(r"(?:ffn|mlp)\.experts\.(\d+)\.(\w+)")
_projections = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_hyper = re.compile(r"hc_(attn|ffn|head)_(fn|base|scale)$")
# Kept in fp32 in memory whatever the compute dtype: small, and read by fp32 arithmetic.
_exact = re.compile(r"(norm\.weight|hc_\w+|attn_sink|ape|gate\.bias)$")


def canonical(name: str) -> str:
    """Any spelling of a tensor's name -> the canonical one.  What is not recognised comes back as it is, less `model.`.

    Hugging Face's packed experts, one tensor for all of a layer, keep their leaf: `layers.3.ffn.experts.gate_up_proj`
    (w1 rows, then w3 rows) and `down_proj`, with `_scale` behind it for their scales.
    """
    name = name.removeprefix("model.")
    block, rest = "", name
    if match := _block.fullmatch(name):
        block, rest = match.groups()
    elif name in _top:
        return _top[name]
    if rest in _tensors:
        return block + _tensors[rest]
    if rest.startswith("mlp.experts.") and not _expert.match(rest):
        return block + rest.replace("mlp.", "ffn.", 1).removesuffix("_inv")
    module, _, suffix = rest.rpartition(".")
    if suffix not in SUFFIXES or not module:
        return name
    if expert := _expert.fullmatch(module):
        number, projection = expert.groups()
        module = f"ffn.experts.{number}.{_projections.get(projection, projection)}"
    return f"{block}{_modules.get(module, module)}.{SUFFIXES[suffix]}"


def hf(name: str) -> str:
    """Canonical name of an unquantised tensor -> Hugging Face's in memory; routed experts have none, it packs them."""
    if name in TOP:
        return TOP[name]
    match = _block.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is not a tensor of DeepSeek-V4")
    block, rest = match.groups()
    if rest in TENSORS:
        return f"model.{block}{TENSORS[rest]}"
    module, _, suffix = rest.rpartition(".")
    return f"model.{block}{MODULES[module]}.{suffix}"


def parameter(name: str) -> tuple[str, int | None]:
    """Canonical name -> path of the parameter or buffer in `DSV4`, and for a routed expert its index in the stack."""
    name = _hyper.sub(r"hc_\1.\2", name)
    if match := re.search(r"\.experts\.(\d+)\.", name):
        return name.replace(match[0], ".experts.", 1), int(match[1])
    return name, None


def kept_fp32(name: str) -> bool:
    """Whether a canonical name's tensor stays fp32 in memory: norms, mHC, sinks, ape, router bias."""
    return _exact.search(name) is not None
