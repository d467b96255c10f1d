"""What a compiled graph depends on besides the graph: our sources, the numerics contract and the configuration."""

import hashlib
from dataclasses import astuple, replace
from functools import lru_cache
from importlib.resources import files

from .config import Config
from .lowerings import digest

PACKAGES = (
    "",
    ".graphs",
    ".accuracy",
    ".reporting",
    ".patterns",
    ".lowerings",
    ".kernels",
)  # what has a say in a graph


@lru_cache(maxsize=1)
def sources() -> str:
    """Digest of every Python file of ours, by name and content; paths do not enter."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for file in sorted(files(f"dsv4_compile{package}").iterdir(), key=lambda f: f.name):
            if file.name.endswith(".py"):
                digest.update(f"{package}/{file.name}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()


def identity(config: Config) -> str:
    """Changes whenever another graph could come out; equal between processes and machines. Holds no path."""
    return hashlib.sha256(f"{sources()} {digest()} {astuple(replace(config, cache_dir=None))}".encode()).hexdigest()
