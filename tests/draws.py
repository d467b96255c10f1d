"""Random choices of generated cases: numbers, lists, stored weights.

`Draw.size` says the same for both sets of arguments of a case, the one that is captured and the one that is replayed;
`Draw.how` and the numbers differ. This file holds no tests.
"""

import random

import torch
from torch import Tensor

from dsv4_compile.lowerings.kv import pack_kv

bf16, fp32 = torch.bfloat16, torch.float32


class Draw:
    """Random choices of one case."""

    def __init__(self, name: str, seed: int, other: bool):
        self.size = random.Random(f"{name} {seed}")
        self.how = random.Random(f"{name} {seed} {other}")
        self.g = torch.Generator().manual_seed(2 * seed + other)

    def normal(self, *shape: int, dtype: torch.dtype = fp32, spread: bool = False) -> Tensor:
        """`spread`: rows of sizes from 1/1000 to 3, where an eps shows."""
        x = torch.randn(shape, generator=self.g)
        if spread:
            x = x * 10 ** (torch.rand(*shape[:-1], 1, generator=self.g) * 3.5 - 3)
        return x.to(dtype)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.g) * (high - low) + low

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Below `high`."""
        return torch.randint(low, high, shape, generator=self.g)

    def weight(self, D: int, dtype: torch.dtype = fp32) -> Tensor:
        return self.uniform(0.5, 1.5, D).to(dtype)

    def tables(self, *shape: int) -> tuple[Tensor, Tensor]:
        angle = self.uniform(-3, 3, *shape)
        return angle.cos(), angle.sin()

    def cache(self, dtype: torch.dtype | str, dr: int, *shape: int) -> Tensor:
        """Rows in bytes, or of a dtype."""
        x = self.normal(*shape)
        return pack_kv.meaning(x, dr) if dtype == "bytes" else x.to(dtype)

    def slots(self, B: int, S: int, T: int) -> Tensor:
        """Distinct places [B, T] among S."""
        return torch.rand(B, S, generator=self.g).argsort(-1)[:, :T]

    def stored(self, format: str, *shape: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """A weight [..., N, K] with its scales, any codes. "fp8 fp32": scales in fp32 that are no powers of two."""
        *lead, N, K = shape
        if format in ("bf16", "fp32"):
            return self.normal(*shape, dtype=bf16 if format == "bf16" else fp32) * K**-0.5, None, None
        power = lambda *s: 2.0 ** self.integers(-4, 1, *s).float()  # noqa: E731
        if format.startswith("fp8"):
            codes = (self.normal(*shape) * 8 * K**-0.5).to(torch.float8_e4m3fn)
            scale = power(*lead, -(-N // 128), -(-K // 128))
            return codes, scale * 1.37 if format.endswith("fp32") else scale.to(torch.float8_e8m0fnu), None
        codes = self.integers(0, 256, *lead, N, K // 2).to(torch.uint8)
        if format == "mxfp4":
            return codes, power(*lead, N, K // 32).to(torch.float8_e8m0fnu), None
        return codes, power(*lead, N, K // 16).to(torch.float8_e4m3fn), power(*lead) * 0.37

    def among(self, count: int, *shape: int) -> Tensor:
        """Lists [..., L] of rows, -1 being none: some absent, all absent, one list absent, a row many times, as many as differ
        from list to list, none absent."""
        if not (lists := self.integers(0, count, *shape)).numel():
            return lists
        kind = self.how.choice(("some", "none", "one", "twice", "unequal", "all"))
        if kind == "some":
            lists[torch.rand(shape, generator=self.g) < 0.2] = -1
        elif kind == "none":
            lists[:] = -1
        elif kind == "one":
            lists.view(-1, shape[-1])[0] = -1
        elif kind == "twice":
            lists[..., ::2] = int(self.integers(0, count, 1))
        elif kind == "unequal":
            lists[torch.arange(shape[-1]) >= self.integers(0, shape[-1] + 1, *shape[:-1], 1)] = -1
        return lists
