"""Choosing the next token from logits, without a host sync: greedy, temperature, top-k, top-p, min-p, seeded; and `draw`, all
of whose inputs are on the device."""

import torch
import torch.nn.functional as F
from torch import Tensor


def sample(
    logits: Tensor,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """logits [B, V] -> token ids [B] int64.

    temperature 0 is greedy. top_k > 0 keeps the k best tokens, top_p < 1 the smallest set of best tokens whose
    probabilities reach p, min_p > 0 those of at least min_p times the best one's probability; the best is always kept.
    Sampling is an exponential race, argmax of p / Exp(1) in fp32: the same `generator` state gives the same tokens.
    """
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1 or not 0 <= min_p <= 1:
        raise ValueError(
            "sample needs temperature >= 0, top_k >= 0, 0 < top_p <= 1, 0 <= min_p <= 1; got "
            f"{temperature=}, {top_k=}, {top_p=}, {min_p=}"
        )
    if temperature == 0:
        return logits.argmax(-1)
    p = torch.softmax(logits.float() / temperature, -1)
    ranked, token = torch.sort(p, dim=-1, descending=True, stable=True)
    drop = ranked < min_p * ranked[:, :1]
    drop |= ranked.cumsum(-1) - ranked >= top_p
    if top_k:
        drop |= torch.arange(p.shape[-1], device=p.device) >= top_k
    drop[:, 0] = False
    ranked = ranked.masked_fill(drop, 0.0)
    race = ranked / torch.empty_like(ranked).exponential_(generator=generator)
    return token.gather(-1, race.argmax(-1, keepdim=True)).squeeze(-1)


def draw(logits: Tensor, temperature: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    """logits [B, V], temperature [1] fp32 (0 is greedy), seed [1] int64, position [B] int64 -> token ids [B] int64.

    argmax of logits + temperature * Gumbel noise: a sample of softmax(logits / temperature). The noise depends on seed, row,
    position and token alone, so the same seed gives the same text, captured or not, on every device.
    """
    B, V = logits.shape
    row = torch.arange(B, device=logits.device).unsqueeze(1)
    key = seed + (row & 0xFFFFFFFF) * 0x85EBCA6B  # without &, torch 2.11 makes it an index of 32 bits on a GPU
    bits = philox(torch.arange(V, device=logits.device), position.unsqueeze(1), key)  # [B, V]
    uniform = ((bits >> 9).float() + 0.5) * 2.0**-23  # exact, and neither 0 nor 1
    return argmax(logits - temperature * torch.log(-torch.log(uniform)))


def argmax(x: Tensor, piece: int = 512) -> Tensor:
    """x.argmax(-1) of x [B, V], the first of equal numbers, in two stages: compilers leave one long row to one processor."""
    pieces = -(-x.shape[-1] // piece)
    parts = F.pad(x, (0, pieces * piece - x.shape[-1]), value=float("-inf")).unflatten(-1, (pieces, piece))
    best, place = parts.max(-1)  # [B, pieces]
    winner = best.argmax(-1, keepdim=True)
    return (winner * piece + place.gather(-1, winner)).squeeze(-1)


def philox(low: Tensor, high: Tensor, key: Tensor) -> Tensor:
    """Philox-2x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): 32 random bits for each counter
    (low, high) under a key. All are int64 that count modulo 2^32."""
    ones = 0xFFFFFFFF
    low, high, key = low & ones, high & ones, key & ones
    for _ in range(10):
        product = low * 0xD256D193  # 64 bits, as int64 wraps around
        low, high = (product >> 32 & ones) ^ key ^ high, product & ones
        key = (key + 0x9E3779B9) & ones
    return low
