"""Names and default order of the layer kinds (Hugging Face's names)."""

from __future__ import annotations

SWA, CSA, HCA = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
HASH, LEARNED = "hash_moe", "moe"  # who chooses the experts: the token id, or a learned router
RATES = {CSA: 4, HCA: 128}  # tokens in one compressed entry


def default_layer_types(layers: int) -> tuple[str, ...]:
    """Two sliding layers, then CSA on even and HCA on odd ones, as in the released Flash.

    Hugging Face's own default has CSA on odd layers, which is neither released model: pass a schedule to be sure.
    """
    return tuple(SWA if i < 2 else HCA if i % 2 else CSA for i in range(layers))


def default_mlp_layer_types(layers: int, hashed: int = 3) -> tuple[str, ...]:
    """The first `hashed` layers route by token id."""
    return (HASH,) * min(hashed, layers) + (LEARNED,) * (layers - min(hashed, layers))


def rotation(kind: str) -> str:
    """The RoPE table of a kind of layer."""
    return "main" if kind == SWA else "compress"
