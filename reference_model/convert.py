"""One tensor at a time between storage and model: dtypes, formats, stacking, packing."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import names
from .manifest import BF16, E8M0, FP8, Spec
from .quant import dequantize, mxfp4_to_nvfp4
from .shards import CheckpointError, Entry

_packed = re.compile(r"(layers\.\d+\.ffn\.experts)\.(gate_up_proj|down_proj)(_scale)?")
_format = {FP8: "fp8", torch.int8: "mxfp4", torch.uint8: "nvfp4"}  # by the dtype that a manifest gives a weight


def canonical_entries(stored: Mapping[str, Entry]) -> dict[str, Entry]:
    """Canonical name -> entry; packed experts become one entry for each expert's w1, w2 and w3."""
    found: dict[str, Entry] = {}
    for raw, entry in stored.items():
        name = names.canonical(raw)
        for part, value in _unpacked(name, entry).items():
            if part in found:
                raise CheckpointError(
                    f"{part} is stored twice, as {found[part].where} and as {value.where}: remove one"
                )
            found[part] = value
    return found


def _unpacked(name: str, entry: Entry) -> dict[str, Entry]:
    match = _packed.fullmatch(name)
    if match is None or len(entry.shape) != 3:
        return {name: entry}
    owner, leaf, scale = match.groups()
    suffix, (experts, rows, _) = "scale" if scale else "weight", entry.shape
    cut = {"w2": slice(None)} if leaf == "down_proj" else {"w1": slice(0, rows // 2), "w3": slice(rows // 2, None)}
    return {f"{owner}.{e}.{w}.{suffix}": entry.part(e, part) for e in range(experts) for w, part in cut.items()}


@dataclass(frozen=True)
class Reader:
    """Turns stored entries into what a model holds; see `checkpoint.load` for the options."""

    found: Mapping[str, Entry]
    device: torch.device
    dtype: torch.dtype | None
    dequantize: bool
    check_finite: bool

    def matrix(self, name: str, expected: Mapping[str, Spec], format: str, own: bool = True) -> dict[str, Tensor]:
        """The tensor of a canonical name as `weight`, with its scales where it is stored quantised and stays so.

        `format`: what the model holds.  `own`: in memory of its own, else it may lie in the mapped file.
        """
        stored = _format.get(expected[name][0], "none")
        parts = {"weight": self.tensor(name, expected[name], own)}
        if stored == "none":
            return {"weight": self._plain(name, parts["weight"])}
        owner = name.removesuffix(".weight")
        for suffix in ("scale", "scale_2", "input_scale"):
            key = f"{owner}.{suffix}"
            if key in self.found:
                parts[suffix] = self.tensor(key, expected[key], own)
        if format == "none":
            weight = dequantize(parts["weight"], parts["scale"], parts.get("scale_2"), stored)
            return {"weight": weight.to(self.dtype or self.found["embed.weight"].dtype)}
        if (stored, format) == ("mxfp4", "nvfp4"):
            try:
                parts["weight"], parts["scale"], parts["scale_2"] = mxfp4_to_nvfp4(parts["weight"], parts["scale"])
            except ValueError as error:
                raise CheckpointError(f"{name} must become NVFP4 like the other layers: {error}") from error
        elif stored != format:
            raise CheckpointError(f"{name} is stored as {stored}, other layers as {format}: load with dequantize=True")
        if format == "nvfp4":
            parts.setdefault("input_scale", torch.ones_like(parts["scale_2"]))
        return parts

    def stack(self, members: Sequence[str], expected: Mapping[str, Spec], format: str) -> dict[str, Tensor]:
        """One matrix of every expert, stacked along a new first axis without holding the experts twice."""
        stacks: dict[str, Tensor] = {}
        for name in members:
            expert = names.parameter(name)[1]
            for suffix, t in self.matrix(name, expected, format, own=False).items():
                if suffix not in stacks:
                    stacks[suffix] = t.new_empty((len(members), *t.shape))
                if stacks[suffix].dtype != t.dtype:
                    raise CheckpointError(
                        f"{suffix} of {name} is {t.dtype}, before it {stacks[suffix].dtype}: store all experts alike"
                    )
                stacks[suffix][expert] = t
        return stacks

    def tensor(self, name: str, spec: Spec, own: bool) -> Tensor:
        """Read one entry onto the device, with raw bytes given the dtype that they stand for."""
        entry = self.found[name]
        t = entry.read().to(self.device, copy=own).contiguous().reshape(spec[1])
        if spec[0] == E8M0 and t.dtype == torch.uint8:
            t = t.view(E8M0)
        elif t.dtype == torch.int8:
            t = t.view(torch.uint8)
        elif spec[0] == torch.int64:
            t = t.long()
        if self.check_finite:
            _check(name, entry, t)
        if name.endswith("tid2eid"):
            experts = self.found[name.replace("tid2eid", "weight")].shape[0]
            if not 0 <= int(t.min()) <= int(t.max()) < experts:
                raise CheckpointError(f"{name} ({entry.where}) sends tokens to experts outside 0 to {experts - 1}")
        return t

    def _plain(self, name: str, t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        dtype = self.dtype or t.dtype
        return t.to(torch.promote_types(dtype, torch.float32) if names.kept_fp32(name) else dtype)


def _check(name: str, entry: Entry, t: Tensor) -> None:
    """Raise CheckpointError on NaN, on infinities other than of a sink or bias, which may switch something off."""
    if t.dtype == FP8:
        bad = (t.view(torch.uint8) & 0x7F) == 0x7F
    elif t.dtype == E8M0:
        bad = t.view(torch.uint8) == 0xFF
    elif not t.is_floating_point():
        return
    else:
        bad = t.isnan() if name.endswith(("attn_sink", "gate.bias")) else ~t.isfinite()
    if bool(bad.any()):
        raise CheckpointError(
            f"{name} ({entry.where}) has {int(bad.sum())} NaN or infinite values of {t.numel()}: fetch the file again, "
            "or load with check_finite=False to look at it"
        )


@dataclass(frozen=True)
class Pick:
    """How to get a stored tensor out of a model: from which parameters, and as what."""

    paths: tuple[str, ...]
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def pick(name: str, spec: Spec, held: Mapping[str, Tensor], narrow: bool) -> Pick:
    """`name`: of a manifest; `held`: the model's state_dict; `narrow`: norms go to bf16 where that is exact."""
    paths: tuple[str, ...]
    canonical, expert = names.canonical(name), None
    if match := _packed.fullmatch(canonical):
        paths = tuple(f"{match[1]}.{w}.weight" for w in (("w2",) if match[2] == "down_proj" else ("w1", "w3")))
    else:
        path, expert = names.parameter(canonical)
        paths = (path,)
    dtype = held[paths[0]].dtype
    if spec[0] == torch.int8:
        dtype = torch.int8
    elif narrow and spec[0] == BF16 and dtype == torch.float32 and _survives_bf16(held[paths[0]]):
        dtype = BF16

    def read() -> Tensor:
        parts = [held[path].detach() if expert is None else held[path].detach()[expert] for path in paths]
        t = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return t.view(dtype) if dtype == torch.int8 else t.to(dtype)

    return Pick(paths, dtype, spec[1], read)


def _survives_bf16(t: Tensor) -> bool:
    return torch.equal(t.to(BF16).to(t.dtype), t)
