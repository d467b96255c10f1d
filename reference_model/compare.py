"""What a checkpoint holds against what its config asks for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

import torch

from .config import DSV4Config
from .manifest import BF16, E8M0, FP8, FP32, Spec
from .shards import CheckpointError, Entry

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
PACKED = (torch.int8, torch.uint8)  # two 4-bit codes a byte, both spellings are in use
# Expected dtype -> dtypes that may stand for it.
ACCEPTED: dict[torch.dtype, tuple[torch.dtype, ...]] = {
    BF16: FLOATS,
    FP32: FLOATS,
    FP8: (FP8,),
    E8M0: (E8M0, torch.uint8, torch.float32),  # raw bytes; or the fp32 scales of FP8-only releases
    torch.int8: PACKED,
    torch.uint8: PACKED,
    torch.int64: (torch.int64, torch.int32, torch.int16),
}
SHOWN = 20  # names listed of each kind; the others are counted by pattern


def compare(config: DSV4Config, expected: Mapping[str, Spec], found: Mapping[str, Entry]) -> None:
    """Raise CheckpointError listing every missing, unexpected and misshapen tensor, canonical names on both sides."""
    # The scale of activations is of no use to weights-only arithmetic, and not every NVFP4 checkpoint has it.
    missing = [name for name in expected if name not in found and not name.endswith(".input_scale")]
    unexpected = [f"{name} (in {entry.where})" for name, entry in found.items() if name not in expected]
    misshapen = [
        f"{name}: expected {_spell(*spec)}, found {_spell(found[name].dtype, found[name].shape)}"
        for name, spec in expected.items()
        if name in found and not _fits(name, expected, found[name])
    ]
    if not (missing or unexpected or misshapen):
        return
    kinds = (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
    error = CheckpointError(
        "the checkpoint is not the model of its config\n"
        + "".join(_listing(kind, lines) for kind, lines in kinds)
        + f"The config says {config.num_hidden_layers} layers, {config.num_nextn_predict_layers} MTP, "
        f"{config.n_routed_experts} experts, linear_format={config.linear_format!r}, expert_format="
        f"{config.expert_format!r}, mtp_expert_format={config.mtp_expert_format!r}: fetch what is missing, or take the "
        "config.json (with its quantization_config) that belongs to these files."
    )
    error.missing = tuple(missing)
    error.unexpected = tuple(line.split(" ", 1)[0] for line in unexpected)
    error.misshapen = tuple(line.split(":", 1)[0] for line in misshapen)
    raise error


def _fits(name: str, expected: Mapping[str, Spec], entry: Entry) -> bool:
    dtype, shape = expected[name]
    if entry.shape != shape and not (shape == () and entry.shape == (1,)):
        return False
    if dtype == E8M0 and entry.dtype == torch.float32:  # a 4-bit weight's scales are bytes in every release
        return expected[f"{name.removesuffix('.scale')}.weight"][0] == FP8
    return entry.dtype in ACCEPTED[dtype]


def _spell(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def _listing(kind: str, lines: list[str]) -> str:
    if not lines:
        return ""
    text = f"{len(lines)} {kind}:\n" + "".join(f"  {line}\n" for line in lines[:SHOWN])
    rest = Counter(re.sub(r"\d+", "*", line.split(" ", 1)[0].rstrip(":")) for line in lines[SHOWN:])
    return text + "".join(f"  and {count} like {pattern}\n" for pattern, count in rest.items())
