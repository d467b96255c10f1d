"""How many places of a model each fusion must find, from its configuration alone: the matcher is checked against it."""

from typing import Any

CSA, HCA = "compressed_sparse_attention", "heavily_compressed_attention"


def expected(model: Any) -> dict[str, int]:
    """Sites of one forward by the fusions' short names; empty for a model that is not DeepSeek-V4.

    The model says what it is by `config.layer_types`, as the reference model and Hugging Face's do. mHC has a site
    before and one after each of the two blocks of a layer, and the last collapse; CSA has a second compressor, the indexer's.
    """
    config = getattr(model, "config", None)
    kinds = getattr(config, "layer_types", None)
    if not kinds or not hasattr(config, "hc_mult"):
        return {}
    layers = len(kinds)
    return {
        "attention": layers,
        "moe": layers,
        "router": layers,
        "compressor": 2 * list(kinds).count(CSA) + list(kinds).count(HCA),
        "mhc": 2 * 2 * layers + 1,
    }
