"""Hugging Face's `DeepseekV4ForCausalLM`, as it is, under `torch.compile(model, backend="dsv4")`.

    dsv4_compile.hf.prepare(model)
    compiled = torch.compile(model, backend="dsv4")
    logits = compiled(tokens, use_cache=False).logits

    cache = dsv4_compile.hf.StaticCache(model, batch=1, max_len=2048)
    logits = compiled(prompt, past_key_values=cache).logits  # into an empty cache
    logits = compiled(token, past_key_values=cache).logits  # [B, 1]: one graph at every position

Nothing of the model is changed but two names in its config. *Experts*: "grouped_mm" (Hugging Face's default) and
"batched_mm" trace as one graph and are found; "eager" loops over the experts that were hit, which breaks the graph in
every layer. *Attention*: "eager" will do for prefill. Decode with a static cache needs ours, "dsv4": for a single token
Hugging Face's HCA layers give no mask for their entries, as a cache of theirs holds none that is still empty.
"""

from typing import Any

import torch
from torch import Tensor

SWA, CSA, HCA = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
ATTENTION = "dsv4"


def prepare(model: Any) -> Any:
    """Choose the experts and attention implementations with which the model is one graph; returns the model."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, eager_mask)
    model.set_attn_implementation(ATTENTION)
    if model.config._experts_implementation not in ("grouped_mm", "batched_mm"):
        model.set_experts_implementation("grouped_mm")
    return model


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Hugging Face's eager attention, on those columns of the mask that belong to this kind of layer.

    query [B, h, T, d]; key = value [B, 1, S, d]. A `StaticCache` makes one mask for all layers of a decode step: the
    window's slots, then the entries of HCA. SWA leaves those out, CSA puts its own behind them.
    """
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import eager_attention_forward

    mask, S = attention_mask, key.shape[2]
    if mask is not None and mask.shape[-1] > S:
        W = module.sliding_window
        mask = mask[..., :W] if S == W else torch.cat([mask[..., :W], mask[..., W - S :]], -1)
    return eager_attention_forward(module, query, key, value, mask, **kwargs)


class StaticCache:
    """`past_key_values` whose tensors never grow: written in place at a position tensor, so that decode is one graph.

    It takes the place of transformers' `DynamicCache` in `model(tokens, past_key_values=cache)`, for a prompt into the
    empty cache and then for one token at a time, without an attention mask: rows of a batch are of one length. It cannot
    be cropped, reordered or offloaded. `length` [1] int64 is the number of tokens seen; more than `max_len` are
    undefined. With HCA layers the model must be `prepare`d.
    """

    is_compileable = True

    def __init__(self, model: Any, batch: int, max_len: int):
        config, blocks = model.config, model.model.layers
        if batch < 1 or max_len < 1:
            raise ValueError(f"a cache needs batch >= 1 and max_len >= 1; got {batch=}, {max_len=}")
        if HCA in config.layer_types and config._attn_implementation != ATTENTION:
            raise ValueError(
                f"a model with HCA layers needs attention implementation {ATTENTION!r} to decode with a static cache, "
                f"it has {config._attn_implementation!r}: call dsv4_compile.hf.prepare(model)"
            )
        self.length = torch.zeros(1, dtype=torch.int64, device=blocks[0].self_attn.sinks.device)
        self.empty = True
        self.layers = [LAYERS[b.self_attn.layer_type](b.self_attn, self.length, batch, max_len) for b in blocks]
        self.window = config.sliding_window
        self.far = next((layer for layer in self.layers if type(layer) is HCALayer), None)
        self.is_sliding = [True] * len(blocks)
        for tensor in self.tensors():
            torch._dynamo.mark_static_address(tensor)

    def tensors(self) -> list[Tensor]:
        """All that the cache remembers."""
        return [self.length, *(t for layer in self.layers for t in layer.tensors())]

    def reset(self) -> None:
        """Empty again, in the same tensors."""
        self.length.zero_()
        for layer in self.layers:
            layer.reset()
        self.empty = True

    def get_seq_length(self, layer_idx: int = 0) -> Tensor | int:
        return 0 if self.empty else self.length

    def get_query_offset(self, layer_idx: int = 0) -> Tensor | int:
        return self.get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, Tensor | int]:
        """Columns of the mask, and what to add to a column's number to have its position. For a single token: the ring's
        slots hold the last positions; columns of HCA's entries stand at the token's own position where it sees them."""
        if query_length > 1:
            return query_length, 0
        W, now, device = self.window, self.length, self.length.device
        slot = torch.arange(W, device=device)
        position = now - (now - slot).remainder(W)
        position = torch.where(position < 0, now - W, position)
        if self.far is not None:
            entry = torch.arange(self.far.entries["compressor"].shape[1], device=device)
            position = torch.cat([position, torch.where(entry < (now + 1) // self.far.rate, now, now + 1)])
        return len(position), position - torch.arange(len(position), device=device)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """keys = values [B, 1, T, d] of a layer; returns the rows that its queries may see."""
        T = keys.shape[2]
        if T > 1 and layer_idx == 0 and not self.empty:
            raise ValueError(f"{T} tokens for a cache that is not empty: give one token at a time, or reset() it")
        if layer_idx == 0:
            self.length += T
            self.empty = False
        rows = self.layers[layer_idx].see(keys)
        return rows, rows


class SWALayer:
    """keys [B, W, d]: a ring, position p in slot p mod W. `length` is the cache's, this call's tokens included."""

    def __init__(self, attention: Any, length: Tensor, batch: int, max_len: int):
        self.length, self.batch, self.device, self.decoding = length, batch, length.device, False
        self.keys = self.zeros(attention.sliding_window, attention.head_dim, dtype=attention.kv_proj.weight.dtype)

    def zeros(self, *sizes: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(self.batch, *sizes, dtype=dtype, device=self.device)

    def tensors(self) -> list[Tensor]:
        return [self.keys]

    def reset(self) -> None:
        for tensor in self.tensors():
            tensor.zero_()

    def see(self, keys: Tensor) -> Tensor:
        """keys [B, 1, T, d] of a call -> the rows that its queries may see, with an axis for the head too."""
        T, W = keys.shape[2], self.keys.shape[1]
        rows, first = keys.squeeze(1).to(self.keys.dtype), max(0, T - W)
        self.decoding = T == 1
        if self.decoding:
            self.keys.index_copy_(1, (self.length - 1) % W, rows)
            return self.keys.unsqueeze(1)
        self.keys.index_copy_(1, torch.arange(first, T, device=self.device) % W, rows[:, first:])
        return keys


class HCALayer(SWALayer):
    """And for each compressor by name: values and gates [B, m, C] of the window that is open, a ring; and all entries
    [B, ceil(max_len / m), d]. The open window's entry is worked out anew with every token and not seen before it closes."""

    spare = 0  # entries that are never seen

    def __init__(self, attention: Any, length: Tensor, batch: int, max_len: int):
        super().__init__(attention, length, batch, max_len)
        self.rate = attention.compressor.compress_rate
        self.values: dict[str, Tensor] = {}
        self.gates: dict[str, Tensor] = {}
        self.entries: dict[str, Tensor] = {}
        for name, compressor in self.compressors(attention).items():
            kv, gate = compressor.kv_proj.weight, compressor.gate_proj.weight
            self.values[name] = self.zeros(self.rate, kv.shape[0], dtype=kv.dtype)
            self.gates[name] = self.zeros(self.rate, gate.shape[0], dtype=gate.dtype)
            self.entries[name] = self.zeros(-(-max_len // self.rate) + self.spare, compressor.head_dim, dtype=kv.dtype)

    def compressors(self, attention: Any) -> dict[str, Any]:
        return {"compressor": attention.compressor}

    def tensors(self) -> list[Tensor]:
        return [self.keys, *(t for d in (self.values, self.gates, self.entries) for t in d.values())]

    def store_compression_weights(self, name: str, kv: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor | int]:
        """kv, gate [B, T, C] -> those of the windows to compress, and the position of the first."""
        T, m = kv.shape[1], self.rate
        if self.decoding:
            slot = (self.length - 1) % m
            self.values[name].index_copy_(1, slot, kv)
            self.gates[name].index_copy_(1, slot, gate)
            return self.values[name], self.gates[name], (self.length - 1) // m * m
        whole = T // m * m
        self.values[name][:, : T - whole] = kv[:, whole:]
        self.gates[name][:, : T - whole] = gate[:, whole:]
        return kv[:, :whole], gate[:, :whole], 0

    def update_compressor_states(self, name: str, compressed: Tensor) -> Tensor:
        """compressed [B, n, d], the entries of this call -> all that there are; in decode, all that there can be."""
        entries, n = self.entries[name], compressed.shape[1]
        if not self.decoding:
            entries[:, :n] = compressed
            return compressed
        entries.index_copy_(1, (self.length - 1) // self.rate, compressed)
        return entries


class CSALayer(HCALayer):
    """And the older half of what the next window overlaps with: values and gates [B, m, d] of the last closed window."""

    spare = (
        1  # so that there are more of them than of HCA's: Hugging Face appends their mask only to one that is too short
    )

    def __init__(self, attention: Any, length: Tensor, batch: int, max_len: int):
        super().__init__(attention, length, batch, max_len)
        self.before: dict[str, tuple[Tensor, Tensor]] = {}
        for name, compressor in self.compressors(attention).items():
            d, gate = compressor.head_dim, torch.promote_types(self.gates[name].dtype, compressor.position_bias.dtype)
            self.before[name] = (
                self.zeros(self.rate, d, dtype=self.values[name].dtype),
                self.zeros(self.rate, d, dtype=gate),
            )
        self.reset()

    def compressors(self, attention: Any) -> dict[str, Any]:
        return {"compressor": attention.compressor, "indexer": attention.compressor.indexer}

    def tensors(self) -> list[Tensor]:
        return [*super().tensors(), *(t for pair in self.before.values() for t in pair)]

    def reset(self) -> None:
        super().reset()
        for _, gate in self.before.values():
            gate.fill_(float("-inf"))

    def update_overlap_state(
        self, name: str, kv: Tensor, gate: Tensor, head_dim: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """kv, gate [B, n, m, 2 d] of this call's windows -> the older halves that the first of them overlaps with."""
        old = self.before[name]
        prior = tuple(t.clone() for t in old) if self.decoding else (None, None)
        for state, new in zip(old, (kv, gate), strict=True):
            new = new[:, -1, :, :head_dim]
            state.copy_(torch.where(self.length % self.rate == 0, new, state) if self.decoding else new)
        return prior[0], prior[1]


LAYERS = {SWA: SWALayer, CSA: CSALayer, HCA: HCALayer}
