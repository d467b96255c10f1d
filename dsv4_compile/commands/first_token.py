"""Which decode graphs are in torch's compile caches, as far as earlier runs have said."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch._inductor.runtime.cache_dir_utils import cache_dir

from ..config import Config
from ..identity import identity


class Mark:
    """A file that stands for one configuration and the things about it. It lies among Inductor's caches, so that it goes
    when they go; a wrong mark costs time, never correctness."""

    def __init__(self, config: Config, *about: Any):
        text = repr((torch.__version__, identity(config), *about))
        self.file = Path(cache_dir()) / "dsv4" / hashlib.sha256(text.encode()).hexdigest()

    def is_set(self) -> bool:
        return self.file.is_file()

    def set(self) -> None:
        """Where the cache cannot be written, the next run is cold again."""
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.touch()
        except OSError:
            return
