"""Several linear layers of the same vectors, in one launch: few vectors are bound by reading the weights, which one kernel
does as if the matrices were one. RMSNorm may be in front of them.

An op for each number of them: an op's tensors are known by name.
"""

from dataclasses import replace
from functools import cache
from inspect import Parameter, Signature
from typing import Any

import torch

from dsv4_compile.lowerings import gemv
from dsv4_compile.lowerings.linear import linear, linear_wide, sizes_of
from dsv4_compile.lowerings.norm import DTYPES, rms_norm
from dsv4_compile.op import Cost, Op, Tensor, alike, compact, op

MOST = 7  # of one launch: all that read what comes into attention with an indexer


def of(count: int, normed: bool) -> Op:
    """dsv4::linears_<count>, or dsv4::normed_linears_<count>."""
    weights, scales = ([f"{letter}{i}" for i in range(count)] for letter in "ws")
    in_front: dict[str, Any] = {"norm": Tensor, "eps": float} if normed else {}
    types: dict[str, Any] = {"x": Tensor} | in_front | dict.fromkeys(weights, Tensor) | {"wide": int}
    types |= dict.fromkeys(scales, Tensor | None)
    parameters = [
        Parameter(n, Parameter.POSITIONAL_OR_KEYWORD, default=None if n in scales else Parameter.empty) for n in types
    ]
    signature = Signature(parameters)

    def meaning(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        a = bound.arguments
        x = rms_norm(a["x"], a["norm"], a["eps"]) if normed else a["x"]
        pairs = zip((a[w] for w in weights), (a[s] for s in scales), strict=True)
        each = [linear_wide(x, w) if is_wide(a, i) else linear(x, w, s) for i, (w, s) in enumerate(pairs)]
        return tuple(each) if count > 1 else each[0]

    meaning.__doc__ = f"""y_i = x W_i^T for i < {count}: `linear` of each, or `linear_wide` of plain ones where bit i of
    `wide` is set; of rms_norm(x, norm, eps) in the place of x, where the op has these.

    x [M, K]; norm [K]; w_i [N_i, K], plain, or with s_i as `linear` takes them, fp8 or mxfp4 -> y_i [M, N_i] of x's dtype,
    wide ones of at least fp32.  Source: DeepSeek-V4, attention, compressor and indexer; router and shared expert.
    """
    setattr(meaning, "__signature__", signature)  # noqa: B010
    meaning.__annotations__ = types | {"return": tuple[(Tensor,) * count] if count > 1 else Tensor}  # type: ignore[misc]
    outputs = tuple(f"y{i}" for i in range(count)) if count > 1 else ("out",)
    made = op(f"dsv4::{'normed_' * normed}linears_{count}", outputs)(meaning)

    @made.cost
    def _(M, K, rows, stored, written):
        """rows: of all weights; stored: bytes of them; written: of the outputs."""
        norm = 4 * M * K if normed else 0
        return Cost(flops=2 * M * rows * K + norm, read=stored + 2 * M * K + norm / M, write=written)

    @made.sizes
    def _(a):
        each = [sizes_of(getattr(a, w), getattr(a, s)) for w, s in zip(weights, scales, strict=True)]
        (M, K), item = a.x.shape, a.x.dtype.itemsize
        bytes_ = sum(e["N"] * K * (e["bits"] / 8 + 1 / e["block"]) for e in each)
        written = sum(M * e["N"] * (max(4, item) if is_wide(vars(a), i) else item) for i, e in enumerate(each))
        return dict(M=M, K=K, rows=sum(e["N"] for e in each), stored=bytes_, written=written)

    def pairs_of(a: Any) -> tuple[Any, int]:
        """Weights with scales, and how many vectors a launch takes at most."""
        pairs = [(getattr(a, w), getattr(a, s)) for w, s in zip(weights, scales, strict=True)]
        return pairs, gemv.rows_of_launch(a.x, *(s for _, s in pairs))

    def streamed(a: Any) -> bool | str:
        pairs, most = pairs_of(a)
        again = gemv.times(*((w, s, is_wide(vars(a), i) and gemv.takes_fp32(a.x, w)) for i, (w, s) in enumerate(pairs)))
        if (verdict := gemv.few(a.x, a.x.shape[0], again, most)) is not True:
            return verdict
        for w, s in pairs:
            if (verdict := gemv.streams(w, s, None)) is not True:
                return verdict
        if any(s is not None and is_wide(vars(a), i) for i, (_, s) in enumerate(pairs)):
            return "a wide product of a matrix with scales"
        if any(w.numel() == 0 for w, _ in pairs) or a.x.numel() == 0:
            return "a matrix without numbers"
        norm = getattr(a, "norm", None)
        if norm is not None and (norm.dtype not in DTYPES or gemv.streams(norm.unsqueeze(0), None, None) is not True):
            return "an RMSNorm whose weight is not bfloat16 or float32, in one piece and aligned"
        kinds = len(by_format(pairs))
        if kinds > (2 if norm is None else 1):
            return f"weights in {kinds} formats: one launch takes two, behind a norm one"
        return at_once(shape_of(a.x, pairs, a.wide, norm), len(a.x), most) > 0 or "vectors beyond shared memory"

    def pays(a: Any) -> bool | str:
        pairs, most = pairs_of(a)
        if len(by_format(pairs)) > 1:
            return True  # of few vectors, since some are plain
        shape = shape_of(a.x, pairs, a.wide, getattr(a, "norm", None))
        return gemv.pays(shape, most=most, matrices=count, at_once=lambda shape, most: at_once(shape, shape.M, most))

    @made.on("cuda", arch="sm_90+", when=streamed, worth=pays)
    def _(x, *given):
        from dsv4_compile.kernels import linears as kernel

        norm, eps = given[:2] if normed else (None, 0.0)
        given = given[2 * normed :]
        ws, wide, ss = given[:count], given[count], given[count + 1 :]
        pairs = list(zip(ws, ss, strict=True))
        shape, order = shape_of(x, pairs, wide, norm), [i for part in by_format(pairs) for i in part]
        item = [torch.float32 if wide >> i & 1 else x.dtype for i in range(count)]
        ys = tuple(x.new_empty(len(x), len(w), dtype=dtype) for w, dtype in zip(ws, item, strict=True))
        words = tuple(gemv.words(ws[i]) for i in order)
        scales = tuple(gemv.flat(ss[i]) for i in order if ss[i] is not None) or None
        x = compact(x)
        for first, m in gemv.turns(len(x), at_once(shape, len(x), gemv.rows_of_launch(x, *ss))):
            early, here = int(gemv.settled(ys, *ws, *ss)), of_vectors(shape, m)
            rows, *outs = (gemv.some(t, first, m) for t in (x, *(ys[i] for i in order)))
            if isinstance(here, kernel.Mixed):
                kernel.launch_mixed(here, rows, words, scales, tuple(outs), early)
            else:
                kernel.launch(here, rows, norm, eps, words, scales, tuple(outs), early)
        return ys if count > 1 else ys[0]

    return made


def is_wide(a: Any, i: int) -> bool:
    return bool(a["wide"] >> i & 1)


def by_format(pairs: Any) -> list[list[int]]:
    """Which matrices are stored alike: places of each kind, in the order of the first of them."""
    found: dict[Any, list[int]] = {}
    for i, (w, s) in enumerate(pairs):
        found.setdefault((gemv.format_of(w, s, None), None if s is None else s.dtype), []).append(i)
    return list(found.values())


def shape_of(x: Tensor, pairs: Any, wide: int, norm: Tensor | None) -> Any:
    from dsv4_compile.kernels.linears import Mixed, Shape

    parts = []
    for part in by_format(pairs):
        weight, scale = pairs[part[0]]
        format, dtype = gemv.format_of(weight, scale, None), DTYPES[x.dtype]
        assert format is not None, "`streamed` was not asked"
        outs = tuple("fp32" if wide >> i & 1 else dtype for i in part)
        rows, e8m0 = tuple(len(pairs[i][0]) for i in part), scale is None or scale.dtype != torch.float32
        of_norm = "none" if norm is None else DTYPES[norm.dtype]
        parts.append(Shape(len(x), rows, x.shape[1], format, e8m0, dtype, outs, of_norm))
    return parts[0] if len(parts) == 1 else Mixed(*parts)


def of_vectors(shape: Any, count: int) -> Any:
    """The same for so many."""
    from dsv4_compile.kernels.linears import Mixed

    if isinstance(shape, Mixed):
        return Mixed(of_vectors(shape.first, count), of_vectors(shape.second, count))
    return replace(shape, M=count)


def at_once(shape: Any, count: int, most: int) -> int:
    """How many of the vectors a launch takes, or 0: see `gemv.at_once`."""
    return gemv.at_once(count, lambda n: fits(of_vectors(shape, n), alike()), most)


@cache
def fits(shape: Any, alike: bool) -> bool:
    from dsv4_compile.kernels.linears import configs

    return any(True for _ in configs(shape))


LINEARS = {count: of(count, normed=False) for count in range(2, MOST + 1)}
NORMED = {count: of(count, normed=True) for count in (1, 2)}  # queries, and with them the indexer's
