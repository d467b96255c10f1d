"""DeepSeek-V4 in plain eager PyTorch: what users write, and what the compiler is given. Imports torch and safetensors only."""

from .checkpoint import from_hf, load, save
from .config import DSV4Config
from .generate import Loop, decode_step, generate
from .model import DSV4
from .sample import draw, sample
from .state import Selection, State

__all__ = [
    "DSV4",
    "DSV4Config",
    "Loop",
    "Selection",
    "State",
    "decode_step",
    "draw",
    "from_hf",
    "generate",
    "load",
    "sample",
    "save",
]
