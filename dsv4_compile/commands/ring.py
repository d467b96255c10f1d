"""Tokens on their way from the device to the screen: the host reads one while the device works on the next."""

from __future__ import annotations

import torch
from torch import Tensor


class Ring:
    """Slots in pinned memory, each with an event that tells when its token has arrived. `put` waits for nothing; `get` waits
    for the oldest token that was put, not for what was queued behind it."""

    def __init__(self, device: torch.device, slots: int = 4):
        on_gpu = device.type == "cuda"
        self.slots = torch.empty(slots, dtype=torch.int64, pin_memory=on_gpu)
        self.arrived = [torch.cuda.Event() if on_gpu else None for _ in range(slots)]
        self.read = self.written = 0

    def put(self, token: Tensor) -> None:
        """Send a token, of one element. At most as many as there are slots may be under way."""
        if self.written - self.read == len(self.slots):
            raise RuntimeError(f"{len(self.slots)} tokens are under way and none was read: get() one first")
        slot = self.written % len(self.slots)
        self.slots[slot].copy_(token.view(()), non_blocking=True)
        if (event := self.arrived[slot]) is not None:
            event.record()
        self.written += 1

    def get(self) -> int:
        slot = self.read % len(self.slots)
        if (event := self.arrived[slot]) is not None:
            event.synchronize()
        self.read += 1
        return int(self.slots[slot])
