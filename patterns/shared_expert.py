"""The end of the shared expert, on a GPU: what the routed ones gave, plus the last matrix times SwiGLU; then mHC's post."""

from typing import Any

from torch.fx import Node

from dsv4_compile.lowerings.linear import linear
from dsv4_compile.lowerings.mhc import mhc_post
from dsv4_compile.lowerings.pointwise import swiglu
from dsv4_compile.lowerings.shared_expert import shared_expert
from dsv4_compile.match import Found, Made, finder, head, is_cast, is_view, shape, strip, value
from dsv4_compile.patterns.linear import few_on_gpu
from dsv4_compile.patterns.repeats import same_sizes


def rows(x: Any, like: Any) -> Made:
    """x with its leading axes multiplied together, as `like` [M, K] has them."""
    M, K = shape(like)
    return Made(lambda x: x.reshape(M, K), (x,))


@finder(shared_expert, name="fuse.shared_expert", anchor=linear)
def added(product: Node) -> Found | str | None:
    x, weight, scale, scale_2 = linear.arguments(*product.args).values()
    if not few_on_gpu(x, 0) or head(hidden := strip(x)) != "dsv4.swiglu" or value(hidden).dtype != value(x).dtype:
        return None
    gate, up, limit = swiglu.arguments(*hidden.args).values()
    wide: Any = product
    while len(wide.users) == 1 and (is_view(user := next(iter(wide.users))) or is_cast(user)):
        wide = user
    if len(wide.users) != 1 or head(total := next(iter(wide.users))) != "aten.add" or len(total.args) != 2:
        return "a sum of the product, which nobody else reads"
    routed = next(a for a in total.args if a is not wide)
    if total.kwargs or not isinstance(routed, Node) or not same_sizes(shape(routed), shape(wide)):
        return f"a sum of two tensors of shape {list(shape(wide))}"
    if not value(wide).dtype == value(routed).dtype == value(total).dtype:
        return f"sums of {value(wide).dtype}, found {value(routed).dtype}"
    vectors = {"gate": rows(gate, x), "up": rows(up, x), "routed": rows(routed, product)}
    stored = {"weight": weight, "scale": scale, "scale_2": scale_2}
    inner = [n for n in chain(product, x, wide) if n not in (gate, up)]
    return Found({**vectors, **stored, "limit": limit}, [total], [*inner, total])


def chain(product: Node, x: Any, wide: Node) -> list[Node]:
    """From SwiGLU to what is added."""
    found = [product]
    while found[0] is not strip(x):
        found.insert(0, x if found[0] is product else found[0].args[0])  # type: ignore[arg-type]
    while found[-1] is not wide:
        found.append(next(iter(found[-1].users)))
    return found


@finder(shared_expert, name="fuse.shared_expert", anchor=mhc_post)
def mixed(last: Node) -> Found | str | None:
    X, y, post, comb = (a for a in last.args if isinstance(a, Node))
    end: Any = strip(y)
    if head(end) != "dsv4.shared_expert":
        return None
    a = shared_expert.arguments(*end.args)
    if a["X"] is not None or value(end).dtype != value(X).dtype or value(y).dtype != value(end).dtype:
        return f"streams of {value(end).dtype}, found {value(X).dtype}"
    between: list[Any] = [y]
    while between[-1] is not end:
        between.append(between[-1].args[0])
    M = shape(end)[0]
    n, D = shape(X)[-2:]
    a["X"] = Made(lambda X: X.reshape(M, n, D), (X,))
    a["post"] = Made(lambda post: post.reshape(M, n), (post,))
    a["comb"] = Made(lambda comb: comb.reshape(M, n, n), (comb,))
    return Found(a, [last], [*between, last])
