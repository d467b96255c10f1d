"""Wrong rewrites to plant: variants of real ops, each with one mistake that somebody could make.

`planted(fault, layer)` puts the wrong op in the place of the right one wherever a rule emits it inside that layer.
"""

import fnmatch
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F

from dsv4_compile.graphs.instances import module_path
from dsv4_compile.lowerings import CONTRACTS, OPS
from dsv4_compile.lowerings.mhc import mhc_pre
from dsv4_compile.lowerings.norm import rms_norm
from dsv4_compile.match import Rule
from dsv4_compile.op import LIBRARY, Op, acc
from dsv4_compile.patterns import RULES

BY_NAME = {op.name: op for op in OPS}


@dataclass(frozen=True)
class Fault:
    """`wrong(right, a)`: the outputs of op `op` with a mistake, given its meaning and its arguments. `implementation`: the
    meaning stays right and only what runs on the CPU is wrong. `fusion`: whose rules emit it."""

    name: str
    op: str
    wrong: Callable[[Callable[..., Any], dict[str, Any]], Any]
    implementation: bool = False
    fusion: str = ""

    def __post_init__(self) -> None:
        first = next(r.name for r in RULES if r.op.name == self.op)
        object.__setattr__(self, "fusion", self.fusion or first)


FAULTS: list[Fault] = []
NUMBERS = itertools.count()


def fault(op: str, implementation: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def declare(wrong: Callable[..., Any]) -> Callable[..., Any]:
        FAULTS.append(Fault(f"{op}: {wrong.__name__.replace('_', ' ')}", op, wrong, implementation))
        return wrong

    return declare


def changed(op: str, name: str, fusion: str = "", **edits: Callable[[dict[str, Any]], Any]) -> None:
    """A fault that only changes arguments: each edit gives one from all of them."""

    def wrong(right: Callable[..., Any], a: dict[str, Any]) -> Any:
        return right(**(a | {k: e(a) for k, e in edits.items()}))

    FAULTS.append(Fault(f"{op}: {name}", op, wrong, fusion=fusion))


@cache
def clone(fault: Fault) -> Op:
    """The op of a fault, under a name of its own."""
    right = BY_NAME[fault.op]
    number = next(NUMBERS)

    def wrong(*args: Any, **kwargs: Any) -> Any:
        return fault.wrong(right.meaning, right.arguments(*args, **kwargs))

    name = f"fault_{number}_{right.name}"
    op = Op(
        name, right.meaning if fault.implementation else wrong, right.outputs, right.schema.replace(right.name, name, 1)
    )
    op.__dict__["signature"] = right.signature
    if fault.implementation:
        op.on("cpu")(wrong)
    LIBRARY.define(op.schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, op.run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dsv4::{name}", op.fake, lib=LIBRARY)
    return op


@contextmanager
def planted(fault: Fault, layer: str = "*") -> Iterator[Op]:
    """Rules emit the wrong op where the match lies in a module whose path fits the glob `layer`."""
    wrong = clone(fault)
    rules = [r for r in RULES if r.op.name == fault.op and r.name == fault.fusion]
    before = {r: r.check for r in rules}

    def check(match: Any) -> Any:
        right = before[match.rule]
        verdict = True if right is None else right(match)
        if verdict is True and fnmatch.fnmatch(module_path(match.anchor), layer):
            match.rule = replace(match.rule, op=wrong)
        return verdict

    with patch.dict(CONTRACTS, {wrong.name: CONTRACTS[fault.op]}):
        for rule in rules:
            put(rule, check)
        try:
            yield wrong
        finally:
            for rule, old in before.items():
                put(rule, old)


def put(rule: Rule, check: Any) -> None:
    object.__setattr__(rule, "check", check)


# Norms


changed("rms_norm", "eps ten times too large", eps=lambda a: a["eps"] * 10)
changed("rms_norm", "no eps", eps=lambda a: 0.0)
changed("rms_norm", "weight plus one", weight=lambda a: a["weight"] + 1)
changed("unit_norm", "eps forgotten", eps=lambda a: 0.0)


@fault("rms_norm")
def sum_for_mean(right, a):
    x = acc(a["x"])
    return (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + a["eps"]) * acc(a["weight"])).to(a["x"].dtype)


@fault("rms_norm")
def weight_reversed(right, a):
    return right(a["x"], a["weight"].flip(0), a["eps"])


@fault("unit_norm")
def eps_outside_the_root(right, a):
    x = acc(a["x"])
    return (x / (x.square().mean(-1, keepdim=True).sqrt() + a["eps"])).to(a["x"].dtype)


# RoPE


changed("rope", "sign of the rotation", inverse=lambda a: not a["inverse"])
changed("rope", "sine and cosine swapped", cos=lambda a: a["sin"], sin=lambda a: a["cos"])
changed("rope", "angles of the next pair", cos=lambda a: a["cos"].roll(1, -1), sin=lambda a: a["sin"].roll(1, -1))


@fault("rope")
def halves_instead_of_pairs(right, a):
    x, cos, sin, dr = a["x"], a["cos"], -a["sin"] if a["inverse"] else a["sin"], 2 * a["cos"].shape[-1]
    one, other = x[..., -dr : -dr // 2], x[..., -dr // 2 :]
    return torch.cat([x[..., :-dr], one * cos - other * sin, one * sin + other * cos], -1).to(x.dtype)


@fault("rope")
def leading_channels_rotated(right, a):
    return right(**(a | {"x": a["x"].flip(-1)})).flip(-1)


changed("norm_rope", "eps ten times too large", eps=lambda a: a["eps"] * 10)
changed("norm_rope", "sign of the rotation", sin=lambda a: -a["sin"])
changed("norm_rope", "weight forgotten", weight=lambda a: None)
changed("norm_rope", "rotation forgotten", cos=lambda a: a["cos"] * 0 + 1, sin=lambda a: a["sin"] * 0)
changed("norm_rope", "positions off by one", cos=lambda a: a["cos"].roll(1, 1), sin=lambda a: a["sin"].roll(1, 1))


@fault("norm_rope")
def rotated_before_the_norm(right, a):
    """The same without a weight, not with one."""
    ones = None if a["weight"] is None else torch.ones_like(a["weight"])
    y = right(**(a | {"weight": ones}))
    return y if a["weight"] is None else (y * a["weight"]).to(y.dtype)


# Cache writes


changed("append", "slot off by one", slot=lambda a: (a["slot"] + 1) % a["ring"].shape[1])
changed("append", "rows of other tokens", rows=lambda a: a["rows"].flip(0) * 1.01)
changed("append", "nothing written", rows=lambda a: a["rows"] * 0)
changed("norm_rope_append", "slot off by one", slot=lambda a: (a["slot"] + 1) % a["ring"].shape[1])
changed("norm_rope_append", "sign of the rotation", sin=lambda a: -a["sin"])
changed("norm_rope_append", "eps ten times too large", eps=lambda a: a["eps"] * 10)


@fault("append")
def the_rest_of_the_cache_cleared(right, a):
    return right(**(a | {"ring": a["ring"] * 0}))


# Softmax and activations


changed("softmax", "the other axis", dim=lambda a: -1 if a["dim"] == -2 else -2)
changed("softmax", "temperature", x=lambda a: a["x"] * 1.01)
changed("swiglu", "limit twice as large", limit=lambda a: a["limit"] * 2)
changed("swiglu", "limit with the wrong sign", limit=lambda a: -a["limit"])
changed("swiglu", "gate and up swapped", gate=lambda a: a["up"], up=lambda a: a["gate"])


@fault("silu")
def gelu_instead(right, a):
    return F.gelu(a["x"])


@fault("softplus")
def threshold_too_low(right, a):
    return F.softplus(a["x"], threshold=2.0)


@fault("swiglu")
def gate_not_clamped(right, a):
    return F.silu(a["gate"]) * a["up"].clamp(-a["limit"], a["limit"])


@fault("swiglu")
def up_clamped_above_only(right, a):
    return F.silu(a["gate"].clamp(max=a["limit"])) * a["up"].clamp(max=a["limit"])


@fault("swiglu")
def clamp_after_the_activation(right, a):
    return F.silu(a["gate"]).clamp(max=a["limit"]) * a["up"].clamp(-a["limit"], a["limit"])


# Sinkhorn and hyper-connections


changed("sinkhorn", "one iteration less", iters=lambda a: a["iters"] - 1)
changed("sinkhorn", "eps ten times too large", eps=lambda a: a["eps"] * 10)


@fault("sinkhorn")
def transposed_matrix(right, a):
    return right(**a).mT.contiguous()


@fault("sinkhorn")
def rows_normalised_last(right, a):
    c = right(**a)
    return c / (c.sum(-1, keepdim=True) + a["eps"])


@fault("sinkhorn")
def softmax_over_columns(right, a):
    return right(**(a | {"logits": a["logits"].mT})).mT.contiguous()


changed("mhc_pre", "wrong eps of the norm", rms_eps=lambda a: a["rms_eps"] * 10)
changed("mhc_pre", "wrong eps of the gates", eps=lambda a: a["eps"] * 10)
changed("mhc_pre", "scales of pre and post swapped", scale=lambda a: a["scale"][[1, 0, 2]])
changed("mhc_pre", "one iteration more", iters=lambda a: a["iters"] + 1)
changed("mhc_pre", "streams in reverse", X=lambda a: a["X"].flip(-2))


@fault("mhc_pre")
def post_not_doubled(right, a):
    x, post, comb = right(**a)
    return x, post / 2, comb


@fault("mhc_pre")
def comb_transposed(right, a):
    x, post, comb = right(**a)
    return x, post, comb.mT.contiguous()


@fault("mhc_pre")
def base_of_comb_forgotten(right, a):
    n = a["X"].shape[-2]
    base = torch.cat([a["base"][: 2 * n], torch.zeros_like(a["base"][2 * n :])])
    return right(**(a | {"base": base}))


changed("mhc_post", "comb not transposed", comb=lambda a: a["comb"].mT)
changed("mhc_post", "post forgotten", post=lambda a: torch.ones_like(a["post"]))
changed("mhc_post", "streams off by one", X=lambda a: a["X"].roll(1, -2))
changed("mhc_enter", "wrong eps of the norm after", norm_eps=lambda a: a["norm_eps"] * 100)
changed("mhc_enter", "no weight", weight=lambda a: torch.ones_like(a["weight"]))
changed("mhc_boundary", "comb not transposed", comb=lambda a: a["comb"].mT)
changed("mhc_boundary", "streams of the block before", y=lambda a: torch.zeros_like(a["y"]))
changed("mhc_boundary", "no weight", weight=lambda a: torch.ones_like(a["weight"]))


@fault("mhc_enter")
def not_normed(right, a):
    return mhc_pre(*(a[k] for k in ("X", "fn", "base", "scale", "iters", "eps", "rms_eps")))


@fault("mhc_boundary")
def old_streams_are_collapsed(right, a):
    streams, _, post, comb = right(**a)
    x, _, _ = mhc_pre(*(a[k] for k in ("X", "fn", "base", "scale", "iters", "eps", "rms_eps")))
    return streams, rms_norm(x, a["weight"], a["norm_eps"]), post, comb


@fault("mhc_boundary")
def old_coefficients_are_kept(right, a):
    streams, x, _, _ = right(**a)
    return streams, x, acc(a["post"]), acc(a["comb"])


changed("mhc_head", "wrong eps", eps=lambda a: a["eps"] * 100)
changed("mhc_head", "sign of the scale", scale=lambda a: -a["scale"])


# Head


changed("head", "no norm", weight=lambda a: torch.ones_like(a["weight"]))
changed("head", "wrong eps of the norm", norm_eps=lambda a: a["norm_eps"] * 1000)
changed("head", "vocabulary off by one", vocabulary=lambda a: a["vocabulary"].roll(1, 0))
changed("head", "streams in reverse", X=lambda a: a["X"].flip(-2))


# Where MTP begins


changed("mtp_join", "norms swapped", e_norm=lambda a: a["h_norm"], h_norm=lambda a: a["e_norm"])
changed("mtp_join", "matrices swapped", e_weight=lambda a: a["h_weight"], h_weight=lambda a: a["e_weight"])
changed("mtp_join", "wrong eps", e_eps=lambda a: a["e_eps"] * 1000, h_eps=lambda a: a["h_eps"] * 1000)
changed("mtp_join", "the token itself instead of the next", e=lambda a: a["e"].roll(1, -2))
changed("mtp_join", "streams in reverse", X=lambda a: a["X"].flip(-2))


# Router


changed("router", "scale missing", scale=lambda a: 1.0)
changed("router", "sign of the bias", bias=lambda a: -a["bias"])
changed("expert_gates", "scale missing", scale=lambda a: 1.0)


@fault("router")
def gates_with_the_bias(right, a):
    expert, _ = right(**a)
    score = F.softplus(a["logits"]).sqrt() + a["bias"]
    gate = score.gather(-1, expert)
    return expert, gate / gate.sum(-1, keepdim=True) * a["scale"]


@fault("router")
def gates_normalised_over_all_experts(right, a):
    expert, _ = right(**a)
    score = F.softplus(a["logits"]).sqrt()
    return expert, (score / score.sum(-1, keepdim=True)).gather(-1, expert) * a["scale"]


@fault("router")
def gates_not_normalised(right, a):
    expert, _ = right(**a)
    return expert, F.softplus(a["logits"]).sqrt().gather(-1, expert) * a["scale"]


@fault("router")
def last_expert_is_the_next_best(right, a):
    expert, gate = right(**(a | {"k": a["k"] + 1}))
    keep = [*range(a["k"] - 1), a["k"]]
    return expert[:, keep], gate[:, keep]


@fault("router", implementation=True)
def ties_to_the_higher_index(right, a):
    E = a["logits"].shape[-1]
    expert, gate = right(**(a | {"logits": a["logits"].flip(-1), "bias": a["bias"].flip(-1)}))
    return E - 1 - expert, gate


@fault("expert_gates")
def softmax_of_the_scores(right, a):
    return F.softplus(a["logits"]).sqrt().gather(-1, a["expert"]).softmax(-1) * a["scale"]


# Experts and weights


changed("moe", "expert off by one", expert=lambda a: (a["expert"] + 1) % a["w1"].shape[0])
changed(
    "moe",
    "gate and up matrices swapped",
    w1=lambda a: a["w3"],
    w3=lambda a: a["w1"],
    s1=lambda a: a["s3"],
    s3=lambda a: a["s1"],
)
changed("moe", "limit forgotten", limit=lambda a: 1e9)
changed("moe", "gates of other tokens", gate=lambda a: a["gate"].roll(1, 0))
changed("moe", "gates all alike", gate=lambda a: torch.full_like(a["gate"], 1 / a["gate"].shape[-1]))
changed("moe", "scales of the next block", s2=lambda a: rolled(a["s2"]))
changed(
    "moe",
    "first choice only",
    gate=lambda a: a["gate"] * (torch.arange(a["gate"].shape[-1], device=a["gate"].device) == 0),
)
changed("dequantize", "scales of the next block", scale=lambda a: rolled(a["scale"]))
changed("dequantize", "nibbles swapped", weight=lambda a: (a["weight"] >> 4) | (a["weight"] << 4))
changed("grouped_mm", "rows off by one", x=lambda a: a["x"].roll(1, 0))


def rolled(scale):
    """Scales moved by one block; 8-bit floats have no roll of their own."""
    return scale.view(torch.uint8).roll(1, -1).view(scale.dtype)


# Compressor


changed("compressor", "sign of the rotation", sin=lambda a: -a["sin"])
changed(
    "compressor", "window off by one", index=lambda a: torch.where(a["index"] < 0, -1, (a["index"] - 1).clamp(min=0))
)
changed("compressor", "stale rows are read", index=lambda a: a["index"].clamp(min=0))
changed("compressor", "eps ten times too large", eps=lambda a: a["eps"] * 10)
changed("compressor", "gates of the wrong half", z=lambda a: a["z"].roll(a["weight"].shape[0] // 2, -1))
changed("compressor", "no weight", weight=lambda a: torch.ones_like(a["weight"]))


@fault("compressor")
def halves_rotated_instead_of_pairs(right, a):
    e, dr = right(**(a | {"sin": torch.zeros_like(a["sin"]), "cos": torch.ones_like(a["cos"])})), 2 * a["cos"].shape[-1]
    nope, x, y = e[..., :-dr], e[..., -dr : -dr // 2], e[..., -dr // 2 :]
    return torch.cat([nope, x * a["cos"] - y * a["sin"], x * a["sin"] + y * a["cos"]], -1)


# Its memory


changed("compressor_append", "slot off by one", slot=lambda a: (a["slot"] + 1) % a["values"].shape[1])
changed("compressor_append", "no bias by place", ape=lambda a: torch.zeros_like(a["ape"]))
changed("compressor_append", "place off by one", place=lambda a: (a["place"] + 1) % a["ape"].shape[0])
changed("compressor_append", "entry in the wrong row", target=lambda a: (a["target"] + 1) % a["entries"].shape[1])
changed("compressor_append", "eps ten times too large", eps=lambda a: a["eps"] * 10)


@fault("compressor_append")
def rows_before_the_write(right, a):
    """The window is read as it was before this token."""
    values, gates, _ = right(**a)
    e = BY_NAME["compressor"].meaning(
        *(a[k] for k in ("values", "gates", "index", "weight", "cos", "sin", "eps", "overlap"))
    )
    return values, gates, BY_NAME["append"].meaning(a["entries"], a["target"], e)


# The same with entries in e4m3


changed("compressor_append_fp8", "slot off by one", slot=lambda a: (a["slot"] + 1) % a["values"].shape[1])
changed("compressor_append_fp8", "entry in the wrong row", target=lambda a: (a["target"] + 1) % a["entries"].shape[1])


@fault("compressor_append_fp8")
def scale_of_the_power_below(right, a):
    values, gates, entries, scales = right(**a)
    return (
        values,
        gates,
        entries,
        scales.scatter(1, a["target"].unsqueeze(-1), scales.take_along_dim(a["target"].unsqueeze(-1), 1) / 2),
    )


@fault("compressor_append_fp8")
def codes_without_their_scale(right, a):
    """Rows as they are, rounded."""
    rest = {k: x for k, x in a.items() if k != "scales"}
    *rows, entries = BY_NAME["compressor_append"].meaning(**rest)
    return *rows, entries, right(**a)[-1]


# Indexer


changed(
    "indexer",
    "scales of other entries",
    scale=lambda a: a["scale"].roll(1, 1) * 2.0 ** (torch.arange(a["scale"].shape[1]) % 2).view(1, -1, 1),
)
changed("indexer", "the newest visible entry is hidden", visible=lambda a: (a["visible"] - 1).clamp(min=0))
changed("indexer", "an entry that is not complete", visible=lambda a: (a["visible"] + 1).clamp(max=a["keys"].shape[1]))
changed("indexer", "heads weigh alike", w=lambda a: torch.ones_like(a["w"]))
changed("indexer", "worst first", w=lambda a: -a["w"])
changed("indexer", "queries turned back", sin=lambda a: None if a["sin"] is None else -a["sin"])


@fault("indexer")
def no_relu(right, a):
    s = (acc(a["q"]) @ acc(a["keys"]).mT.unsqueeze(1) * acc(a["w"]).unsqueeze(-1)).sum(-2)
    seen = a["visible"].unsqueeze(-1)
    hidden = torch.arange(s.shape[-1], device=s.device) >= seen
    pick = s.masked_fill(hidden, float("-inf")).topk(a["k"], -1).indices
    return torch.where(pick < seen, pick, -1)


@fault("indexer", implementation=True)
def one_entry_less(right, a):
    pick = right(**a)
    return torch.cat([pick[..., :-1], torch.full_like(pick[..., :1], -1)], -1)


# Attention


changed("attention", "sink dropped", sink=lambda a: torch.full_like(a["sink"], -1e4))
changed("attention", "sign of the sink", sink=lambda a: -a["sink"])
changed("attention", "scale missing", scale=lambda a: 1.0)
changed("attention", "off-by-one window", window=lambda a: without_the_oldest(a["window"]))
changed("attention", "stale slot is read", window=lambda a: a["window"].clamp(min=0))
changed("attention", "heads in reverse", q=lambda a: a["q"].flip(2))
changed("attention", "output turned on", "fuse.epilogue", sin=lambda a: -a["sin"])
changed("attention", "output not turned back", "fuse.epilogue", cos=lambda a: None, sin=lambda a: None)


@fault("attention")
def entries_ignored(right, a):
    if a["index"] is None:
        return right(**(a | {"scale": a["scale"] * 1.1}))
    return right(**(a | {"entries": None, "index": None}))


@fault("attention")
def a_softmax_for_each_source(right, a):
    if a["index"] is None:
        return right(**(a | {"scale": a["scale"] * 0.9}))
    alone = right(**(a | {"entries": None, "index": None}))
    other = right(**(a | {"keys": a["entries"], "window": a["index"], "entries": None, "index": None}))
    return (alone + other) / 2


changed("output_projection", "groups in reverse", x=lambda a: a["x"].flip(0))
changed("output_projection", "matrices of the next group", a=lambda a: a["a"].roll(a["a"].shape[0] // len(a["x"]), 0))
changed("output_projection", "second matrix reversed", b=lambda a: a["b"].flip(1))


@fault("output_projection")
def groups_transposed(right, a):
    """Channel after channel instead of group after group."""
    G, b = len(a["x"]), a["b"]
    return right(**(a | {"b": b.unflatten(1, (G, -1)).transpose(1, 2).flatten(1)}))


def without_the_oldest(window):
    return torch.cat([torch.full_like(window[..., :1], -1), window[..., 1:]], -1)


# Faults that meet: each pair in the same layer, the router's first


def choices_by_number(right, a):
    """The same choices: no fault as long as nobody reads their order."""
    expert, gate = right(**a)
    expert, order = expert.sort(-1)
    return expert, gate.gather(-1, order)


def shortcut_for_choices_in_order(right, a):
    """Right unless all choices come by number."""
    in_order = (a["expert"].diff(dim=-1) > 0).all()
    return right(**(a | {"gate": torch.where(in_order, a["gate"].flip(-1), a["gate"])}))


def gates_doubled(right, a):
    expert, gate = right(**a)
    return expert, gate * 2


def gates_halved(right, a):
    return right(**(a | {"gate": a["gate"] / 2}))


ONLY_TOGETHER = (
    Fault("router: choices by number", "router", choices_by_number),
    Fault("moe: shortcut for choices in order", "moe", shortcut_for_choices_in_order),
)
CANCEL = (Fault("router: gates doubled", "router", gates_doubled), Fault("moe: gates halved", "moe", gates_halved))
