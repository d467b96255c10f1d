"""Between a decode step's products and its attention: norm, RoPE and all caches, in one launch.

An op for each number of compressors, and whether the last has entries in e4m3: an op's tensors are known by name.
"""

import math
from functools import cache
from inspect import Parameter, Signature
from types import SimpleNamespace
from typing import Any, get_type_hints

from dsv4_compile.lowerings.append import fits_with_cache, norm_rope_append
from dsv4_compile.lowerings.compressor_append import (
    compressor_append,
    compressor_append_fp8,
    fits_one_token,
    tensors_of,
)
from dsv4_compile.lowerings.compressor_append import shape_of as shape_of_compressor
from dsv4_compile.lowerings.norm import DTYPES, kept_in, repeated, table
from dsv4_compile.lowerings.rope import fits_with_rope, norm_rope
from dsv4_compile.op import Cost, Op, Tensor, at_most, compact, op

MOST = 2  # compressors: that of the keys, and the indexer's
MANY = 4096  # rows of queries; of more, launches of their own are faster
OF_QUERIES: dict[str, Any] = dict(q=Tensor, q_eps=float, q_cos=Tensor, q_sin=Tensor)


def arguments_of(part: Op) -> dict[str, Any]:
    return {name: kind for name, kind in get_type_hints(part.meaning).items() if name != "return"}


OF_KEYS = arguments_of(norm_rope_append)


few_rows = at_most(MANY, lambda a: math.prod(a.q.shape[:-1]))


def of(name: str, *memories: Op) -> Op:
    """dsv4::prologue_<name>: with these of compressors."""
    types, count = OF_QUERIES | OF_KEYS, len(memories)
    for i, memory in enumerate(memories):
        types |= {f"{name}{i}": kind for name, kind in arguments_of(memory).items()}
    signature = Signature([Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in types])

    def parts(*args: Any, **kwargs: Any) -> tuple[Any, Any, list[Any]]:
        """The arguments of queries, keys and each compressor."""
        a = signature.bind(*args, **kwargs).arguments
        compressors = [
            SimpleNamespace(**{name: a[f"{name}{i}"] for name in memory.signature.parameters})
            for i, memory in enumerate(memories)
        ]
        queries = SimpleNamespace(x=a["q"], weight=None, eps=a["q_eps"], cos=a["q_cos"], sin=a["q_sin"])
        return queries, SimpleNamespace(**{name: a[name] for name in OF_KEYS}), compressors

    def meaning(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        q, keys, compressors = parts(*args, **kwargs)
        each = (memory(**vars(c)) for memory, c in zip(memories, compressors, strict=True))
        return norm_rope(**vars(q)), norm_rope_append(**vars(keys)), *(t for some in each for t in some)

    what = ", ".join(memory.name for memory in memories) or "no compressor"
    meaning.__doc__ = f"""`norm_rope` of queries, `norm_rope_append` of keys; {what}.

    q [..., d] with q_eps, q_cos and q_sin; the rest as these ops take it, a number behind the names of the compressors' ->
    queries, ring, and for each compressor values, gates, entries, perhaps scales.
    Source: DeepSeek-V4, attention and generation state.
    """
    setattr(meaning, "__signature__", signature)  # noqa: B010
    written = ["q", "ring"]
    written += [
        f"{of_part}{i}" for i, m in enumerate(memories) for of_part in list(m.signature.parameters)[: len(m.outputs)]
    ]
    meaning.__annotations__ = types | {"return": tuple[(Tensor,) * len(written)]}  # type: ignore[misc]
    made = op(f"dsv4::prologue_{name}", tuple(f"new_{argument}" for argument in written))(meaning)

    def costs(a: Any) -> list[Cost]:
        q, keys, compressors = parts(**vars(a))
        ops = [(norm_rope, q), (norm_rope_append, keys), *zip(memories, compressors, strict=True)]
        return [each.cost_of(**each.bound_sizes(vars(b))) for each, b in ops]  # type: ignore[misc,arg-type]

    @made.cost
    def _(flops, read, write):
        """Those of the parts."""
        return Cost(flops=flops, read=read, write=write)

    @made.sizes
    def _(a):
        found = costs(a)
        return {name: sum(getattr(c, name) for c in found) for name in ("flops", "read", "write")}

    def in_one(a: Any) -> bool | str:
        q, keys, compressors = parts(**vars(a))
        asked = [fits_with_rope(q), fits_with_cache(keys), *map(fits_one_token, compressors)]
        refused = next((verdict for verdict in asked if verdict is not True), None)
        if refused is not None:
            return refused
        if q.x.numel() == 0 or keys.x.numel() == 0:
            return "nothing to compute"
        if any(len(c.values) != len(keys.ring) for c in compressors):
            return "other sequences in a compressor than in the cache"
        return runs(shape_of(q, keys, compressors)) or "compressors whose channels do not share a block"

    @made.on("cuda", arch="sm_90+", in_place=tuple(written), when=in_one, worth=few_rows)
    def _(*given):
        from dsv4_compile.kernels.prologue import launch

        q, keys, compressors = parts(*given)
        of_queries = q.x.view(-1, q.x.shape[-1]), *tables(q)
        weight = None if keys.weight is None else compact(keys.weight)
        rows = compact(keys.x.reshape(-1, keys.x.shape[-1]))
        of_keys = rows, weight, *tables(keys), keys.ring, compact(keys.slot.reshape(-1))
        tensors = tuple(tensors_of(c) for c in compressors)
        eps = [c.eps for c in compressors] + [0.0] * (MOST - count)
        shape = shape_of(q, keys, compressors)
        inner = (repeated(part.cos.shape, part.x.shape) for part in (q, keys))
        launch(shape, of_queries, of_keys, tensors or None, q.eps, keys.eps, *eps, *inner)

    return made


def tables(a: Any) -> tuple[Tensor, Tensor]:
    return table(a.cos, a.x), table(a.sin, a.x)


def shape_of(q: Any, keys: Any, compressors: Any) -> Any:
    from dsv4_compile.kernels.prologue import OfNorm, Shape

    weight = "none" if keys.weight is None else DTYPES[keys.weight.dtype]
    of_queries = OfNorm(q.x.shape[-1], DTYPES[q.x.dtype], "none", 2 * q.cos.shape[-1])
    of_keys = OfNorm(keys.x.shape[-1], DTYPES[keys.x.dtype], weight, 2 * keys.cos.shape[-1], kept_in(keys.ring))
    return Shape(of_queries, of_keys, tuple(shape_of_compressor(c) for c in compressors))


@cache
def runs(shape: Any) -> bool:
    from dsv4_compile.kernels.prologue import configs

    return any(True for _ in configs(shape))


PROLOGUES: dict[int | str, Op] = {count: of(str(count), *[compressor_append] * count) for count in range(MOST + 1)}
PROLOGUES["2_fp8"] = of("2_fp8", compressor_append, compressor_append_fp8)  # of CSA
