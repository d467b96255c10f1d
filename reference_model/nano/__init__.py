"""`nano`: a small trained checkpoint that reads bytes, and the held-out text on which its accuracy is measured.

Package data beside this file: `nano.safetensors` (the released format: FP8 linears, MXFP4 experts; config included),
`heldout.txt` (64 KiB of Python sources that were never trained on, see `heldout-LICENSE.txt`) and `training.txt`.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FOLDER = Path(__file__).parent
CHECKPOINT = FOLDER / "nano.safetensors"  # for `dsv4_compile.reference_model.load`
BOS, EOS, PAD = 256, 257, 258


def encode(text: bytes) -> Tensor:
    """bos, then one token a byte: int64 [1 + len(text)]."""
    return torch.tensor([BOS, *text])


def decode(tokens: Tensor) -> bytes:
    """The bytes among `tokens` [T]; bos, eos and pad vanish."""
    return bytes(t for t in tokens.tolist() if t < 256)


def heldout() -> bytes:
    """The 64 KiB of held-out text that ship with the package."""
    return (FOLDER / "heldout.txt").read_bytes()


@torch.no_grad()
def bits_per_byte(
    model: nn.Module, text: bytes, length: int = 2048, batch: int = 1, device: torch.device | str = "cpu"
) -> float:
    """Mean -log2 p of every byte of `text`, read in windows of `length` bytes that each begin anew with bos.

    Comparable with 8 x compressed / original size of a compressor. `model(tokens [batch, length])` gives logits; the
    last call may be smaller.
    """
    windows = [encode(text[start : start + length]) for start in range(0, len(text), length)]
    whole = len(text) // length
    groups = [windows[i : min(i + batch, whole)] for i in range(0, whole, batch)] + [windows[whole:]]
    nats = 0.0
    for tokens in (torch.stack(group).to(device) for group in groups if group):
        logits = model(tokens[:, :-1]).flatten(0, 1)
        nats += F.cross_entropy(logits.float(), tokens[:, 1:].flatten(), reduction="sum").item()
    return nats / math.log(2) / len(text)
