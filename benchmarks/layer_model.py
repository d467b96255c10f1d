"""A few layers of a model's real sizes with random weights, marks between them, and what a decode step must read of them."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from dsv4_compile.commands.inputs import InputError
from dsv4_compile.commands.warm import config_of as named_or_read
from dsv4_compile.reference_model import DSV4, DSV4Config, Loop, State, draw
from dsv4_compile.reference_model.quant import pack_kv, quantize_rows
from dsv4_compile.reference_model.schedule import CSA, HCA, SWA

LAYERS, WITHOUT_SWA = (SWA, CSA, HCA, CSA), (HCA, CSA, CSA)
SHORT = {SWA: "SWA", CSA: "CSA", HCA: "HCA"}
FORMATS = {"bf16": ("none", "none"), "fp8": ("fp8", "fp8"), "fp4": ("fp8", "mxfp4")}  # of dense weights and experts
INDEX_KEYS = KV = {"bf16": None, "fp8": torch.float8_e4m3fn}
CONFIGS: dict[str, Callable[[], DSV4Config]] = {
    "flash": DSV4Config.flash,
    "pro": DSV4Config.pro,
    "nano": DSV4Config.nano,
}
ROOM = 512  # tokens that may follow the context
MARK = "bessel_j0"  # a kernel that nothing else launches
AT_MARKS: list[Callable[[], None]] = []  # called at each mark, where it runs from Python

LIBRARY = torch.library.Library("dsv4_benchmark", "DEF")
LIBRARY.define("mark(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


@cache
def one(device: torch.device) -> Tensor:
    return torch.ones(1, device=device)


def mark(x: Tensor) -> Tensor:
    """Two launches, a copy and the mark."""
    for tell in AT_MARKS:
        tell()
    copy = x.clone()
    torch.special.bessel_j0(one(x.device))
    return copy


LIBRARY.impl("mark", mark, "CompositeExplicitAutograd")
torch.library.register_fake("dsv4_benchmark::mark", torch.empty_like, lib=LIBRARY)


class Marked(nn.Module):
    """A layer with a mark behind it, and the first one with a mark before it."""

    def __init__(self, layer: nn.Module, first: bool):
        super().__init__()
        self.layer, self.first = layer, first

    def forward(self, X: Tensor, *rest: Any) -> tuple[Any, ...]:
        if self.first:
            X = torch.ops.dsv4_benchmark.mark(X)
        X, *found = self.layer(X, *rest)
        return torch.ops.dsv4_benchmark.mark(X), *found


def config_of(model: str, format: str, asked: Sequence[str] = ()) -> DSV4Config:
    """Of the kinds of layer that a model has one each, and CSA twice, or those that are asked for; if the model has layers
    whose router is a table, the first is one, and so are those behind it that do not compress. model: a name, or a folder or
    file with a config.json. Raises InputError."""
    linear, expert = FORMATS[format]
    base = CONFIGS[model]() if model in CONFIGS else named_or_read(model)
    usual = (k for k in (LAYERS if SWA in base.layer_types else WITHOUT_SWA) if k in base.layer_types)
    kinds = tuple(asked or usual)
    if absent := sorted({*kinds} - {*base.layer_types}):
        raise InputError(
            f"{model} has no layers of {', '.join(absent)}: it has {', '.join(sorted({*base.layer_types}))}"
        )
    tables = max(1, next((i for i, k in enumerate(kinds) if k != SWA), len(kinds))) * (
        "hash_moe" in base.mlp_layer_types
    )
    return base.replace(
        num_hidden_layers=len(kinds),
        layer_types=kinds,
        mlp_layer_types=("hash_moe",) * tables + ("moe",) * (len(kinds) - tables),
        num_nextn_predict_layers=0,
        linear_format=linear,
        expert_format=expert,
        mtp_expert_format=expert,
    )


def names_of(config: DSV4Config) -> list[str]:
    """What the layers are called: "SWA, hash", "CSA", "CSA again", "CSA again, 3"."""
    found, before = [], Counter[str]()
    for kind, router in zip(config.layer_types, config.mlp_layer_types, strict=True):
        name = SHORT[kind] + (", hash" if router == "hash_moe" else "")
        before[name] += 1
        found.append(name + ("", " again", f" again, {before[name]}")[min(before[name], 3) - 1])
    return found


def drawn(t: Tensor, name: str, device: torch.device) -> Tensor:
    """Random content of about the size that training starts from, made where it stays."""
    if not t.is_meta:
        return t.to(device)
    width = t.shape[-1] if t.dim() > 1 else 1
    if t.dtype == torch.int64:
        return torch.randint(0, 8, t.shape, device=device)
    if t.dtype == torch.uint8:  # two e2m1 numbers
        return torch.randint(0, 256, t.shape, device=device, dtype=torch.uint8)
    if t.dtype == torch.float8_e8m0fnu:  # of blocks whose numbers are about 1
        exponent = 127 - round(torch.tensor(width * 32.0).log2().item() / 2)
        return torch.full(t.shape, exponent, device=device, dtype=torch.uint8).view(t.dtype)
    if t.dtype == torch.float8_e4m3fn:
        return torch.empty(t.shape, device=device, dtype=torch.bfloat16).normal_().to(t.dtype)
    x = torch.empty(t.shape, device=device, dtype=t.dtype).normal_(std=width**-0.5 if t.dim() > 1 else 0.1)
    return x + 1 if t.dim() == 1 and name in ("weight", "scale") else x


def model_of(config: DSV4Config, device: torch.device) -> DSV4:
    """A marked model with random weights, built in the device's memory."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = DSV4(config).to(torch.bfloat16)
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(drawn(p, name, device), requires_grad=False)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = drawn(b, name, device)
    model.layers = nn.ModuleList(Marked(layer, i == 0) for i, layer in enumerate(model.layers))
    return model.eval()


def with_room(config: DSV4Config, context: int) -> int:
    """So many tokens, or as many that a few may follow in the model's context."""
    return min(context, config.max_position_embeddings - ROOM)


def state_of(model: DSV4, batch: int, context: int, index_keys: str = "bf16", kv: str = "bf16") -> State:
    """Equal numbers in every call: what is remembered of `context` tokens of each sequence; see `with_room`."""
    torch.manual_seed(1)
    context = with_room(model.config, context)
    state = model.new_state(batch, context + ROOM, index_dtype=INDEX_KEYS[index_keys], kv_dtype=KV[kv])
    c = model.config
    for layer in state.layers:
        for part in layer.parts():
            if isinstance(part, Tensor) and part.dtype == torch.uint8:
                few = torch.randn(1024, c.head_dim, device=part.device)  # rows repeat
                rows = torch.arange(part.shape[1], device=part.device) % len(few)
                part.copy_(pack_kv(few, c.qk_rope_head_dim)[rows])
            elif isinstance(part, Tensor) and part.dtype != torch.float8_e4m3fn:
                part.normal_()
        if layer.indexer is not None and layer.indexer.scales is not None:
            of_keys = layer.indexer.entries
            codes, scales = quantize_rows(torch.randn(of_keys.shape, device=of_keys.device))
            of_keys.copy_(codes)
            layer.indexer.scales.copy_(scales)
    state.position.fill_(context)
    return state


def step(model: DSV4, loop: Loop) -> Tensor:
    """`decode_step` that also gives the logits [B, V]."""
    logits = model(loop.token, loop.state)[:, -1]
    loop.token.copy_(draw(logits, loop.temperature, loop.seed, loop.state.position).unsqueeze(1))
    return logits


def weights_read(module: nn.Module, config: DSV4Config, batch: int) -> int:
    """Bytes of a module's weights that a token of each sequence makes it read: of the experts, those that are chosen on
    average."""
    share = 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** batch
    total = 0.0
    for name, p in module.named_parameters():
        total += p.numel() * p.element_size() * (share if ".experts." in f".{name}" else 1)
    return round(total)


def must_read(layer: nn.Module, config: DSV4Config, state: Any, batch: int, context: int) -> int:
    """Bytes that a token of each sequence makes a layer read: weights, keys, entries, open windows."""
    bytes_of = lambda t: t.numel() * t.element_size()  # noqa: E731
    total = weights_read(layer, config, batch) + bytes_of(state.kv)
    kind = layer.layer.attn.kind
    for memory, picks in ((state.compressor, kind == CSA), (state.indexer, False)):
        if memory is not None:
            rows = context // config.rate(kind)
            rows = min(config.index_topk, rows) if picks else rows
            total += bytes_of(memory.values) + bytes_of(memory.gates)
            for t in (memory.entries, memory.scales):
                total += 0 if t is None else batch * rows * t.shape[-1] * t.element_size()
    return total
