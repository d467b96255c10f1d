"""Linear layers: the weight is plain, or stored block-quantised and dequantised for the product."""

import math
from typing import Any

import torch
import torch.nn.functional as F

from dsv4_compile.lowerings import gemv, native
from dsv4_compile.lowerings.dequantize import dequantize, dequantized, stored_sizes
from dsv4_compile.op import Cost, Tensor, acc, few_tokens, op


@op("dsv4::linear")
def linear(x: Tensor, weight: Tensor, scale: Tensor | None = None, scale_2: Tensor | None = None) -> Tensor:
    """x W^T. x [M, K]; weight [N, K], plain, or as `dequantize` takes it with scale and scale_2 -> [M, N] of x's dtype, to
    which the weight is rounded before the product.  Source: DeepSeek-V4, Checkpoints.
    """
    return F.linear(x, plain(weight, scale, scale_2).to(x.dtype))


def plain(weight: Tensor, scale: Tensor | None, scale_2: Tensor | None) -> Tensor:
    return weight if scale is None else dequantize.meaning(weight, scale, scale_2)


def sizes_of(weight: Tensor, scale: Tensor | None) -> dict[str, Any]:
    """As `stored_sizes`, of plain weights too."""
    if scale is not None:
        return stored_sizes(weight, scale)
    N, K = weight.shape
    return dict(N=N, K=K, bits=8 * weight.dtype.itemsize, block=math.inf)


@linear.cost
def _(M, N, K, bits, block):
    return Cost(flops=2 * M * N * K + N * K, read=N * K * (bits / 8 + 1 / block) + 2 * M * K, write=2 * M * N)


@linear.sizes
def _(a):
    return dict(M=a.x.shape[0], **sizes_of(a.weight, a.scale))


def in_launches(a: Any) -> bool | str:
    return few_and_stored(a.x, a.x.shape[-2], a.weight, a.scale, a.scale_2)


def pays(a: Any) -> bool | str:
    G, (M, K) = (a.x.shape[0] if a.x.dim() > 2 else 1), a.x.shape[-2:]
    shape = gemv.shape_of(M, G, K, (a.weight, a.scale, a.scale_2), a.x.dtype, a.x.dtype)
    return gemv.pays(shape, most=gemv.rows_of_launch(a.x, a.scale))


@linear.on("cuda", arch="sm_90+", when=in_launches, worth=pays)
def _(x, weight, scale, scale_2):
    return gemv.multiply(x.unsqueeze(0), weight, scale, scale_2, x.dtype).squeeze(0)


def few_and_stored(x: Tensor, tokens: Any, weight: Tensor, scale: Tensor | None, scale_2: Tensor | None) -> bool | str:
    verdict = gemv.few(x, tokens, gemv.times((weight, scale, False)), gemv.rows_of_launch(x, scale))
    return gemv.streams(weight, scale, scale_2) if verdict is True else verdict


def stored(a) -> bool | str:
    return a.scale is not None or "a product of plain matrices is PyTorch's own"


@linear.on("cpu", worth=stored)
def _(x, weight, scale, scale_2):
    if scale is None:
        return F.linear(x, weight.to(x.dtype))
    if len(x) <= few_tokens() and (y := few_rows(x, weight, scale, scale_2)) is not None:
        return y
    return F.linear(x, dequantized(weight, scale, scale_2).to(x.dtype))


def few_rows(x: Tensor, weight: Tensor, scale: Tensor, scale_2: Tensor | None) -> Tensor | None:
    """`linear` or, x [G, M, K], `grouped_linear`, row by row of the weight, where there is C++ for it: nano's 42 linears of a
    step (fp32, one core) take 0.5 ms, with the weight dequantised in front of the product 9."""
    x, library = x.contiguous(), native.library()
    stored = native.described(weight, scale, scale_2) if library is not None and native.exact(x) else None
    if stored is None:
        return None
    *lead, M, K = x.shape
    N, G = weight.shape[0], lead[0] if lead else 1
    y = torch.empty((*lead, M, N // G), dtype=x.dtype)
    library.dsv4_linear(stored, x.data_ptr(), y.data_ptr(), G, M, native.threads(M * N * K))
    return y


@op("dsv4::grouped_linear")
def grouped_linear(x: Tensor, weight: Tensor, scale: Tensor | None = None, scale_2: Tensor | None = None) -> Tensor:
    """Each group of channels by rows of its own: y[g] = x[g] W[g]^T, the rows of the weight being W[0], W[1] ...

    x [G, M, K]; weight [G R, K], plain, or as `dequantize` takes it with scale and scale_2 -> [G, M, R] of x's dtype, to
    which the weight is rounded before the product.  Source: DeepSeek-V4, grouped output projection.
    """
    w = plain(weight, scale, scale_2).to(x.dtype)
    return torch.bmm(x, w.unflatten(0, (x.shape[0], -1)).mT)


@grouped_linear.cost
def _(G, M, R, K, bits, block):
    weights = G * R * K
    return Cost(
        flops=2 * M * weights + weights, read=weights * (bits / 8 + 1 / block) + 2 * M * G * K, write=2 * M * G * R
    )


@grouped_linear.sizes
def _(a):
    sizes, (G, M) = sizes_of(a.weight, a.scale), a.x.shape[:2]
    return dict(G=G, M=M, R=sizes.pop("N") // G, **sizes)


@grouped_linear.on("cuda", arch="sm_90+", when=in_launches, worth=pays)
def _(x, weight, scale, scale_2):
    return gemv.multiply(x, weight, scale, scale_2, x.dtype)


@grouped_linear.on("cpu", worth=stored)
def _(x, weight, scale, scale_2):
    if scale is None:
        w = weight.to(x.dtype)
    elif x.shape[1] <= few_tokens() and (y := few_rows(x, weight, scale, scale_2)) is not None:
        return y
    else:
        w = dequantized(weight, scale, scale_2).to(x.dtype)
    return torch.bmm(x, w.unflatten(0, (x.shape[0], -1)).mT)


@op("dsv4::linear_wide")
def linear_wide(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in at least fp32 of operands that may be narrower: x [M, K], weight [N, K] -> [M, N]. Nobody needs to make wide
    copies of them: many rows of 16 bits go to cuBLAS, some columns at a time; on the CPU, where it is never raised, it has no
    implementation.
    Source: DeepSeek-V4, router and compressor.
    """
    return F.linear(acc(x), weight.to(acc(x).dtype))


@linear_wide.cost
def _(M, N, K, bits, width):
    return Cost(flops=2 * M * N * K, read=N * K * bits / 8 + M * K * width, write=4 * M * N)


@linear_wide.sizes
def _(a):
    N, K = a.weight.shape
    return dict(M=a.x.shape[0], N=N, K=K, bits=8 * a.weight.dtype.itemsize, width=a.x.dtype.itemsize)


def few_and_plain(a: Any) -> bool | str:
    verdict = gemv.few(a.x, a.x.shape[0], gemv.times((a.weight, None, gemv.takes_fp32(a.x, a.weight))))
    return gemv.streams(a.weight, None, None) if verdict is True else verdict


@linear_wide.on("cuda", arch="sm_90+", when=few_and_plain)
def _(x, weight):
    return gemv.multiply(x.unsqueeze(0), weight, None, None, torch.float32).squeeze(0)


def of_16_bits(a: Any) -> bool | str:
    both = f"{a.x.dtype} times {a.weight.dtype}: many rows are multiplied as they are if both have the same 16 bits"
    return both if gemv.takes_fp32(a.x, a.weight) else True


@linear_wide.on("cuda", when=of_16_bits)
def _(x, weight):
    (M, K), N = x.shape, len(weight)
    columns = columns_at_once(M, N, K)
    times = K // columns
    if times <= 1:
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    if 4 * M * N * times <= MOST_SUMS:
        left, right = (a.narrow(1, 0, times * columns).unflatten(1, (times, -1)).transpose(0, 1) for a in (x, weight))
        y, begin = torch.bmm(left, right.mT, out_dtype=torch.float32).sum(0), times * columns
    else:
        y, begin = x.new_zeros((M, N), dtype=torch.float32), 0
    for k in range(begin, K, columns):
        left, right = (a.narrow(1, k, min(columns, K - k)) for a in (x, weight))
        y += torch.mm(left, right.t(), out_dtype=torch.float32)
    return y


FEW_SUMS, MOST_SUMS = 2**25, 2**28  # bytes; the first stays in the L2 of a Hopper


def columns_at_once(M: int, N: int, K: int) -> int:
    """How many columns tensor cores add up, before the sum goes to an fp32 number. They cut off what lies far below the sum
    so far: of K = 4,096 whole columns the error is 1.4e-6 to 4.4e-6, of 512 at a time 4.7e-7 and of 128 1.4e-7, where products
    in fp32 have 1.3e-7 to 6.1e-7. The more columns, the fewer partial sums to write and to read."""
    columns = 128
    while columns < 512 and 4 * M * N * (K // columns) > FEW_SUMS:
        columns *= 2
    return columns
