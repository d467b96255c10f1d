"""Products of a warpgroup (Hopper), the left operand in registers, the right one in shared memory.

The right operand lies as the tensor cores read it without a swizzle: eight columns of 16 bytes each are a core matrix of 128
bytes, one for each eight columns, then those of the next 16 bytes.
"""

from cutlass import Float32, Int32
from cutlass._mlir import ir
from cutlass._mlir.dialects import llvm

KINDS = {"e4m3": ("k32.f32.e4m3.e4m3", "1, 1"), "bf16": ("k16.f32.bf16.bf16", "1, 1, 0")}  # 32 bytes of a row
CORE = 128  # bytes of eight columns, 16 bytes each


def descriptor(address, wide: int, further=0):
    """Lower word of that of the first 32 bytes of 8 `wide` columns, which lie `further` times 16 bytes behind an address. In a
    cluster, the upper bits of an address name the block."""
    return (address & 0x3FFFF) // 16 + further | Int32(wide * CORE // 16 << 16)


def products(kind: str, chains, wide: int, descriptor, stride: int):
    """For each chain of (left operand: four words, which 32 bytes of the columns): the sum of its products, 4 `wide` numbers
    of a thread. descriptor: that of the first 32 bytes; it grows by `stride` for each 32."""
    count, outs, lines, operands = 4 * wide, 4 * wide * len(chains), [], []
    shape, signs = KINDS[kind]
    lines += [
        "{ .reg .pred no, yes; .reg .b32 l, h; .reg .b64 b; mov.b32 h, 8;"
    ]  # 128 bytes from eight columns to eight
    lines += ["setp.ne.b32 no, h, 8; setp.eq.b32 yes, h, 8; wgmma.fence.sync.aligned;"]
    for c, chain in enumerate(chains):
        sums = ", ".join(f"${c * count + i}" for i in range(count))
        for first, (left, step) in enumerate(chain):
            a = ", ".join(f"${outs + 1 + len(operands) + i}" for i in range(4))
            operands += [Int32(x) for x in left]
            lines.append(f"add.s32 l, ${outs}, {step * stride}; mov.b64 b, {{l, h}};")
            lines.append(f"wgmma.mma_async.sync.aligned.m64n{8 * wide}{shape} {{{sums}}}, {{{a}}}, b,")
            lines.append(f"{'yes' if first else 'no'}, {signs};")
    lines.append("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; }")
    constraints = ",".join(["=f"] * outs + ["r"] * (1 + len(operands)))
    f32 = ir.F32Type.get()
    found = llvm.inline_asm(
        ir.Type.parse(f"!llvm.struct<({', '.join(['f32'] * outs)})>"),
        [x.ir_value() for x in (Int32(descriptor), *operands)],
        " ".join(lines),
        constraints,
        has_side_effects=True,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )
    numbers = [Float32(llvm.extractvalue(f32, found, [i])) for i in range(outs)]
    return [numbers[c * count : (c + 1) * count] for c in range(len(chains))]
