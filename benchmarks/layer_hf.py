"""Hugging Face's model with the layers and the weights of a model of ours, decoding one token at a time.

Its cache is the one of `dsv4_compile.hf`, which does not grow: with transformers' own, Inductor compiles anew with every
token. Tensors are shared but for the packed first matrices of the experts, and for numbers that it keeps in another dtype.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsv4_compile import hf
from dsv4_compile.reference_model import DSV4, draw, names
from dsv4_compile.reference_model.hf_config import unfold


@dataclass
class HFLoop:
    """What a decode loop keeps on the device."""

    cache: hf.StaticCache
    token: Tensor
    temperature: Tensor
    seed: Tensor

    @staticmethod
    def start(model: Any, batch: int, context: int, room: int) -> "HFLoop":
        """Equal numbers in every call: what is remembered of `context` tokens."""
        torch.manual_seed(1)
        cache = hf.StaticCache(model, batch, context + room)
        for tensor in cache.tensors():
            if tensor.is_floating_point():
                tensor.normal_()
        cache.length.fill_(context)
        cache.empty = False
        device = cache.length.device
        fixed = torch.ones(batch, 1, dtype=torch.int64, device=device), torch.zeros(1, device=device)
        return HFLoop(cache, *fixed, torch.zeros(1, dtype=torch.int64, device=device))


def step(model: Any, loop: HFLoop) -> Tensor:
    """The next token in the place of the loop's -> the logits [B, V]."""
    logits = model(loop.token, past_key_values=loop.cache).logits[:, -1]
    loop.token.copy_(draw(logits.float(), loop.temperature, loop.seed, loop.cache.length).unsqueeze(1))
    return logits


def model_of(ours: DSV4, layers: list[nn.Module], mark: Any) -> Any:
    """Hugging Face's model on our tensors. layers: ours; `mark` gets what comes into the first one and out of each."""
    import transformers

    transformers.logging.set_verbosity_error()
    config = transformers.DeepseekV4Config(**unfold(ours.config))
    with torch.device("meta"):
        model = transformers.DeepseekV4ForCausalLM(config)
    held = {path: t for path, t in [*ours.named_parameters(), *ours.named_buffers()] if not path.startswith("layers.")}
    for i, layer in enumerate(layers):
        held |= {f"layers.{i}.{path}": t for path, t in [*layer.named_parameters(), *layer.named_buffers()]}
    # not norms: transformers before 5.20 multiplies in the dtype of their weights
    wide = [w for w in model._keep_in_fp32_modules_strict or () if "norm" not in w]
    device = held["embed.weight"].device
    for path, module in model.named_modules():
        for own in (module._parameters, module._buffers):
            for name, t in own.items():
                if t is not None and "inv_freq" not in name:
                    found = tensor_of(f"{path}.{name}", held)
                    if found.is_floating_point():
                        found = found.to(torch.float32 if any(w in f"{path}.{name}" for w in wide) else torch.bfloat16)
                    own[name] = nn.Parameter(found, requires_grad=False) if own is module._parameters else found
        for name, child in module.named_children():
            if type(child).__name__.endswith("RotaryEmbedding"):  # tables that are computed
                setattr(module, name, type(child)(config).to(device))
    blocks = model.model.layers
    blocks[0].register_forward_pre_hook(lambda module, given: (mark(given[0]), *given[1:]))
    for block in blocks:
        block.register_forward_hook(lambda module, given, out: mark(out))
    return hf.prepare(model.eval())


def tensor_of(name: str, held: dict[str, Tensor]) -> Tensor:
    """Of ours, by the name that Hugging Face gives it."""
    canonical = names.canonical(name)
    stem, _, leaf = canonical.rpartition(".")
    if leaf == "gate_up_proj":
        return torch.cat([held[f"{stem}.w1.weight"], held[f"{stem}.w3.weight"]], 1)
    return held[f"{stem}.w2.weight" if leaf == "down_proj" else names.parameter(canonical)[0]]
