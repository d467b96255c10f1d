"""Other libraries' kernels for the same calls, where they can be imported: PyTorch's own, FlashMLA, DeepGEMM and quack.

Each peer is a function of an op and its arguments that gives an arm, or None where the library has nothing for the call.
Inputs are laid out as the library wants them before the clock runs, and results as the op returns them after it. What
others keep in fewer bits, FlashMLA's cache and the vectors of DeepGEMM's FP8 products, is rounded there too: their errors
show it. Signatures are those of FlashMLA at 9241ae3, DeepGEMM 2.6.1 and quack 0.6.4.
"""

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import Inputs, Prepared
from dsv4_compile.op import Op

Call = Callable[..., Any]
ABSENT: dict[str, str] = {}  # libraries that cannot be imported, and why
E4M3 = 448.0  # the largest number
BLOCK, GROUP = 128, 64  # of DeepGEMM's scales; of FlashMLA's, of its pages and lists
NOPE, WIDE = 448, 512  # channels of a key that FlashMLA keeps in FP8, and all


@cache
def library(name: str) -> Any:
    """A module, or None if it is not there or does not load."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # a build for another machine may raise anything
        ABSENT[name] = f"{type(error).__name__}: {error}"
        return None


def own(op: Op, args: Inputs) -> Call | None:
    """PyTorch's: products of plain matrices, norms."""
    if op.name == "rms_norm":
        narrow = args[1].to(args[0].dtype)  # once; with a wide weight there is no kernel
        return lambda x, weight, eps: F.rms_norm(x, weight.shape, narrow, eps)
    if op.name == "unit_norm":
        return lambda x, eps: F.rms_norm(x, x.shape[-1:], None, eps)
    if op.name in ("linear", "grouped_linear") and args[2] is None:
        grouped = lambda x, w: torch.bmm(x, w.unflatten(0, (x.shape[0], -1)).mT)  # noqa: E731
        multiply = F.linear if op.name == "linear" else grouped
        return lambda x, w, *_: multiply(x, w)
    return None


# FlashMLA: lists into FP8 caches for one token a request, into plain rows for more; 64 or 128 heads of 512


def flash_mla(op: Op, args: Inputs) -> Call | None:
    if op.name != "attention" or (found := library("flash_mla")) is None:
        return None
    q, (scale, on_window, cos, _, stored) = args[0], args[6:11]
    fits = q.shape[2] in (64, 128) and q.shape[3] == WIDE and q.dtype == torch.bfloat16
    if not fits or on_window or cos is not None or stored:
        return None
    if q.shape[1] == 1:
        schedule, _ = found.get_mla_metadata()  # made in the first call, for all that follow of the same sizes
        return Prepared(cached_rows, lambda *given: decoded(found, schedule, scale, *given), lambda out, *_: out[0])
    back = lambda out, *_: out[0].view(q.shape)  # noqa: E731
    return Prepared(plain_rows, lambda *given: found.flash_mla_sparse_fwd(*given[:3], scale, WIDE, given[3]), back)


def cached_rows(q: Tensor, keys: Tensor, window: Tensor, sink: Tensor, entries: Any, index: Any, *_: Any) -> Inputs:
    second = (None, None) if entries is None else (cache_of(entries), places(index, entries.shape[1]))
    return q, cache_of(keys), places(window, keys.shape[1]), sink.float(), *second


def decoded(found: Any, schedule: Any, scale: float, q: Tensor, *given: Any) -> Any:
    rows, window, sink, entries, index = given
    return found.flash_mla_with_kvcache(
        q,
        rows,
        None,
        None,
        WIDE,
        schedule,
        softmax_scale=scale,
        is_fp8_kvcache=True,
        indices=window,
        attn_sink=sink,
        extra_k_cache=entries,
        extra_indices_in_kvcache=index,
    )


def cache_of(rows: Tensor) -> Tensor:
    """rows [B, S, 512] as pages [pages, 64, 1, 584] of bytes: of a page first each row's 448 e4m3 numbers and its 64 bf16 ones,
    then each row's 7 scales, powers of two. Pages begin at multiples of 576 bytes."""
    flat = rows.reshape(-1, WIDE)
    flat = F.pad(flat, (0, 0, 0, -len(flat) % GROUP))
    parts = flat[:, :NOPE].float().unflatten(-1, (-1, GROUP))
    scale = torch.exp2(torch.log2((parts.abs().amax(-1) / E4M3).clamp(min=1e-4)).ceil())
    codes = (parts / scale.unsqueeze(-1)).to(torch.float8_e4m3fn).flatten(-2).view(torch.uint8)
    numbers = torch.cat([codes, flat[:, NOPE:].contiguous().view(torch.uint8)], -1)  # 576 bytes a row
    exponents = F.pad(scale.to(torch.float8_e8m0fnu).view(torch.uint8), (0, 1))  # 8
    row, pages = numbers.shape[1] + exponents.shape[1], len(flat) // GROUP
    stride = -(-GROUP * row // numbers.shape[1]) * numbers.shape[1]
    memory = torch.zeros(pages, stride, dtype=torch.uint8, device=rows.device)
    split = GROUP * numbers.shape[1]
    memory[:, :split] = numbers.view(pages, split)
    memory[:, split : GROUP * row] = exponents.view(pages, -1)
    return memory[:, : GROUP * row].view(pages, GROUP, 1, row).view(torch.float8_e4m3fn)


def places(index: Tensor, S: int, multiple: int = GROUP) -> Tensor:
    """Lists [B, T, W] into the rows of each request as int32 lists into those of all, filled up with -1."""
    first = torch.arange(len(index), device=index.device).view(-1, 1, 1) * S
    moved = torch.where(index < 0, -1, index + first).int()
    return F.pad(moved, (0, -moved.shape[-1] % multiple), value=-1)


def plain_rows(q: Tensor, keys: Tensor, window: Tensor, sink: Tensor, entries: Any, index: Any, *_: Any) -> Inputs:
    """q [B T, h, 512], rows [n, 1, 512] of all requests, lists [B T, 1, W + K], sink."""
    rows, lists = [keys.flatten(0, 1)], places(window, keys.shape[1], 1)
    if entries is not None:
        far = places(index, entries.shape[1], 1)
        rows, lists = (
            [*rows, entries.flatten(0, 1)],
            torch.cat([lists, torch.where(far < 0, -1, far + len(rows[0]))], -1),
        )
    lists = F.pad(lists, (0, -lists.shape[-1] % (2 * GROUP)), value=-1).int()
    return q.flatten(0, 1), torch.cat(rows).unsqueeze(1), lists.flatten(0, 1).unsqueeze(1), sink.float()


# DeepGEMM: products, with weights of bf16, or of FP8 and vectors rounded to it; scores of the indexer, with PyTorch's top-k


def deep_gemm(op: Op, args: Inputs) -> Call | None:
    makers: dict[str, Callable[[Any, Inputs], Call | None]] = {
        "linear": product,
        "linear_wide": wide_product,
        "grouped_linear": grouped_product,
        "grouped_mm": masked_product,
        "indexer": choice,
    }
    if op.name not in makers or args[0].dtype != torch.bfloat16 or (found := library("deep_gemm")) is None:
        return None
    return makers[op.name](found, args)


def eighths(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., K] as e4m3, and a scale of each 128 columns, fp32 [..., K / 128]."""
    parts = x.float().unflatten(-1, (-1, BLOCK))
    scale = parts.abs().amax(-1).clamp(min=1e-4) / E4M3
    return (parts / scale.unsqueeze(-1)).to(torch.float8_e4m3fn).flatten(-2), scale


def is_fp8(weight: Tensor, scale: Any) -> bool:
    return scale is not None and weight.dtype == torch.float8_e4m3fn and weight.shape[-1] % BLOCK == 0


def product(found: Any, args: Inputs) -> Call | None:
    _, weight, scale, _ = args
    empty = lambda x: torch.empty(len(x), len(weight), dtype=torch.bfloat16, device=x.device)  # noqa: E731
    if scale is None and weight.dtype == torch.bfloat16:
        return Prepared(lambda x, w, *_: (x, w), lambda x, w: into(found.bf16_gemm_nt, x, w, empty(x)))
    if not is_fp8(weight, scale):
        return None

    def prepare(x: Tensor, w: Tensor, s: Tensor, _: Any) -> Inputs:
        codes, scales = eighths(x)
        return codes, found.get_mn_major_tma_aligned_tensor(scales), w, s.float()

    return Prepared(prepare, lambda x, sx, w, sw: into(found.fp8_gemm_nt, (x, sx), (w, sw), empty(x)))


def wide_product(found: Any, args: Inputs) -> Call | None:
    if args[1].dtype != torch.bfloat16:
        return None
    empty = lambda x, w: torch.empty(len(x), len(w), dtype=torch.float32, device=x.device)  # noqa: E731
    return lambda x, w: into(found.bf16_gemm_nt, x, w, empty(x, w))


def into(multiply: Call, a: Any, b: Any, out: Tensor) -> Tensor:
    multiply(a, b, out)
    return out


def grouped_product(found: Any, args: Inputs) -> Call | None:
    """Tokens first, then groups, as attention leaves its output."""
    x, weight, scale, _ = args
    (G, M, K), R, equation = x.shape, len(weight) // len(x), "bhr,hdr->bhd"
    empty = lambda: torch.empty(M, G, R, dtype=torch.bfloat16, device=x.device)  # noqa: E731
    back = lambda out, *_: out.transpose(0, 1)  # noqa: E731

    def by(multiply: Call, a: Any, b: Any) -> Tensor:
        out = empty()
        multiply(equation, a, b, out)
        return out

    if scale is None and weight.dtype == torch.bfloat16:
        prepare = lambda x, w, *_: (x.transpose(0, 1).contiguous(), w.view(G, R, K))  # noqa: E731
        return Prepared(prepare, lambda x, w: by(found.einsum, x, w), back)
    if not is_fp8(weight, scale) or R % BLOCK:
        return None

    def rounded(x: Tensor, w: Tensor, s: Tensor, _: Any) -> Inputs:
        codes, scales = eighths(x)
        scales = found.get_mn_major_tma_aligned_tensor(scales).transpose(0, 1)
        return codes.transpose(0, 1).contiguous(), scales, w.view(G, R, K), s.float().view(G, R // BLOCK, -1)

    return Prepared(rounded, lambda x, sx, w, sw: by(found.fp8_einsum, (x, sx), (w, sw)), back)


def masked_product(found: Any, args: Inputs) -> Call | None:
    """Each group in a slab of rows of its own."""
    if args[1].dtype != torch.bfloat16:
        return None

    def prepare(x: Tensor, w: Tensor, ends: Tensor) -> Inputs:
        count = ends.diff(prepend=ends.new_zeros(1))
        group = torch.searchsorted(ends, torch.arange(len(x), device=x.device), right=True)
        place = torch.arange(len(x), device=x.device) - (ends - count)[group]
        slabs = x.new_zeros(len(w), -(-int(count.max()) // GROUP) * GROUP, x.shape[1])
        slabs[group, place] = x
        return slabs, w, count.int(), max(1, len(x) // len(w)), group, place

    def call(x: Tensor, w: Tensor, count: Tensor, usual: int, *_: Any) -> Tensor:
        out = x.new_empty(*x.shape[:2], w.shape[1])
        found.m_grouped_bf16_gemm_nt_masked(x, w, out, count, usual)
        return out

    return Prepared(prepare, call, lambda out, *given: out[given[-2], given[-1]])


def choice(found: Any, args: Inputs) -> Call | None:
    """Of one request; keys and queries in FP8."""
    q, (k, cos) = args[0], args[4:6]
    if len(q) > 1 or cos is not None or q.shape[2] not in (32, 64) or q.shape[3] not in (32, 64, 128):
        return None

    def prepare(q: Tensor, keys: Tensor, w: Tensor, visible: Tensor, *rest: Any) -> Inputs:
        codes, scale = by_vector(q[0])
        stored = rest[-1] if keys.dtype == torch.float8_e4m3fn else None
        rows, of_rows = by_vector(keys[0]) if stored is None else (keys[0], stored[0, :, 0])
        end = visible.view(-1).int()
        return codes, rows, of_rows, w[0].float() * scale, torch.zeros_like(end), end

    def call(q: Tensor, rows: Tensor, scale: Tensor, w: Tensor, start: Tensor, end: Tensor) -> Tensor:
        pick = found.fp8_mqa_logits(q, (rows, scale), w, start, end).topk(k, -1).indices
        return torch.where(pick < end.unsqueeze(-1), pick, -1)

    return Prepared(prepare, call, lambda out, *_: out.unsqueeze(0))


def by_vector(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., d] as e4m3 with a scale for each vector."""
    scale = x.float().abs().amax(-1).clamp(min=1e-4) / E4M3
    return (x.float() / scale.unsqueeze(-1)).to(torch.float8_e4m3fn), scale


# quack: norms, softmax, plain products


def quack(op: Op, args: Inputs) -> Call | None:
    if op.name not in ("rms_norm", "unit_norm", "softmax", "linear") or (found := library("quack")) is None:
        return None
    if op.name == "rms_norm":
        return lambda x, weight, eps: found.rmsnorm(x, weight, eps=eps)
    if op.name == "unit_norm":
        return lambda x, eps: found.rmsnorm(x, eps=eps)
    if op.name == "softmax":
        x, dim = args
        if dim not in (-1, x.dim() - 1):
            return None
        return Prepared(lambda x, _: (x.flatten(0, -2),), found.softmax, lambda out, *_: out.view(x.shape))
    if args[2] is not None or args[1].dtype != args[0].dtype or (products := library("quack.gemm_interface")) is None:
        return None
    return lambda x, w, *_: products.gemm(x, w.t(), tuned=False)


PEERS: dict[str, Callable[[Op, Inputs], Call | None]] = {
    "torch": own,
    "flash_mla": flash_mla,
    "deep_gemm": deep_gemm,
    "quack": quack,
}
