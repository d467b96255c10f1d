"""How many places of a model each fusion must find: from its configuration, or from the modules that a captured graph went
through. The matcher is checked against it."""

import operator
from collections import Counter
from typing import Any

import torch

CSA, HCA = "compressed_sparse_attention", "heavily_compressed_attention"


def expected(model: Any, mtp: bool = False) -> dict[str, int]:
    """Sites of one forward by the fusions' short names; empty for a model that is not DeepSeek-V4. `mtp`: of one that
    predicts the token after the next as well, by a layer of the sliding window with a head of its own.

    The model says what it is by `config.layer_types`, as the reference model and Hugging Face's do. mHC has a site
    before and one after each of the two blocks of a layer, and the last collapse; what lies between two blocks, or before the
    first, is a boundary. CSA has a second compressor, the indexer's. Around attention queries and keys have a prologue each,
    and the output an epilogue before it is projected.
    """
    config = getattr(model, "config", None)
    kinds = getattr(config, "layer_types", None)
    if not kinds or not hasattr(config, "hc_mult"):
        return {}
    layers, heads = len(kinds) + mtp, 1 + mtp
    found = {
        "attention": layers,
        "moe": layers,
        "router": layers,
        "compressor": 2 * list(kinds).count(CSA) + list(kinds).count(HCA),
        "indexer": list(kinds).count(CSA),
        "mhc": 2 * 2 * layers + heads,
        "mhc_boundary": 2 * layers,
        "head": heads,
        "prologue": 2 * layers,
        "epilogue": layers,
        "output_projection": layers,
    }
    return found | {"mtp": 1} if mtp else found


def kinds(model: Any) -> dict[str, str]:
    """Each layer's kind by the layer's path; empty for a model that is not DeepSeek-V4."""
    config = getattr(model, "config", None)
    attention, experts = (getattr(config, name, None) or () for name in ("layer_types", "mlp_layer_types"))
    return {f"layers.{i}": f"{a}, {e}" for i, (a, e) in enumerate(zip(attention, experts, strict=False))}


# Modules of the reference model and of Hugging Face's -> places in each. Classes derived from them may compute something
# else: not counted.
_HOME = "dsv4_compile.reference_model.model"
HOLDS: dict[str, dict[str, int]] = {
    f"{_HOME}.Attention": {"attention": 1, "prologue": 2, "epilogue": 1, "output_projection": 1},
    f"{_HOME}.Experts": {"moe": 1},
    f"{_HOME}.Router": {"router": 1},
    f"{_HOME}.Compressor": {"compressor": 1},
    f"{_HOME}.Indexer": {"indexer": 1},
    f"{_HOME}.HyperConnection": {"mhc": 2},
    f"{_HOME}.HyperHead": {"mhc": 1},
    f"{_HOME}.Block": {"mhc_boundary": 2},
    f"{_HOME}.MTP": {"mhc_boundary": 2},
    f"{_HOME}.DSV4": {"head": 1},
}
_HF = "transformers.models.deepseek_v4.modeling_deepseek_v4.DeepseekV4"
HOLDS |= {
    f"{_HF}Attention": {"attention": 1, "prologue": 2, "epilogue": 1, "output_projection": 1},
    f"{_HF}Experts": {"moe": 1},
    f"{_HF}TopKRouter": {"router": 1},
    f"{_HF}HashRouter": {"router": 1},
    f"{_HF}HCACompressor": {"compressor": 1},
    f"{_HF}CSACompressor": {"compressor": 1},
    f"{_HF}Indexer": {"compressor": 1, "indexer": 1},
    f"{_HF}HyperConnection": {"mhc": 2},
    f"{_HF}HyperHead": {"mhc": 1},
    f"{_HF}DecoderLayer": {"mhc_boundary": 2},
    f"{_HF}ForCausalLM": {"head": 1},
}
ONLY_IF = {
    f"{_HOME}.Block": "sigmoid",  # its body, not what hands that its arguments
    f"{_HOME}.MTP": "sigmoid",
    f"{_HOME}.DSV4": "embedding",  # the graph around its layers, not their bodies
    f"{_HF}ForCausalLM": "embedding",
    f"{_HOME}.Indexer": "topk",
    f"{_HOME}.Router": "gather",  # uniform gates are looked up nowhere
    f"{_HF}HCACompressor": "softmax",  # prompts below one window have nothing to compress
    f"{_HF}CSACompressor": "softmax",
    f"{_HF}Indexer": "softmax",
}

# One module of the reference model's MTP that its block goes through before the layer begins: class, and name.
JOIN = "dsv4_compile.reference_model.layers.RMSNorm", ".enorm"

# A compressor that reads what it has just written is one op, its writes included.
COMPRESSOR, READS = f"{_HOME}.Compressor", "reads the rows that it wrote"

# Modules that write into caches by index, a place each time.
WRITES = {f"{_HOME}.Attention", f"{_HOME}.Compressor"}


def in_graph(gm: torch.fx.GraphModule) -> dict[str, int]:
    """Places in a graph of Dynamo's, by the known modules that its nodes come from; a body's as often as it is called.
    Each instance counts once, however often the graph goes through it."""
    found: Counter[str] = Counter()
    calls: dict[tuple[str, str], set[str]] = {}  # (class, path) -> what it calls
    written: set[torch.fx.Node] = set()  # caches, once rows as they came are in them
    for node in gm.graph.nodes:
        if node.target is torch.ops.higher_order.invoke_subgraph:
            found.update(in_graph(getattr(gm, node.args[0].target)))
            continue
        if node.op == "placeholder":  # a parameter: on its way to a body
            continue
        called = READS if reads_rows(node, written) else getattr(node.target, "__name__", str(node.target))
        inside: set[str] = set()
        for path, kind in (node.meta.get("nn_module_stack") or {}).values():
            name = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
            inside.add(name)
            if name in HOLDS or (name == JOIN[0] and path.endswith(JOIN[1])):
                calls.setdefault((name, path), set()).add(called)
        if node.target in (operator.setitem, "index_put_"):
            found["append"] += not inside.isdisjoint(WRITES)
            if not chosen(node.args[2]):
                written.add(node.args[0])
    for (name, _), all_called in calls.items():
        found["mtp"] += name == JOIN[0]
        found["entries"] += name == COMPRESSOR and READS in all_called
        if name not in ONLY_IF or ONLY_IF[name] in all_called:
            found.update(HOLDS.get(name, {}))
    return dict(+found)


def reads_rows(node: torch.fx.Node, caches: set[torch.fx.Node]) -> bool:
    """Whether rows are taken out of one of these caches by lists of them."""
    if node.target is not operator.getitem or node.args[0] not in caches:
        return False
    return isinstance(node.args[1], tuple) and all(isinstance(i, torch.fx.Node) for i in node.args[1])


def chosen(rows: Any) -> bool:
    """Whether some of the rows are those that the cache had: of padding."""
    while isinstance(rows, torch.fx.Node) and rows.target == "to":
        rows = rows.args[0]
    return isinstance(rows, torch.fx.Node) and rows.target is torch.where
