"""Generation state: static tensors, written in place at a position tensor, so that decode is one graph at every position.

Each layer keeps the latest tokens in *rings* (token p lives in slot p mod rows) and all compressed entries in *pools*.
No branch depends on a position: a window that is not closed yet is sent to the pool's last row, a scratch row that
nothing reads. Shapes: B batch, T tokens of the call, W sliding window, m tokens in a window, R = m or 2m rows that an
entry is made of.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from .config import DSV4Config
from .layers import put, take
from .quant import kv_layout
from .repeated import about, number
from .schedule import CSA, SWA

Dtype = torch.dtype | None


def still(x: Tensor) -> Tensor:
    """Tells torch.compile that this tensor lies where it is for good, so that CUDA graphs read and write it in place."""
    if x.is_cuda:  # elsewhere nothing asks, and the import takes a second
        torch._dynamo.mark_static_address(x)
    return x


def ring(config: DSV4Config, kind: str, width: int, draft: int) -> tuple[int, int]:
    """Rows and columns of what a compressor to `width` channels has not compressed yet."""
    overlap = kind == CSA
    return (1 + overlap) * config.rate(kind) + draft, (1 + overlap) * width


class Parts:
    """Something that comes apart into tensors, numbers and None, and back. Dynamo compares those from layer to layer and
    traces a kind of layer once; of layers that take whole objects it traces every one."""

    names: ClassVar[tuple[str, ...]]

    def parts(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.names)

    @classmethod
    def of(cls, parts: Iterator[Any]) -> Self:
        """The object of the next parts."""
        made = cls.__new__(cls)
        for name in cls.names:
            setattr(made, name, next(parts))
        return made


@dataclass
class CompressorState(Parts):
    """Rows not yet compressed, and the entries so far.

    values, gates [B, R + draft, C] (at least fp32), entries [B, ceil(max_len / m) + 1, d], the last row being scratch.
    scales: of entries in e4m3, fp32 [B, ceil(max_len / m) + 1, 1], else None.
    """

    names = "values", "gates", "entries", "scales"
    values: Tensor
    gates: Tensor
    entries: Tensor
    scales: Tensor | None = None


@dataclass
class LayerState:
    """kv [B, W + draft, d] ring of keys (= values), with the compressor's entries perhaps in bytes (`pack_kv`); `compressor`
    unless the layer is SWA only; `indexer` for CSA."""

    kv: Tensor
    compressor: CompressorState | None = None
    indexer: CompressorState | None = None

    def parts(self) -> tuple[Any, ...]:
        a, b = self.compressor, self.indexer
        if a is None:
            return self.kv, 0
        if b is None:
            return self.kv, 1, a.values, a.gates, a.entries, a.scales
        return self.kv, 2, a.values, a.gates, a.entries, a.scales, b.values, b.gates, b.entries, b.scales

    @torch.compiler.assume_constant_result
    def likeness(self) -> int:
        """A number that states share whose parts are the same but for their values."""
        places: dict[Any, int] = {}
        return number(*(about(x, places) if isinstance(x, Tensor) else x for x in self.parts()))

    @staticmethod
    def of(parts: Iterator[Any]) -> "LayerState":
        kv, count = next(parts), next(parts)
        return LayerState(kv, *[CompressorState.of(parts) for _ in range(count)])


@dataclass
class State:
    """All that a batch of sequences remembers. `position` [B] int64 counts the tokens seen by each row.

    To rewind by up to `draft` tokens (rejected speculation) subtract from `position`: rings hold that many rows more,
    and entries past the position are invisible until they are written again.
    """

    position: Tensor
    layers: list[LayerState]
    max_len: int
    draft: int

    def tensors(self) -> list[Tensor]:
        """The position and all that layers remember."""
        return [self.position, *(p for layer in self.layers for p in layer.parts() if isinstance(p, Tensor))]

    @staticmethod
    def empty(
        config: DSV4Config,
        batch: int,
        max_len: int,
        draft: int,
        device,
        dtype: torch.dtype,
        index_dtype: Dtype = None,
        kv_dtype: Dtype = None,
    ) -> "State":
        """The state before the first token, for `batch` sequences of up to `max_len` tokens; `draft` > 0 leaves room to rewind
        that many. Keys are of `dtype`, but two kinds may be stored in less, by torch.float8_e4m3fn: those of the indexer
        (`index_dtype`), each with a scale (`quantize_rows`): half the bytes, which decode at long context is bound by, for
        scores of keys that are 2.7 % off; and those of attention (`kv_dtype`), window and entries: rows of bytes
        (`pack_kv`), 592 for 1,024."""
        if batch < 1 or max_len < 1 or draft < 0:
            raise ValueError(f"a state needs batch >= 1, max_len >= 1, draft >= 0; got {batch=}, {max_len=}, {draft=}")
        if max_len > config.max_position_embeddings:
            raise ValueError(
                f"max_len {max_len} exceeds the model's context of {config.max_position_embeddings} tokens "
                "(max_position_embeddings): ask for less"
            )
        if index_dtype not in (None, dtype, torch.float8_e4m3fn):
            raise ValueError(f"index_dtype {index_dtype}: expected torch.float8_e4m3fn, or that of the model ({dtype})")
        if kv_dtype not in (None, dtype, torch.float8_e4m3fn):
            raise ValueError(f"kv_dtype {kv_dtype}: expected torch.float8_e4m3fn, or that of the model ({dtype})")
        d, exact = config.head_dim, torch.promote_types(dtype, torch.float32)

        def zeros(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
            return still(torch.zeros(batch, rows, columns, device=device, dtype=dtype))

        in_bytes = kv_dtype == torch.float8_e4m3fn
        row = kv_layout(d, config.qk_rope_head_dim)[-1] if in_bytes else d
        of_kv = torch.uint8 if in_bytes else dtype

        def compressor(kind: str, width: int, row: int, of_entries: torch.dtype) -> CompressorState:
            rows, columns = ring(config, kind, width, draft)
            count = -(-max_len // config.rate(kind)) + 1
            scales = zeros(count, 1, torch.float32) if of_entries == torch.float8_e4m3fn else None
            entries = zeros(count, row, of_entries)
            return CompressorState(zeros(rows, columns, exact), zeros(rows, columns, exact), entries, scales)

        layers = []
        for kind in (*config.layer_types, *[SWA] * config.num_nextn_predict_layers):
            layer = LayerState(zeros(config.sliding_window + draft, row, of_kv))
            if kind != SWA:
                layer.compressor = compressor(kind, d, row, of_kv)
            if kind == CSA:
                layer.indexer = compressor(kind, config.index_head_dim, config.index_head_dim, index_dtype or dtype)
            layers.append(layer)
        return State(still(torch.zeros(batch, device=device, dtype=torch.int64)), layers, max_len, draft)

    def fits(self, config: DSV4Config) -> bool:
        """Whether a model of these sizes made it, by the last layer of each kind: the others are made alike.

        torch.compile(dynamic=True) learns here which sizes are those of the model. It must not learn it inside a layer:
        torch 2.13 fails with a KeyError where a second layer takes a size that the first one's region made a constant.
        """
        in_bytes = self.layers[0].kv.dtype == torch.uint8
        row = kv_layout(config.head_dim, config.qk_rope_head_dim)[-1] if in_bytes else config.head_dim
        kv = [config.sliding_window + self.draft, row]
        for kind, layer in dict(zip(config.layer_types, self.layers, strict=False)).items():
            if list(layer.kv.shape[1:]) != kv or (layer.compressor is None) != (kind == SWA):
                return False
            kept = (
                (layer.compressor, config.head_dim, row),
                (layer.indexer, config.index_head_dim, config.index_head_dim),
            )
            for memory, width, of_entries in kept:
                if memory is not None:
                    rows = list(ring(config, kind, width, self.draft))
                    rings = [memory.values.shape[1:], memory.gates.shape[1:]]
                    if [list(r) for r in rings] != [rows, rows] or memory.entries.shape[2] != of_entries:
                        return False
        return len(self.layers) == config.num_hidden_layers + config.num_nextn_predict_layers


@dataclass
class Selection:
    """What the discrete choices were: expert ids [B * T, k] and picked entries [B, T, K] (None: not a CSA layer), layer by
    layer. An empty one passed to the model is filled; a filled one is replayed instead of choosing anew."""

    experts: list[Tensor] = field(default_factory=list)
    entries: list[Tensor | None] = field(default_factory=list)


class Chunk(Parts):
    """The T tokens of one call: where they stand, where their rows go, and where earlier rows are found.

    start [B]: tokens seen before; lengths [B] or None: how many of the T are real, row by row. `state` None: a call
    without memory, which starts at 0 and sees only itself.
    """

    names = "T", "start", "lengths", "draft", "token", "position", "end"

    def __init__(self, T: int, start: Tensor, lengths: Tensor | None, draft: int | None):
        self.T, self.start, self.lengths, self.draft = T, start, lengths, draft
        self.token = torch.arange(T, device=start.device)
        self.position = start.unsqueeze(1) + self.token  # [B, T]
        self.end = start + (T if lengths is None else lengths)  # [B]

    def extend(self, ring: Tensor | None, new: Tensor) -> Tensor:
        """Append new [B, T, C] to a ring; returns the rows to read [B, S, C], which `find` indexes."""
        if ring is None:
            return new
        if self.written_first:
            self.write(ring, new)
            return ring
        rows = torch.cat([ring, new.to(ring.dtype)], 1)  # later tokens overwrite slots that earlier queries need
        self.write(ring, new)
        return rows

    @property
    def written_first(self) -> bool:
        """Few enough tokens to be written before they are read: the ring's spare rows hold them."""
        return self.draft is not None and self.T <= self.draft + 1

    def find(self, p: Tensor, rows: int) -> Tensor:
        """Index of the tokens at positions p [B, ...] in what `extend` returns for a ring of `rows`; -1 before the first."""
        if self.draft is None:
            index = p
        elif self.written_first:
            index = p % rows
        else:
            start = self.start.view(-1, *[1] * (p.dim() - 1))
            index = torch.where(p >= start, rows + p - start, p % rows)
        return torch.where(p < 0, -1, index)

    def write(self, ring: Tensor, new: Tensor) -> None:
        """Store new [B, T, C] in the ring [B, rows, C], token p in slot p mod rows; only real tokens are written."""
        rows = ring.shape[1]
        if self.T <= rows:
            slot = self.position % rows
            if self.lengths is not None:
                real = (self.token < self.lengths.unsqueeze(1)).unsqueeze(-1)
                new = torch.where(real, new.to(ring.dtype), take(ring, slot))
            put(ring, slot, new)
        else:  # several tokens want one slot: each slot looks for the newest
            slot = torch.arange(rows, device=ring.device)
            last = self.end.unsqueeze(1) - 1
            p = last - (last - slot) % rows  # [B, rows], the newest position that lives in the slot
            start = self.start.unsqueeze(1)
            ring.copy_(torch.where((p >= start).unsqueeze(-1), take(new, p - start).to(ring.dtype), ring))


class Windows(Parts):
    """The compressor windows of m tokens that a chunk may close: n = ceil(T / m) of them from `start // m` on (no chunk
    can close more).

    index [B, n, R]: rows that make the entry, -1 in windows that stay open and before the first token. first [B, n]:
    position of the window's first token. slot [B, n]: row of the pool. visible [B, T]: entries that each query may see,
    its own window's included if the query closes it. count: entries in the pool.
    """

    names = "count", "index", "first", "slot", "visible"

    def __init__(self, chunk: Chunk, m: int, overlap: bool, max_len: int | None):
        n, R = -(-chunk.T // m), (1 + overlap) * m
        device = chunk.start.device
        self.count = n if max_len is None else -(-max_len // m)
        window = chunk.start.unsqueeze(1) // m + torch.arange(n, device=device)
        closed = (window + 1) * m <= chunk.end.unsqueeze(1)
        p = ((window + 1) * m - R).unsqueeze(-1) + torch.arange(R, device=device)
        rows = R if chunk.draft is None else R + chunk.draft
        self.index = torch.where(closed.unsqueeze(-1), chunk.find(p, rows), -1)
        self.first = window * m
        self.slot = torch.where(closed & (window < self.count), window, self.count)
        self.visible = ((chunk.position + 1) // m).clamp(max=self.count)
