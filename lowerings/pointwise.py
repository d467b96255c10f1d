"""Softmax and the activations that Inductor's decompositions take apart: named again so that larger patterns stay short.

Nobody implements these on their own; what no larger op takes up is inlined back.
"""

import torch
import torch.nn.functional as F

from dsv4_compile.op import Cost, Tensor, acc, op


@op("dsv4::softmax")
def softmax(x: Tensor, dim: int) -> Tensor:
    """softmax of x [...] along `dim`, counted from the last axis (-1); computed in at least fp32, of x's dtype."""
    return torch.softmax(acc(x), dim).to(x.dtype)


@softmax.cost
def _(N):
    return Cost(flops=5 * N, read=2 * N, write=2 * N)


@op("dsv4::silu")
def silu(x: Tensor) -> Tensor:
    """x / (1 + e^-x), of x's dtype."""
    return F.silu(acc(x)).to(x.dtype)


@silu.cost
def _(N):
    return Cost(flops=4 * N, read=2 * N, write=2 * N)


@op("dsv4::softplus")
def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), and x itself above 20; of x's dtype."""
    return F.softplus(acc(x)).to(x.dtype)


@softplus.cost
def _(N):
    return Cost(flops=3 * N, read=2 * N, write=2 * N)


@softmax.sizes
@silu.sizes
@softplus.sizes
def _(a):
    return dict(N=a.x.numel())


@op("dsv4::swiglu")
def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit), both [...], in at least fp32; of the inputs' common dtype."""
    y = F.silu(acc(gate).clamp(max=limit)) * acc(up).clamp(-limit, limit)
    return y.to(torch.promote_types(gate.dtype, up.dtype))


@swiglu.cost
def _(N):
    return Cost(flops=8 * N, read=4 * N, write=2 * N)


@swiglu.sizes
def _(a):
    return dict(N=a.gate.numel())
