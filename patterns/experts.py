"""All of a mixture of experts of few tokens, on a GPU: who is chosen, the routed experts, the shared one, and the sum."""

import operator
from typing import Any

from torch.fx import Node

from dsv4_compile.lowerings.experts import experts
from dsv4_compile.lowerings.linear import linear
from dsv4_compile.lowerings.moe import moe
from dsv4_compile.lowerings.router import expert_gates, router
from dsv4_compile.lowerings.shared_expert import shared_expert
from dsv4_compile.match import Found, finder, head, shape, strip, users, value
from dsv4_compile.patterns.linear import few_on_gpu
from dsv4_compile.patterns.repeats import same_sizes


@finder(experts, name="fuse.experts", anchor=shared_expert)
def around(end: Node) -> Found | str | None:
    own = shared_expert.arguments(*end.args)
    routed = down(own["routed"], "dsv4.moe")
    if not few_on_gpu(own["gate"], 0) or routed is None:
        return None
    of_gate, of_up = down(own["gate"], "dsv4.linear"), down(own["up"], "dsv4.linear")
    if of_gate is None or of_up is None:
        return "gate and up of the shared expert as linear layers"
    gate, up = linear.arguments(*of_gate[0].args), linear.arguments(*of_up[0].args)
    all_of = moe.arguments(*routed[0].args)
    if not same(gate["x"], all_of["x"]) or not same(up["x"], all_of["x"]):
        return "experts of the same vectors"
    picked = choice(all_of["expert"], all_of["gate"], routed[0])
    if isinstance(picked, str):
        return picked
    arguments, inner = picked
    inner += [n for nodes in (routed, of_gate, of_up) for n in nodes]
    arguments |= {name: all_of[name] for name in experts.signature.parameters if name in all_of and name != "expert"}
    for i, layer in ((1, gate), (3, up), (2, own)):
        arguments |= {f"v{i}": layer["weight"], f"r{i}": layer["scale"], f"u{i}": layer["scale_2"]}
    arguments |= {"own_limit": own["limit"]} | {name: own[name] for name in ("X", "post", "comb")}
    return Found(arguments, [end], [*dict.fromkeys(inner), end])


def choice(expert: Any, gate: Any, taker: Node) -> tuple[dict[str, Any], list[Node]] | str:
    """Where the choices and their gates come from, as arguments, and the nodes that say so. taker: who else reads them."""
    if (chosen := down(gate, "dsv4.expert_gates")) is not None:
        a = expert_gates.arguments(*chosen[0].args)
        if not same(a["expert"], expert):
            return "gates of the experts that are taken"
        choices: dict[str, Any] = {"expert": expert, "k": shape(expert)[-1], "bias": None}
        if (row := of_table(expert, {chosen[0], taker})) is not None:
            choices |= {"expert": row[0].args[0], "token": row[0].args[1][0]}  # type: ignore[index]
            chosen = [*chosen, *row]
        return choices | {"logits": a["logits"], "factor": a["scale"], "eps": a["eps"]}, chosen
    parts = [down(x, "getitem") for x in (expert, gate)]
    if any(p is None or p[0].target is not operator.getitem for p in parts):
        return "choices of a router"
    (at_expert, *_), (at_gate, *_) = parts  # type: ignore[misc]
    source: Any = at_expert.args[0]
    if at_gate.args[0] is not source or head(source) != "dsv4.router" or (at_expert.args[1], at_gate.args[1]) != (0, 1):
        return "choices and gates of one router"
    a = router.arguments(*source.args)
    of_router = {name: a[name] for name in ("logits", "bias", "k", "eps")} | {"expert": None, "factor": a["scale"]}
    return of_router, [*at_expert.all_input_nodes, *(n for p in parts for n in p or ())]


def of_table(expert: Any, readers: set[Node]) -> list[Node] | None:
    """Rows of a table, one for each token, that nobody else reads."""
    found = down(expert, "aten.index")
    if found is None or not set(users(found[0])) <= readers:
        return None
    table, ids = found[0].args
    plain = len(ids) == 1 and ids[0] is not None and len(shape(table)) == 2  # type: ignore[arg-type, index]
    return found if plain and same_sizes(shape(ids[0]), shape(expert)[:1]) else None  # type: ignore[index]


def down(x: Any, to: str) -> list[Node] | None:
    """From a node of this kind on, through views and casts that change nothing, all that lead to x."""
    found = [x]
    while found[0] is not strip(x):
        found.insert(0, found[0].args[0])
    first = found[0]
    kind = "getitem" if first.target is operator.getitem else head(first)
    alike = isinstance(value(first), type(value(x))) and value(first).dtype == value(x).dtype
    return found if kind == to and alike and same_sizes(shape(first), shape(x)) else None


def same(a: Any, b: Any) -> bool:
    """Whether two nodes are one tensor."""
    return strip(a) is strip(b) and value(a).dtype == value(b).dtype and same_sizes(shape(a), shape(b))
