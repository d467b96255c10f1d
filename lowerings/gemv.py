"""Products of few rows on a GPU: which ones the kernels that stream a matrix take, and how arguments reach them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Parameter

from dsv4_compile.lowerings.norm import DTYPES
from dsv4_compile.op import Tensor, alike, compact, few_tokens, known

if TYPE_CHECKING:
    from dsv4_compile.kernels.gemv import Shape

ROWS = 8  # of one launch
ROWS_OF_STORED = 16  # of one launch that multiplies stored weights by bf16: parts of vectors share a wide instruction
MOST = 64  # of launches after each other: beyond them it is no longer reading that bounds a product
# What others need for a stored matrix on an H200: microseconds of two launches, of which one makes numbers and one multiplies
# by them, and bytes a microsecond of what they read and write. Microseconds of a copy of few vectors.
APART, APART_BYTES, COPY = 8.0, 3.45e6, 3.0
ALIGNED = {"bf16": 8, "fp32": 8, "fp8": 16, "mxfp4": 32, "nvfp4": 32}  # columns of a row's loads


def format_of(weight: Tensor, scale: Tensor | None, scale_2: Tensor | None) -> str | None:
    """By the dtypes, as `dequantize` tells them; None where the kernels know no such format."""
    if scale is None:
        return DTYPES.get(weight.dtype)
    if weight.dtype == torch.float8_e4m3fn:
        return "fp8" if scale.dtype in (torch.float8_e8m0fnu, torch.float32) and scale_2 is None else None
    if weight.dtype == torch.uint8:
        if scale.dtype == torch.float8_e8m0fnu:
            return "mxfp4" if scale_2 is None else None
        return "nvfp4" if scale.dtype == torch.float8_e4m3fn and scale_2 is not None else None
    return None


def columns(weight: Tensor) -> Any:
    return weight.shape[-1] * (1 + (weight.dtype == torch.uint8))


def streams(weight: Tensor, scale: Tensor | None, scale_2: Tensor | None) -> bool | str:
    """Whether the kernels can read a weight, or the reason why not."""
    format = format_of(weight, scale, scale_2)
    if format is None:
        return f"no kernel for weights of {weight.dtype} with scales of {None if scale is None else scale.dtype}"
    K = columns(weight)
    if not known(K % ALIGNED[format] == 0) or not known(weight.storage_offset() * weight.dtype.itemsize % 16 == 0):
        return f"rows of {K} columns in {format} do not begin at multiples of 16 bytes"
    for t in (weight, scale, scale_2):
        if t is not None and not t.is_contiguous():
            return "weights and scales must be contiguous"
    return True


def rows_of_launch(x: Tensor, *scales: Tensor | None) -> int:
    """How many vectors like x one launch takes at most, of weights with these scales."""
    return ROWS_OF_STORED if x.dtype == torch.bfloat16 and all(s is not None for s in scales) else ROWS


def most_rows(again: int = 1, each: int = ROWS) -> int:
    """How many vectors are few. again: how many launches of `each` vectors, all of which read the weights, take no longer than
    what is done otherwise; see `times`."""
    return few_tokens() if alike() else min(again * each, MOST)


def few(x: Tensor, rows: Any, again: int = 1, each: int = ROWS) -> bool | str:
    """Whether the vectors suit the kernels. again, each: see `most_rows`."""
    if x.dtype not in DTYPES:
        return f"vectors of {x.dtype}: the kernels take bfloat16 and float32"
    most = most_rows(again, each)
    return known(rows <= most) or f"more than {most} rows, or a number that is not known"


def times(*parts: tuple[Tensor, Tensor | None, bool]) -> int:
    """How often weights can be read in the time in which others make what a product of PyTorch's takes, and read that: bf16 of
    stored numbers, or fp32. parts: weight, scale, whether they take it in fp32; see `takes_fp32`."""
    ours = others = 0.0
    for weight, scale, wide in parts:
        stored, bytes_ = weight.numel() * weight.dtype.itemsize, 4 if wide else 2
        as_is = scale is None and weight.dtype.itemsize >= bytes_
        ours += stored
        others += stored if as_is else stored + 2 * bytes_ * weight.numel() * (1 + (weight.dtype == torch.uint8))
    return max(1, int(others / max(1.0, ours)))


def takes_fp32(x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch multiplies these in fp32 if the result must be: 16 bits on both sides it takes as they are."""
    return x.dtype != weight.dtype or x.dtype not in (torch.bfloat16, torch.float16)


def words(weight: Tensor) -> Tensor:
    """A weight as 32-bit words."""
    return weight.view(torch.int32)


def flat(scale: Tensor | None) -> Tensor | None:
    """Scales in a row, those of one byte as bytes."""
    if scale is None:
        return None
    return scale.view(-1) if scale.dtype == torch.float32 else scale.view(torch.uint8).view(-1)


def multiply(
    x: Tensor, weight: Tensor, scale: Tensor | None, scale_2: Tensor | None, out: torch.dtype, by_token: bool = False
) -> Tensor:
    """x [G, M, K], weight [G R, K] as stored -> [G, M, R] of dtype `out`; by_token: x [M, G, K] -> [M, G, R]."""
    from dsv4_compile.kernels.gemv import launch

    tokens = 0 if by_token else 1
    M, G, K = x.shape[tokens], x.shape[1 - tokens], x.shape[2]
    y = torch.empty(*x.shape[:2], weight.shape[0] // G, dtype=out, device=x.device)
    if y.numel() == 0 or K == 0:
        return y.zero_()
    shape = shape_of(M, G, K, (weight, scale, scale_2), x.dtype, out, by_token)
    n = vectors_at_once(shape, rows_of_launch(x, scale))
    if lies_apart(shape, n):
        return compact(multiply(compact(x.transpose(0, 1)), weight, scale, scale_2, out, by_token=True).transpose(0, 1))
    stored = words(weight), flat(scale), None if scale_2 is None else scale_2.view(1)
    for first, m in turns(M, n):
        given, rows = (some(t, first, m, tokens) for t in (x, y))
        early = int(settled(rows, weight, scale, scale_2))
        launch(replace(shape, M=m), compact(given), *stored, rows, early)
    return y


def shape_of(
    M: int,
    G: int,
    K: int,
    stored: tuple[Tensor, Tensor | None, Tensor | None],
    dtype: torch.dtype,
    out: torch.dtype,
    by_token: bool = False,
) -> "Shape":
    """Of the kernel that multiplies M vectors of K columns and `dtype` in each of G groups. stored: weight, scale, scale_2."""
    from dsv4_compile.kernels.gemv import Shape

    weight, scale, _ = stored
    format = format_of(*stored)
    assert format is not None, "`streams` was not asked"
    e8m0 = scale is None or scale.dtype != torch.float32
    return Shape(M, G, weight.shape[0] // G, K, format, e8m0, DTYPES[dtype], DTYPES[out], by_token)


def vectors_at_once(shape: "Shape", most: int) -> int:
    """How many of its vectors a launch takes: as many as shared memory holds of `most`, or, where launches of ROWS take less
    time than those of more, so many."""
    if alike():
        return rows_at_once(replace(shape, M=most), True)
    each = {rows_at_once(replace(shape, M=even(shape.M, n))) for n in (most, ROWS)}
    return min(each, key=lambda n: (microseconds(shape, n), -n)) if len(each) > 1 else each.pop()


def lies_apart(shape: Any, at_once: int) -> bool:
    """Whether a launch's vectors lie in several pieces: they and the results are moved."""
    return at_once < shape.M and shape.work.grids > 1 and not shape.by_token


def microseconds(shape: Any, at_once: int) -> float:
    """Of launches for all vectors of a shape, of `kernels.gemv` or `kernels.linears`, as the cost model has them."""
    from dsv4_compile.kernels.division import microseconds as of_launch

    return sum(of_launch(replace(shape, M=m).work) for _, m in turns(shape.M, at_once))


def pays(
    *shapes: Any, most: int, matrices: int = 1, at_once: Callable[[Any, int], int] = vectors_at_once
) -> bool | str:
    """For `worth`: whether products of stored matrices, so many in each shape, take no longer by launches of at most `most`
    vectors than by plain matrices that others make of them and multiply by."""
    works = [shape.work for shape in shapes]
    if alike() or any(
        w.format in ("bf16", "fp32") or not isinstance(w.M, int) or w.M * w.rows * w.K == 0 for w in works
    ):
        return True
    each = [(shape, at_once(shape, most)) for shape in shapes]
    ours = sum(microseconds(shape, n) + 2 * COPY * lies_apart(shape, n) for shape, n in each)
    moved = (work.bytes + 2 * 2 * work.rows * work.grids * work.K for work in works)  # bf16 is written, and read
    others = APART * matrices * len(works) + sum(moved) / APART_BYTES
    return ours <= others or f"launches of {ours:.0f} us, plain matrices and their products of {others:.0f} us"


def turns(count: int, at_once: int) -> Iterator[tuple[int, int]]:
    """Tokens, so many in a launch: the first, and how many. Where results may depend on how many, all launches have as many, so
    that they do not depend on the place: the last one computes some again, and writes the same."""
    for first in range(0, count, at_once):
        if alike() or count < at_once:
            yield first, min(at_once, count - first)
        else:
            yield min(first, count - at_once), at_once


def some(x: Tensor, first: int, count: int, axis: int = 0) -> Tensor:
    """Rows of a tensor, which lie as if nothing were around them; axes before this one have size 1."""
    if count == x.shape[axis]:
        return x
    return x.narrow(axis, first, count) if axis == 0 else some(x.squeeze(0), first, count, axis - 1).unsqueeze(0)


def even(count: int, most: int) -> int:
    """Of as few launches as there can be, each of at most so many tokens, what they take if all take alike."""
    return -(-count // max(1, -(-count // most)))


def at_once(count: int, runs: Callable[[int], bool], most: int = ROWS) -> int:
    """How many of so many tokens a launch takes: all, or an even share of more than `most`, or than ROWS, or none if `runs`
    says that so many do not fit. Where results must not depend on their number, as many as fit, in all cases."""
    tried = range(most, 0, -1) if alike() else (even(count, most), even(count, ROWS))
    return next((n for n in tried if runs(n)), 0)


WRITTEN: set[int] = set()  # where memory begins that launches of this kind have written since the capture began


def settled(out: Tensor | Sequence[Tensor], *read: Tensor | None) -> bool:
    """Whether what is read was there long before: these launches may start while those before them run, and read before their
    end what they cannot have written. So are parameters in a graph, unless a launch of it writes into one. Called once before
    each launch, with what it writes."""
    outs = (out,) if isinstance(out, Tensor) else out
    if isinstance(outs[0], FakeTensor):
        return False
    if not torch.cuda.is_current_stream_capturing():
        WRITTEN.clear()
        return False
    there = all(
        t is None or (isinstance(owner(t), Parameter) and t.untyped_storage().data_ptr() not in WRITTEN) for t in read
    )
    WRITTEN.update(o.untyped_storage().data_ptr() for o in outs)
    return there


def owner(x: Tensor) -> Tensor:
    """What a view is a view of."""
    return x if x._base is None else x._base


def fits(shape: Any) -> bool:
    """Whether a kernel that streams matrices has a configuration for this; shape: of `kernels.gemv` or one like it."""
    return has_configs(shape, alike())


@cache
def has_configs(shape: Any, alike: bool) -> bool:
    from dsv4_compile.kernels.gemv import configs

    return any(True for _ in configs(shape))


@cache
def rows_at_once(shape: "Shape", alike: bool = False) -> int:
    """How many of the vectors fit into shared memory."""
    return next(M for M in range(shape.M, 0, -1) if has_configs(replace(shape, M=M), alike))
