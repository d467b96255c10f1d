"""Block-quantised weights back to numbers: FP8, MXFP4 and NVFP4."""

import math
from functools import cache

import torch

from dsv4_compile.lowerings import native
from dsv4_compile.op import Cost, Tensor, op

FP8_BLOCK = 128  # rows and columns that share a scale
MXFP4_BLOCK, NVFP4_BLOCK = 32, 16  # columns that share one
E4M3_UNIT = 256.0  # of `e4m3_parts`
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # then the same negative


@op("dsv4::dequantize")
def dequantize(weight: Tensor, scale: Tensor, scale_2: Tensor | None = None) -> Tensor:
    """Stored weight -> fp32 [..., N, K]. All scales multiply. The dtypes tell the format:

    fp8: weight e4m3 [..., N, K], scale e8m0 or fp32 [..., ceil(N / 128), ceil(K / 128)].
    mxfp4: weight uint8 [..., N, K / 2], two e2m1 codes a byte, the low nibble is the even column; scale e8m0 [..., N, K / 32].
    nvfp4: weight as mxfp4, scale e4m3 [..., N, K / 16], scale_2 fp32 [...].
    Source: DeepSeek-V4, Checkpoints.
    """
    if weight.dtype == torch.float8_e4m3fn:
        # in floats, since Inductor simplifies integer indices of blocks that are cut short to wrong addresses
        sizes = (torch.arange(n, dtype=torch.float32, device=weight.device) for n in weight.shape[-2:])
        row, column = ((size / FP8_BLOCK).floor().long() for size in sizes)
        return weight.float() * scale.float()[..., row.unsqueeze(-1), column]
    code = torch.stack((weight & 15, weight >> 4), -1).flatten(-2)
    m = (code & 7).float()  # the magnitudes 0 0.5 1 1.5 2 3 4 6 are the upper envelope of three lines
    magnitude = torch.maximum(torch.maximum(m * 0.5, m - 2), m * 2 - 8)
    value = torch.where(code > 7, -magnitude, magnitude)
    value = (value.unflatten(-1, (scale.shape[-1], -1)) * scale.float().unsqueeze(-1)).flatten(-2)
    return value if scale_2 is None else value * scale_2[..., None, None]


@dequantize.cost
def _(N, K, bits, block):
    return Cost(flops=N * K, read=N * K * bits / 8 + N * K / block, write=4 * N * K)


@dequantize.sizes
def _(a):
    return stored_sizes(a.weight, a.scale)


def stored_sizes(weight: Tensor, scale: Tensor) -> dict[str, int]:
    """Rows, columns, bits of a number, and how many share a scale."""
    N, K = weight.shape[-2:]
    if weight.dtype == torch.uint8:
        return dict(N=N * math.prod(weight.shape[:-2]), K=2 * K, bits=4, block=2 * K // scale.shape[-1])
    return dict(N=N * math.prod(weight.shape[:-2]), K=K, bits=8, block=FP8_BLOCK**2)


@dequantize.on("cpu")
def _(weight, scale, scale_2):
    return dequantized(weight, scale, scale_2)


def dequantized(weight: Tensor, scale: Tensor, scale_2: Tensor | None) -> Tensor:
    """`dequantize` on the CPU, bit for bit."""
    library, stored = native.library(), native.described(weight, scale, scale_2)
    if library is not None and stored is not None:
        *lead, N, K = weight.shape
        value = torch.empty(*lead, N, K * (1 + (weight.dtype == torch.uint8)), device="cpu", dtype=torch.float32)
        library.dsv4_dequantize(stored, value.data_ptr(), math.prod(lead), native.threads(value.numel()))
        return value
    return by_calls(weight, scale, scale_2)


def by_calls(weight: Tensor, scale: Tensor, scale_2: Tensor | None) -> Tensor:
    """The same without C++. Four-bit codes are looked up: a byte is one 8-byte entry, a pair of fp32 (8.4 million codes on
    one core: 0.1 s, against 0.8 s for the arithmetic)."""
    scale = scale.float()
    if weight.dtype == torch.float8_e4m3fn:
        return scale_blocks_(e4m3_parts(weight).mul_(E4M3_UNIT), scale)
    pairs = e2m1_table().index_select(0, weight.reshape(-1).int()).view(weight.shape)
    value = pairs.view(torch.float32)
    value.unflatten(-1, (scale.shape[-1], -1)).mul_(scale.unsqueeze(-1))
    return value if scale_2 is None else value.mul_(scale_2[..., None, None])


def e4m3_parts(weight: Tensor) -> Tensor:
    """e4m3 / E4M3_UNIT as fp32, contiguous: sign, exponent and mantissa are moved to where fp16 has them, whose bias is 8
    more. A quarter of the time of a look-up, a fiftieth of that of PyTorch's own conversion."""
    bits = weight.view(torch.int8).to(torch.int16, memory_format=torch.contiguous_format)
    bits <<= 7
    bits &= -0x4080  # without the copies of the sign
    value = bits.view(torch.float16).float()
    return value.masked_fill_(weight.view(torch.uint8) & 127 == 127, float("nan")) if holds_nan(weight) else value


def holds_nan(weight: Tensor) -> bool:
    """Whether a byte of e4m3 is 0x7f or 0xff, the largest signed and the largest unsigned one."""
    if not weight.numel():
        return False
    return weight.view(torch.int8).amax().item() == 127 or weight.view(torch.uint8).amax().item() == 255


def scale_blocks_(value: Tensor, scale: Tensor) -> Tensor:
    """value [..., N, K] times its block's scale [..., ceil(N / 128), ceil(K / 128)], in place, without spreading the scale
    over the rows."""
    N, K = value.shape[-2:]
    spread = scale.repeat_interleave(FP8_BLOCK, -1)[..., :K]
    whole = N // FP8_BLOCK
    value[..., : whole * FP8_BLOCK, :].unflatten(-2, (whole, FP8_BLOCK)).mul_(spread[..., :whole, None, :])
    if N % FP8_BLOCK:
        value[..., whole * FP8_BLOCK :, :].mul_(spread[..., whole:, :])
    return value


@cache
def e2m1_table() -> Tensor:
    """The two values of each byte, low nibble first, as one int64 of their bits."""
    value = torch.tensor([*E2M1, *(-v for v in E2M1)], dtype=torch.float32, device="cpu")
    byte = torch.arange(256, device="cpu")
    return torch.stack((value[byte & 15], value[byte >> 4]), -1).view(torch.int64).view(-1)
