"""Complex numbers, written as pairs of real ones: rotations are products of them."""

from torch.fx import Node

from .graph import RESHAPES, aten, is_tensor, known, shape, value
from .writer import Writer, args, form, is_call, number

CONJUGATES = aten._conj.default, aten.conj_physical.default, aten._conj_physical.default
VIEWS = (RESHAPES - {aten.lift_fresh_copy.default, aten.alias.default}) | {aten.expand.default}
OF_AXES = VIEWS | {aten.slice.Tensor, aten.select.int, aten.permute.default, aten.index.Tensor}

Pair = tuple[Node, Node]


@form(aten.view_as_real.default)
def of_product(w: Writer, node: Node) -> Node | None:
    """(a + ib)(c + id) as ac - bd and ad + bc, side by side."""
    z = args(node)[0]
    if not is_call(z, aten.mul.Tensor) or not all(is_tensor(x) and value(x).is_complex() for x in z.args):
        return None
    pair = [w.make(node, aten.unsqueeze.default, x, len(shape(z))) for x in times(w, node, *args(z))]
    return w.make(node, aten.cat.default, pair, len(shape(z)))


def times(w: Writer, node: Node, x: Node, y: Node) -> Pair:
    (a, b), (c, d) = pair_of(w, node, x), pair_of(w, node, y)
    ac, bd, ad, bc = (w.make(node, aten.mul.Tensor, *pair) for pair in ((a, c), (b, d), (a, d), (b, c)))
    return w.make(node, aten.sub.Tensor, ac, bd), w.make(node, aten.add.Tensor, ad, bc)


def pair_of(w: Writer, node: Node, z: Node) -> Pair:
    """Real and imaginary part."""
    if is_call(z, aten.complex.default):
        return args(z)[0], args(z)[1]
    if is_call(z, aten.polar.default):
        length, angle = args(z)
        real, imaginary = w.make(node, aten.cos.default, angle), w.make(node, aten.sin.default, angle)
        if number(length) == 1:
            return real, imaginary
        return w.make(node, aten.mul.Tensor, length, real), w.make(node, aten.mul.Tensor, length, imaginary)
    if is_call(z, *CONJUGATES):
        real, imaginary = pair_of(w, node, args(z)[0])
        return real, w.make(node, aten.neg.default, imaginary)
    if is_call(z, *OF_AXES):
        x, *rest = args(z)
        real, imaginary = pair_of(w, node, x)
        return w.make(node, z.target, real, *rest), w.make(node, z.target, imaginary, *rest)
    if is_call(z, aten.mul.Tensor) and all(is_tensor(x) and value(x).is_complex() for x in z.args):
        return times(w, node, *args(z))
    if is_call(z, aten.view_as_complex.default) and is_call(z.args[0], aten.cat.default):
        pieces, last = args(args(z)[0])[0], len(shape(z))
        if len(pieces) == 2 and all(known(shape(piece)[last] == 1) for piece in pieces):
            return w.make(node, aten.squeeze.dim, pieces[0], last), w.make(node, aten.squeeze.dim, pieces[1], last)
    pairs = args(z)[0] if is_call(z, aten.view_as_complex.default) else w.make(node, aten.view_as_real.default, z)
    real, imaginary = (w.make(node, aten.select.int, pairs, len(shape(z)), i) for i in (0, 1))
    return real, imaginary
