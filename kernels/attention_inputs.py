"""What all kernels of attention over index lists take, and how those that copy rows find them."""

from dataclasses import dataclass
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, const_expr

from dsv4_compile.kernel import fake, stream


@dataclass(frozen=True)
class Shape:
    """Queries of `heads` heads of d channels. entries: whether there is a second list. on_window: where the sink goes. rope:
    trailing channels that the result is turned back in, or 0."""

    d: int
    heads: int
    entries: bool
    on_window: bool
    rope: int


def arguments(shape: Shape, *work: Any, N: Any = None, dtype=BFloat16, align: int = 16) -> tuple[Any, ...]:
    """q [N, h, d], keys [B, S, d], window [N, W] int64, entries [B, E, d] and index [N, K] int64 or None, sink [h] fp32,
    cos and sin [P, rope / 2] fp32 or None, of which token n reads row n mod P, `work` -> out [N, h, d]; scale; T, tokens of a
    request: N = B T, the symbol that `work` has, if it has one. align: bytes, of rows."""
    B, W, K, N = cute.sym_int(), cute.sym_int(), cute.sym_int(), cute.sym_int() if N is None else N
    table = fake(Float32, cute.sym_int(), shape.rope // 2, align=4) if shape.rope > 0 else None
    return (
        fake(dtype, N, shape.heads, shape.d, align=align),
        fake(dtype, B, cute.sym_int(), shape.d, align=align),
        fake(Int64, N, W, align=8),
        fake(dtype, B, cute.sym_int(), shape.d, align=align) if shape.entries else None,
        fake(Int64, N, K, align=8) if shape.entries else None,
        fake(Float32, shape.heads, align=4),
        table,
        table,
        *work,
        fake(dtype, N, shape.heads, shape.d, align=align),
        Float32(1.0),
        Int32(1),
        stream(),
    )


@cute.jit
def named(place, rows, token, window, index):
    """The row at a place of both lists, one behind the other, `rows` in all; -1: none."""
    row = Int32(-1)
    if place < window.shape[1]:
        row = Int32(window[token, place])
    else:
        if const_expr(index is not None):
            if place < rows:
                row = Int32(index[token, place - window.shape[1]])
    return row


class Rows:
    """A block that copies rows of `row_bytes` each."""

    row_bytes: int

    def address(self, rows, request, row):
        """Of a row of a request; requests may lie apart."""
        return rows.iterator.toint() + 2 * Int64(request) * rows.stride[0] + Int64(cutlass.max(row, 0)) * self.row_bytes
