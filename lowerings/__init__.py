"""What each op means and who can run it: one file an op, with schema, plain-PyTorch meaning, cost and implementations.

`OPS` lists them.  A lowering file imports torch, sympy, `dsv4_compile.op` and its own kernel; it knows no graphs.
"""

from ..op import Op
from . import attention, compressor, norm, pointwise

OPS: tuple[Op, ...] = (
    pointwise.softmax,
    pointwise.silu,
    pointwise.softplus,
    pointwise.swiglu,
    norm.rms_norm,
    norm.unit_norm,
    compressor.compressor,
    attention.attention,
)
