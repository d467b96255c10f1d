"""Checkpoints in and out: official DeepSeek-V4 (FP8 + MXFP4), its NVFP4 variant, and Hugging Face's spellings.

Reading is lazy: the model is built without memory, then every tensor is read once, checked, moved and assigned.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import convert, formats, names
from .compare import compare
from .config import DSV4Config
from .manifest import manifest, tensors
from .model import DSV4
from .shards import CheckpointError, open_files, read_config, table, write_files

Progress = Callable[[str, int, int], None]


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    dequantize: bool = False,
    progress: Progress | None = None,
    check_finite: bool = True,
) -> DSV4:
    """Read a model: `path` is a folder with config.json and *.safetensors, or one .safetensors file that `save` wrote.

    dtype: compute dtype of all matrices that are not quantised (norms, mHC, sinks and biases keep at least fp32); None
    keeps what is stored.
    dequantize: turn FP8, MXFP4 and NVFP4 weights into plain ones of `dtype` (None: the embedding's).
    progress(tensor, done, total) is called at every parameter; without it a terminal gets a bar on stderr.
    check_finite: refuse NaN weights, and infinite ones where they mean nothing; costs one pass over the bytes.

    The model is in eval mode and frozen.  A Hugging Face folder has no MTP tensors and gives a model without MTP.
    Raises CheckpointError (a ValueError) listing missing, unexpected and misshapen tensors, or naming a broken file.
    """
    path = Path(path)
    content = read_config(path)
    try:
        config = DSV4Config.from_hf(content)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the config of {path} does not describe a DeepSeek-V4: {error}") from error
    stored = open_files(path)
    found = convert.canonical_entries(stored)
    if any(name.startswith("model.") for name in stored) and not any(name.startswith("mtp.") for name in found):
        config = config.replace(num_nextn_predict_layers=0)  # Hugging Face's model drops the MTP block
    reader = convert.Reader(found, torch.device(device), dtype, dequantize, check_finite)
    return _assemble(config, _expert_formats(content, config), reader, progress or _bar("load"))


def from_hf(hf_model: nn.Module) -> DSV4:
    """A copy of a Hugging Face `DeepseekV4ForCausalLM` on the same device, in eval mode and frozen, without MTP."""
    content: dict[str, Any] = hf_model.config.to_dict()  # type: ignore[operator, union-attr]
    config = DSV4Config.from_hf(content).replace(num_nextn_predict_layers=0)
    found = convert.canonical_entries(table(hf_model.state_dict().items()))
    reader = convert.Reader(found, next(hf_model.parameters()).device, None, False, False)
    return _assemble(config, _expert_formats(content, config), reader, lambda *_: None)


def save(
    model: DSV4,
    path: str | Path,
    format: str = "official",
    max_shard_bytes: int = 5 * 10**9,
    progress: Progress | None = None,
) -> None:
    """Write a model as a folder of shards with index and config.json, or as one file if `path` ends in .safetensors.

    "official" keeps everything, quantised bytes and MTP included, and loads back bit by bit; transformers reads it too,
    but guesses the FP8 block from the grid of scales, rightly only where all sizes are multiples of 128.
    "hf" has the names and packed experts of Hugging Face's model in memory, which its `load_state_dict` and
    `from_pretrained` take; it has no MTP, and a model that is quantised, or that Hugging Face would compute
    differently, is refused (ValueError).
    A shard has at most `max_shard_bytes`, or one tensor.  progress(file, done, total) is called before every shard.
    """
    config, held = model.config, model.state_dict(keep_vars=True)
    if format == "hf" and (config.sink_mode != "denominator" or config.hash_gate != "scored"):
        raise ValueError(
            f"sink_mode={config.sink_mode!r}, hash_gate={config.hash_gate!r}: Hugging Face's model computes "
            "'denominator' and 'scored' only; use format='official'"
        )
    narrow = model.embed.weight.dtype == torch.bfloat16
    picks = {name: convert.pick(name, spec, held, narrow) for name, spec in manifest(config, format).items()}
    named = {path for pick in picks.values() for path in pick.paths}
    nameless = [name for name in held if name not in named and not (format == "hf" and name.startswith("mtp."))]
    if nameless:
        raise ValueError(f"format {format!r} has no name for {', '.join(nameless)}: remove what was added to the model")
    content = config.to_hf_dict() | {"torch_dtype": str(model.embed.weight.dtype).removeprefix("torch.")}
    if format == "hf":
        content["num_nextn_predict_layers"] = 0
    sizes = {name: prod(pick.shape) * pick.dtype.itemsize for name, pick in picks.items()}
    write_files(Path(path), sizes, lambda name: picks[name].read(), content, max_shard_bytes, progress or _bar("save"))


def _expert_formats(content: dict[str, Any], config: DSV4Config) -> tuple[str, ...]:
    """Formats in which the experts are stored, main layers, then MTP; they may be mixed where the config says NVFP4."""
    layers, mtp = config.num_hidden_layers, config.num_nextn_predict_layers
    uniform = (config.expert_format,) * layers + (config.mtp_expert_format,) * mtp
    if config.expert_format != "nvfp4" or not content.get("quantization_config") or content.get("expert_format"):
        return uniform
    return formats.expert_formats(content, layers, mtp)[:layers] + uniform[layers:]


def _assemble(config: DSV4Config, stored: tuple[str, ...], reader: convert.Reader, progress: Progress) -> DSV4:
    """The model on the reader's device: built on meta, then every parameter assigned from what is stored."""
    expected = tensors(config, stored)
    compare(config, expected, reader.found)
    if reader.dequantize:
        config = config.replace(linear_format="none", expert_format="none", mtp_expert_format="none")
    with torch.device("meta"):
        model = DSV4(config)
    matrices: dict[str, list[str]] = defaultdict(list)  # parameter path -> canonical name, or one name for each expert
    for name in expected:
        if not name.endswith((".scale", ".scale_2", ".input_scale")):  # those come with their weight
            matrices[names.parameter(name)[0]].append(name)
    for done, (path, members) in enumerate(matrices.items()):
        progress(path, done, len(matrices))
        owner, _, leaf = path.rpartition(".")
        module = model.get_submodule(owner)
        format = getattr(module, "format", "none")
        if names.parameter(members[0])[1] is None:
            parts = reader.matrix(members[0], expected, format)
        else:
            parts = reader.stack(members, expected, format)
        for suffix, t in parts.items():
            _assign(module, leaf if suffix == "weight" else suffix, t)
    progress("", len(matrices), len(matrices))
    unassigned = [name for name, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    if unassigned:
        raise RuntimeError(f"no checkpoint format has a name for {', '.join(unassigned)}: model and manifest disagree")
    return model.to(reader.device).eval().requires_grad_(False)


def _assign(module: nn.Module, leaf: str, t: Tensor) -> None:
    if leaf in module._buffers:
        module.register_buffer(leaf, t)
    else:
        module.register_parameter(leaf, nn.Parameter(t, requires_grad=False))


def _bar(label: str) -> Progress:
    """A plain progress bar on stderr, if that is a terminal."""
    if not sys.stderr.isatty():
        return lambda *_: None

    def show(name: str, done: int, total: int) -> None:
        filled = 30 * done // max(total, 1)
        line = f"\r{label} [{'#' * filled}{'.' * (30 - filled)}] {done}/{total} {name}"
        sys.stderr.write(f"{line[:100]:<100}" + ("\n" if done == total else ""))
        sys.stderr.flush()

    return show
