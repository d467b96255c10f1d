"""What to find: one file an idiom, each holding rules written as plain PyTorch.

`RULES` lists them in the order in which the passes try them.  A rule file imports `dsv4_compile.match` and the op that
it emits; it knows no devices and no kernels.
"""

from ..match import Rule
from . import attention, compressor, dequantize, grouped_mm, linear, mhc, moe, norm, pointwise, rope, router, sinkhorn

RULES: tuple[Rule, ...] = (
    dequantize.fp8,
    dequantize.fp8_indexed,
    dequantize.mxfp4,
    dequantize.nvfp4,
    grouped_mm.native,
    grouped_mm.of_transformers,
    grouped_mm.in_blocks,
    pointwise.last_axis,
    pointwise.second_last_axis,
    pointwise.decomposed,
    pointwise.gated,
    pointwise.thresholded,
    pointwise.clamped,
    norm.weighted,
    norm.unweighted,
    rope.of_pairs,
    rope.of_swapped_pairs_of_tokens,
    rope.of_swapped_pairs,
    sinkhorn.chain,
    mhc.pre,
    mhc.pre_of_normed,
    mhc.post,
    mhc.post_of_sum,
    mhc.head,
    mhc.head_of_normed,
    router.learned,
    router.chosen,
    moe.gathered,
    moe.grouped,
    moe.gathered_packed,
    moe.grouped_packed,
    compressor.overlap,
    compressor.plain,
    compressor.overlap_of_windows,
    compressor.plain_of_windows,
    attention.window_only,
    attention.window_and_entries,
    attention.window_only_scaled,
    attention.window_and_entries_scaled,
    attention.masked_by_lists,
    attention.masked,
    linear.product,
    linear.grouped,
)
