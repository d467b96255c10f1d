"""What each op means and who can run it: one file an op, with schema, plain-PyTorch meaning, cost and implementations.

`OPS` lists them.  A lowering file imports torch, sympy, `dsv4_compile.op` and its own kernel; it knows no graphs.
"""

from ..op import Op
from . import (
    append,
    attention,
    compressor,
    compressor_append,
    dequantize,
    experts,
    grouped_mm,
    head,
    indexer,
    linear,
    linears,
    mhc,
    mhc_boundary,
    moe,
    norm,
    output_projection,
    pointwise,
    prologue,
    rope,
    router,
    shared_expert,
    sinkhorn,
)
from .numerics import CONTRACTS, TOLERANCE, Contract, Draw, contract_of, digest

__all__ = ["CONTRACTS", "OPS", "TOLERANCE", "Contract", "Draw", "contract_of", "digest"]

OPS: tuple[Op, ...] = (
    dequantize.dequantize,
    grouped_mm.grouped_mm,
    linear.linear,
    linear.grouped_linear,
    output_projection.output_projection,
    linear.linear_wide,
    *linears.LINEARS.values(),
    *linears.NORMED.values(),
    pointwise.softmax,
    pointwise.silu,
    pointwise.softplus,
    pointwise.swiglu,
    norm.rms_norm,
    norm.unit_norm,
    rope.rope,
    rope.norm_rope,
    append.append,
    append.norm_rope_append,
    sinkhorn.sinkhorn,
    mhc.mhc_pre,
    mhc.mhc_post,
    mhc.mhc_head,
    mhc_boundary.mhc_enter,
    mhc_boundary.mhc_boundary,
    router.router,
    router.expert_gates,
    moe.moe,
    shared_expert.shared_expert,
    experts.experts,
    compressor.compressor,
    compressor_append.compressor_append,
    compressor_append.compressor_append_fp8,
    *prologue.PROLOGUES.values(),
    attention.attention,
    attention.dense_attention,
    indexer.indexer,
    head.head,
    head.mtp_join,
)
