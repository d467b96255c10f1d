"""Safetensors files as one lazy table of tensors, and back: reads and writes one tensor or one shard at a time."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}


class CheckpointError(ValueError):
    """A checkpoint that cannot become the model its config describes; says which tensors or files, and what to do.

    Where tensors do not match, `missing`, `unexpected` and `misshapen` hold all their names.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entry:
    """A stored tensor that has not been read yet."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    where: str  # file and name in it, for messages
    read: Callable[[], Tensor]  # [shape], on whatever device it is stored; may share memory with the store

    def part(self, expert: int, rows: slice) -> Entry:
        """One expert's rows of a packed tensor [E, rows, columns], read alone."""
        start, stop, _ = rows.indices(self.shape[1])
        where = f"{self.where}[{expert}, {start}:{stop}]"
        return Entry(self.dtype, (stop - start, *self.shape[2:]), where, lambda: self._slice(expert, start, stop))

    def _slice(self, expert: int, start: int, stop: int) -> Tensor:
        return self.read()[expert, start:stop]


@dataclass(frozen=True)
class FileEntry(Entry):
    handle: object = None
    name: str = ""

    def _slice(self, expert: int, start: int, stop: int) -> Tensor:
        return self.handle.get_slice(self.name)[expert, start:stop]  # type: ignore[attr-defined]


def read_config(path: Path) -> dict:
    """The `config.json` of a checkpoint folder, or the config in the metadata of a single file."""
    if path.is_file():
        text, source = (_open(path).metadata() or {}).get("config"), f"the metadata of {path}"
        if text is None:
            raise CheckpointError(f"{path} has no 'config' in its metadata: give the folder that holds config.json too")
    else:
        file = path / "config.json"
        if not path.is_dir():
            raise FileNotFoundError(f"no checkpoint at {path}: expected a folder, or a .safetensors file")
        if not file.is_file():
            raise CheckpointError(f"{path} has no config.json: copy the one of the checkpoint into it")
        text, source = file.read_text(encoding="utf-8"), str(file)
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{source} is not valid JSON ({error}): fetch it again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{source} is not a JSON object: expected the fields of a config")
    return config


def open_files(path: Path) -> dict[str, Entry]:
    """Stored name -> entry: of a single file, or in a folder of the files of its index, model.safetensors, or all."""
    entries: dict[str, Entry] = {}
    weight_map: dict[str, str] = {}
    if path.is_file():
        files = [path]
    elif (path / INDEX).is_file():
        weight_map = _weight_map(path / INDEX)
        files = [path / name for name in sorted(set(weight_map.values()))]
    else:
        whole = path / "model.safetensors"
        files = [whole] if whole.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{path} holds no .safetensors file: other formats must be converted first")
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        names = ", ".join(absent)
        raise CheckpointError(f"{path} lacks {len(absent)} of the {len(files)} files of its index: fetch {names}")
    for file in files:
        handle = _open(file)
        for name in handle.keys():  # noqa: SIM118 (not a dict)
            if name in entries:
                raise CheckpointError(f"{name} is in two files, {entries[name].where} and {file}: remove one file")
            part = handle.get_slice(name)
            stored, shape = part.get_dtype(), tuple(part.get_shape())
            if stored not in DTYPES:
                raise CheckpointError(f"{file}:{name} has dtype {stored}, expected one of {', '.join(DTYPES)}")
            entries[name] = FileEntry(DTYPES[stored], shape, f"{file.name}:{name}", _reader(handle, name), handle, name)
    lost = [f"{name} ({file})" for name, file in weight_map.items() if name not in entries]
    if lost:
        raise CheckpointError(f"{path / INDEX} names tensors that the files lack, fetch them again: {', '.join(lost)}")
    return entries


def _reader(handle, name: str) -> Callable[[], Tensor]:
    return lambda: handle.get_tensor(name)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{index} is not a safetensors index ({error!r}): fetch it again") from error


def _open(file: Path):
    try:
        return safe_open(str(file), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        with file.open("rb") as f:
            pointer = f.read(40).startswith(b"version https://git-lfs")
        fix = "it is a Git LFS pointer, run `git lfs pull`" if pointer else "it is cut off or damaged, fetch it again"
        raise CheckpointError(f"cannot read {file} ({file.stat().st_size} bytes; {error}): {fix}") from error


def write_files(
    path: Path,
    sizes: dict[str, int],
    read: Callable[[str], Tensor],
    config: dict,
    max_shard_bytes: int,
    progress: Callable[[str, int, int], None],
) -> None:
    """Write tensors (name -> bytes, fetched by `read`) as config.json, shards and an index, or as one .safetensors.

    Every file appears under its name only when whole, the index and config last; shards of an earlier save go.
    """
    text = json.dumps(config, indent=2) + "\n"
    if path.suffix == ".safetensors":
        path.parent.mkdir(parents=True, exist_ok=True)
        progress(path.name, 0, 1)
        _write(path, {name: _owned(read(name)) for name in sizes}, {"format": "pt", "config": text})
        progress("", 1, 1)
        return
    path.mkdir(parents=True, exist_ok=True)
    shards = _split(sizes, max_shard_bytes)
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    files = ["model.safetensors"] if len(shards) == 1 else files
    for i, (file, shard) in enumerate(zip(files, shards, strict=True)):
        progress(file, i, len(shards))
        _write(path / file, {name: _owned(read(name)) for name in shard}, {"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = json.dumps({"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}, indent=2) + "\n"
        _replace(path / INDEX, lambda file: file.write_text(index, encoding="utf-8"))
    else:
        (path / INDEX).unlink(missing_ok=True)
    _replace(path / "config.json", lambda file: file.write_text(text, encoding="utf-8"))
    for old in path.glob("model*.safetensors"):
        if old.name not in files and re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", old.name):
            old.unlink()
    progress("", len(shards), len(shards))


def _split(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Names in order, cut before a shard would exceed `limit` bytes; a larger tensor has a shard of its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _owned(t: Tensor) -> Tensor:
    """On the CPU, contiguous, in memory of its own: safetensors refuses tensors that share, as stacked experts do."""
    return t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _write(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    _replace(file, lambda partial: save_file(tensors, str(partial), metadata=metadata))


def _replace(file: Path, write: Callable[[Path], object]) -> None:
    """Write beside, then rename: a reader, or a model whose tensors still map the old file, never sees half a file."""
    partial = file.with_name(file.name + ".partial")
    write(partial)
    os.replace(partial, file)


def table(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Entry]:
    """Tensors in memory in the shape of `open_files`."""
    return {name: Entry(t.dtype, tuple(t.shape), name, lambda t=t: t.detach()) for name, t in tensors}  # type: ignore[misc]
