"""A compressor's memory at decode, one launch: a block has a sequence. Each thread writes its channels of the new rows, reads
the same channels of the window, and writes them of the entry, so that nobody waits for what another block writes."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8, const_expr

from dsv4_compile.kernel import Kernel, fake, stream
from dsv4_compile.kernels import compressor, packed
from dsv4_compile.kernels import warps as of_warp
from dsv4_compile.kernels.compressor import DTYPES, VECTOR, Compressor, Config
from dsv4_compile.kernels.stored import as_float

OF_ENTRIES = DTYPES | {"fp8": Uint8, "bytes": Uint8}
LEAST = 448 * 2.0**-100  # beneath which the scale stays


@dataclass(frozen=True)
class Shape(compressor.Shape):
    """As the compressor's, and the dtype of the entries: "bf16", "fp32", "fp8": e4m3, of at most 128 channels, or "bytes": see
    `packed`."""

    entries: str = "bf16"


class Step(Compressor):
    def __init__(self, shape: Shape, config: Config):
        super().__init__(shape, config)
        self.target, self.in_bytes = OF_ENTRIES[shape.entries], shape.entries == "bytes"

    @cute.jit
    def __call__(
        self,
        values,
        gates,
        entries,
        scales,
        slot,
        c,
        z,
        ape,
        place,
        index,
        weight,
        cos,
        sin,
        target,
        eps: Float32,
        stream,
    ):
        self.kernel(
            values, gates, entries, scales, slot, c, z, ape, place, index, weight, cos, sin, target, eps
        ).launch(grid=[values.shape[0], 1, 1], block=[self.threads, 1, 1], stream=stream, use_pdl=True)

    @cute.kernel
    def kernel(self, values, gates, entries, scales, slot, c, z, ape, place, index, weight, cos, sin, target, eps):
        of_warp.follow()
        v, _, _ = cute.arch.thread_idx()
        batch, _, _ = cute.arch.block_idx()
        self.go(values, gates, entries, scales, slot, c, z, ape, place, index, weight, cos, sin, target, eps, batch, v)

    @cute.jit
    def go(
        self, values, gates, entries, scales, slot, c, z, ape, place, index, weight, cos, sin, target, eps, batch, v
    ):
        """One sequence."""
        closed = index[batch, 0, self.rows - 1] >= 0  # asked for before anything is written, as is where the entry goes
        pool = Int32(target[batch, 0])
        if v < self.d // VECTOR:
            self.remember(values, gates, slot, c, z, ape, place, batch, v)
        entry = self.entry(values, gates, index, weight, cos, sin, eps, batch, 0, v, closed)
        if const_expr(scales is not None):
            scale = as_float(packed.exponent([entry[j] for j in range(VECTOR)], 32, LEAST) << 23)
            if v == 0:
                scales[batch, pool, 0] = scale
            if v < self.d // VECTOR:
                words = cute.recast_tensor(cute.zipped_divide(entries[batch, pool, None], (VECTOR,))[None, v], Int32)
                words[0] = packed.codes([entry[j] for j in range(VECTOR)], packed.over(scale))
        elif const_expr(self.in_bytes):
            numbers = [entry[j] for j in range(VECTOR)]
            packed.store(numbers, entries[batch, pool, None], v, v < self.d // VECTOR, self.d, self.rope)
        elif v < self.d // VECTOR:
            rounded = cute.make_rmem_tensor((VECTOR,), self.target)
            rounded.store(entry.load().to(self.target))
            cute.autovec_copy(rounded, cute.zipped_divide(entries[batch, pool, None], (VECTOR,))[None, v])

    @cute.jit
    def remember(self, values, gates, slot, c, z, ape, place, batch, v):
        """Write this thread's channels of the new rows; with overlap those of both halves."""
        halves = 1 + self.overlap
        value = cute.make_rmem_tensor((VECTOR, halves), Float32)
        gate = cute.make_rmem_tensor((VECTOR, halves), Float32)
        bias = cute.make_rmem_tensor((VECTOR, halves), Float32)
        row, of_bias = Int32(slot[batch, 0]) % values.shape[1], Int32(place[batch, 0]) % ape.shape[0]
        for half in cutlass.range_constexpr(halves):
            at = v + half * (self.d // VECTOR)
            cute.autovec_copy(cute.zipped_divide(c[batch, 0, None], (VECTOR,))[None, at], value[None, half])
            cute.autovec_copy(cute.zipped_divide(z[batch, 0, None], (VECTOR,))[None, at], gate[None, half])
            cute.autovec_copy(cute.zipped_divide(ape[of_bias, None], (VECTOR,))[None, at], bias[None, half])
        gate.store(gate.load() + bias.load())
        for half in cutlass.range_constexpr(halves):
            at = v + half * (self.d // VECTOR)
            cute.autovec_copy(value[None, half], cute.zipped_divide(values[batch, row, None], (VECTOR,))[None, at])
            cute.autovec_copy(gate[None, half], cute.zipped_divide(gates[batch, row, None], (VECTOR,))[None, at])


def program(shape: Shape, config: Config):
    """values and gates [B, S, C] fp32, entries [B, P, d], scales [B, P, 1] fp32 of those in e4m3, else None, slot [B, 1]
    int64, c and z [B, 1, C] fp32, ape [m, C] fp32, place [B, 1] int64, index [B, 1, rows] int64, weight [d], cos and sin
    [B, 1, rope / 2] fp32, target [B, 1] int64, eps; the first four are written, at rows slot mod S and target. The bias is
    row place mod m."""
    arguments = (*arguments_of(shape, cute.sym_int()), Float32(0.0), stream())
    return Step(shape, config), arguments


def arguments_of(shape: Shape, B):
    """All tensors."""
    d = shape.d
    C, S, P = (1 + shape.overlap) * d, cute.sym_int(), cute.sym_int()
    of_entries, of_weight = OF_ENTRIES[shape.entries], DTYPES[shape.weight]
    one = lambda: fake(Int64, B, 1, align=8)  # noqa: E731
    table = lambda: fake(Float32, B, 1, shape.rope // 2, align=4)  # noqa: E731
    return (
        fake(Float32, B, S, C),
        fake(Float32, B, S, C),
        fake(Uint8, B, P, packed.row_bytes(d, shape.rope))
        if shape.entries == "bytes"
        else fake(of_entries, B, P, d, align=VECTOR * of_entries.width // 8),
        fake(Float32, B, P, 1, align=4) if shape.entries == "fp8" else None,
        one(),
        fake(Float32, B, 1, C),
        fake(Float32, B, 1, C),
        fake(Float32, cute.sym_int(), C),
        one(),
        fake(Int64, B, 1, shape.rows, align=8),
        fake(of_weight, d, align=VECTOR * of_weight.width // 8),
        table(),
        table(),
        one(),
    )


KERNEL = Kernel("compressor_append", __file__, program, compressor.configs)


def launch(shape: Shape, *arguments) -> None:
    """See `program`."""
    KERNEL.launcher(shape)(*arguments)
