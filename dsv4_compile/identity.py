"""What a compiled graph depends on besides the graph: our sources, the numerics contract and the configuration."""

import hashlib
from dataclasses import astuple, replace
from functools import lru_cache
from importlib.resources import files

from .config import Config
from .lowerings import digest

ROOMS = ("dsv4_compile", "dsv4_compile.patterns", "dsv4_compile.lowerings", "dsv4_compile.kernels")


@lru_cache(maxsize=1)
def sources() -> str:
    """Digest of every Python file of ours, by name and content; paths do not enter."""
    digest = hashlib.sha256()
    for room in ROOMS:
        for file in sorted(files(room).iterdir(), key=lambda f: f.name):
            if file.name.endswith(".py"):
                digest.update(f"{room}/{file.name}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()


def identity(config: Config) -> str:
    """Changes whenever another graph could come out; equal between processes and machines. Holds no path."""
    return hashlib.sha256(f"{sources()} {digest()} {astuple(replace(config, cache_dir=None))}".encode()).hexdigest()
