"""What a warp does at once and CuTeDSL has no short word for: products of small matrices, their operands from shared
memory, copies into it, and reads of another block's. Addresses of shared memory are 32-bit integers."""

import operator

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass._mlir import ir
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T


def load_matrices(address):
    """Four 8 by 8 matrices of 16-bit numbers; lane l names row l mod 8 of matrix l / 8, 16 bytes."""
    return cute.arch.inline_ptx(
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
        write_only_types=[Int32] * 4,
        read_only_args=[address],
    )


def load_transposed(address):
    """The same, each matrix transposed."""
    return cute.arch.inline_ptx(
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
        write_only_types=[Int32] * 4,
        read_only_args=[address],
    )


def multiply(sums, a, b0, b1):
    """sums += A B: A 16 by 16, B 16 by 8, bf16; sums, four registers, fp32."""
    operands = [Int32(x).ir_value() for x in (*a, b0, b1)] + [Float32(sums[i]).ir_value() for i in range(4)]
    found = llvm.inline_asm(
        ir.Type.parse("!llvm.struct<(f32, f32, f32, f32)>"),
        operands,
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$0,$1,$2,$3};",
        "=f,=f,=f,=f,r,r,r,r,r,r,0,1,2,3",
        has_side_effects=False,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
    )
    for i in range(4):
        sums[i] = Float32(llvm.extractvalue(T.f32(), found, [i]))


def copy_16(target, source, size):
    """Start copying `size` bytes (16 or 0) from global to shared memory; the rest of 16 becomes zero."""
    cute.arch.inline_ptx(
        "cp.async.cg.shared.global [{$r0}], [{$r1}], 16, {$r2};", read_only_args=[target, source, size]
    )


def store_pair(address, low, high):
    cute.arch.inline_ptx("st.shared.v2.f32 [{$r0}], {{$r1}, {$r2}};", read_only_args=[address, low, high])


def of_block(address, block):
    """Where another block of the cluster has what lies at `address` here."""
    return cute.arch.inline_ptx(
        "mapa.shared::cluster.u32 {$w0}, {$r0}, {$r1};",
        write_only_types=[Int32],
        read_only_args=[address, Int32(block)],
    )


def send(address, word, barrier):
    """A number of 32 bits into shared memory of a block of a cluster of several, whose barrier counts the bytes; both addresses
    as `of_block` gives them. Nobody waits for memory, as at a barrier of the cluster."""
    text = "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [{$r0}], {$r1}, [{$r2}];"
    cute.arch.inline_ptx(text, read_only_args=[address, word, barrier])


def wait_for_sent(barrier, phase):
    """Until all bytes that a barrier of this block expects have come; from then on they may be read."""
    wait = "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [{$r0}], {$r1};"
    cute.arch.inline_ptx(f"{{ .reg .pred p; AGAIN: {wait} @!p bra AGAIN; }}", read_only_args=[barrier, Int32(phase)])


def load_word(address, local: bool):
    """From shared memory; `local`: of this block, else at an address that `of_block` gave."""
    space = "shared" if local else "shared::cluster"
    return cute.arch.inline_ptx(
        f"ld.{space}.f32 {{$w0}}, [{{$r0}}];", write_only_types=[Float32], read_only_args=[address]
    )


def load_words(address, local: bool):
    """Four."""
    space = "shared" if local else "shared::cluster"
    return cute.arch.inline_ptx(
        f"ld.{space}.v4.f32 {{{{$w0}}, {{$w1}}, {{$w2}}, {{$w3}}}}, [{{$r0}}];",
        write_only_types=[Float32] * 4,
        read_only_args=[address],
    )


def load_four(address):
    """Four numbers of 32 bits from this block's shared memory, as they are."""
    return cute.arch.inline_ptx(
        "ld.shared.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
        write_only_types=[Int32] * 4,
        read_only_args=[address],
    )


def load_integer(address):
    return cute.arch.inline_ptx("ld.shared.b32 {$w0}, [{$r0}];", write_only_types=[Int32], read_only_args=[address])


def load_byte(address):
    return cute.arch.inline_ptx("ld.shared.u8 {$w0}, [{$r0}];", write_only_types=[Int32], read_only_args=[address])


def store(address, word):
    """A number of 32 bits into this block's shared memory."""
    cute.arch.inline_ptx("st.shared.b32 [{$r0}], {$r1};", read_only_args=[address, word])


def store_four(address, words):
    """Into this block's shared memory."""
    cute.arch.inline_ptx("st.shared.v4.b32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};", read_only_args=[address, *words])


def everybody(blocks: int):
    """Wait for all threads of a cluster of so many blocks."""
    if blocks > 1:
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()
    else:
        cute.arch.barrier()


@cute.jit
def sum_of_row(x, row, rows, thread, warps):
    """The sum over the warps that hold a row, in each of its threads; a block has several rows, one thread counts within."""
    x = cute.arch.warp_reduction(x, operator.add)
    if cutlass.const_expr(warps > 1):
        of_warps = cutlass.memory.SmemAllocator().allocate_tensor(
            Float32, cute.make_layout((rows, warps), stride=(warps, 1)), 16
        )
        warp, lane = thread // 32, thread % 32
        if lane == 0:
            of_warps[row, warp] = x
        cute.arch.barrier()
        part = Float32(0.0)
        if lane < warps:
            part = of_warps[row, lane]
        x = cute.arch.warp_reduction(part, operator.add)
    return x


def follow():
    """In a launch with `use_pdl`, before it touches anything: wait for the launch before it, and let the next one come, which
    waits in turn. What it saves is the time between two launches."""
    cute.arch.griddepcontrol_wait()
    cute.arch.griddepcontrol_launch_dependents()


def inverse(x):
    """1 / x, its last bit aside: a division proper branches, so that several do not overlap."""
    return cute.arch.rcp_approx(x)


def sigmoid(x):
    return inverse(Float32(1.0) + cute.math.exp(-x))


@cute.jit
def fold(low, high, half: cutlass.Constexpr):
    """A lane's sum with that of the lane `half` away: of `low` where that bit of its number is 0, else of `high`."""
    keep, give = low, high
    if cute.arch.lane_idx() & half != 0:
        keep, give = give, keep
    return keep + cute.arch.shuffle_sync_bfly(give, half)


@cute.jit
def sum_each(sums):
    """16 sums over lanes of a warp whose numbers differ in four bits, always in the same order: a lane gets that of sums[m], m
    its number mod 16; `sums` is used up."""
    for step in cutlass.range_constexpr(4):
        half = 8 >> step
        for i in cutlass.range_constexpr(half):
            sums[i] = fold(sums[i], sums[i + half], half)
    return sums[0]
