"""Other libraries' arms: called with what their signatures and layouts ask for, and with results that are the op's. The
libraries are stood in for by functions of the same parameters that read the same layouts on a CPU."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dsv4_compile.lowerings.attention import attention
from dsv4_compile.lowerings.grouped_mm import grouped_mm
from dsv4_compile.lowerings.indexer import indexer
from dsv4_compile.lowerings.linear import grouped_linear, linear, linear_wide
from dsv4_compile.lowerings.norm import rms_norm, unit_norm
from dsv4_compile.lowerings.pointwise import silu, softmax
from dsv4_compile.reference_model.quant import quantize, quantize_rows

ROOT = Path(__file__).resolve().parent.parent
bf16, e4m3 = torch.bfloat16, torch.float8_e4m3fn


@pytest.fixture
def peers(monkeypatch):
    """The module of the benchmarks, with the libraries stood in for."""
    monkeypatch.syspath_prepend(str(ROOT))
    for name, functions in STANDING_IN.items():
        module = ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)
    found = importlib.import_module("benchmarks.peers")
    found.library.cache_clear()
    yield found
    found.library.cache_clear()
    found.ABSENT.clear()


# FlashMLA


def page_rows(pages):
    """[pages, 64, 1, 584] -> rows [64 pages, 512]: in each page the numbers of all rows come before the scales of all rows."""
    count, size, heads, row = pages.shape
    assert (
        (size, heads, row, pages.stride(1)) == (64, 1, 584, 584) and pages.stride(0) % 576 == 0 and pages.dtype == e4m3
    )
    memory = pages.view(torch.uint8).as_strided((count, 64 * 584), (pages.stride(0), 1))
    numbers, scales = memory[:, : 64 * 576].reshape(-1, 576), memory[:, 64 * 576 :].reshape(-1, 8)[:, :7]
    scales = scales.contiguous().view(torch.float8_e8m0fnu).float()
    near = numbers[:, :448].contiguous().view(e4m3).float().view(-1, 7, 64) * scales.unsqueeze(-1)
    return torch.cat([near.flatten(1), numbers[:, 448:].contiguous().view(bf16).float()], 1)


def attended(q, pairs, sink, scale):
    """q [N, h, d], (rows [n, d], lists [N, W]) -> [N, h, d]."""
    rows = torch.cat([r[i.clamp(min=0).long()] for r, i in pairs], 1)
    there = torch.cat([i >= 0 for _, i in pairs], 1).unsqueeze(1)
    s = (q.float() @ rows.float().mT * scale).masked_fill(~there, float("-inf"))
    p = torch.cat([s, sink.view(1, -1, 1).expand(*s.shape[:2], 1)], -1).softmax(-1)[..., :-1]
    return (p @ rows.float()).to(q.dtype)


class Schedule:
    uses = 0


def flash_mla_with_kvcache(
    q,
    k_cache,
    block_table,
    cache_seqlens,
    head_dim_v,
    tile_scheduler_metadata,
    num_splits=None,
    softmax_scale=None,
    causal=False,
    is_fp8_kvcache=False,
    indices=None,
    attn_sink=None,
    extra_k_cache=None,
    extra_indices_in_kvcache=None,
    topk_length=None,
    extra_topk_length=None,
):
    assert block_table is cache_seqlens is num_splits is None and is_fp8_kvcache and not causal and head_dim_v == 512
    assert q.shape[2] in (64, 128) and attn_sink.dtype == torch.float32
    tile_scheduler_metadata.uses += 1
    pairs = [(page_rows(k_cache), indices)]
    if extra_k_cache is not None:
        pairs.append((page_rows(extra_k_cache), extra_indices_in_kvcache))
    assert all(i.dtype == torch.int32 and i.shape[-1] % 64 == 0 for _, i in pairs)
    out = attended(q.flatten(0, 1), [(r, i.flatten(0, 1)) for r, i in pairs], attn_sink, softmax_scale)
    return out.view(q.shape), None


def flash_mla_sparse_fwd(q, kv, indices, sm_scale, d_v=512, attn_sink=None, topk_length=None):
    assert kv.shape[1:] == (1, 512) and indices.shape[:2] == (len(q), 1) and indices.dtype == torch.int32
    assert indices.shape[2] % 128 == 0 and indices.is_contiguous() and d_v == 512 and q.dtype == kv.dtype == bf16
    return attended(q, [(kv[:, 0], indices[:, 0])], attn_sink, sm_scale), None, None


# DeepGEMM


def is_aligned(scales):
    """As the library's own copy leaves them: columns first, each at a multiple of 16 bytes."""
    return (
        scales.dtype == torch.float32
        and (scales.stride(-2) == 1 or scales.shape[-2] == 1)
        and scales.stride(-1) % 4 == 0
    )


def get_mn_major_tma_aligned_tensor(sf):
    mn, k = sf.shape[-2:]
    room = -(-mn // 4) * 4
    out = torch.empty_strided(sf.shape, (*([room * k] * (sf.dim() - 2)), 1, room))
    return out.copy_(sf)


def spread(codes, scales, rows):
    """Numbers of e4m3 with a scale for `rows` rows and 128 columns."""
    wide = scales.repeat_interleave(rows, -2).repeat_interleave(128, -1)
    return codes.float() * wide[..., : codes.shape[-2], : codes.shape[-1]]


def bf16_gemm_nt(a, b, d, c=None, compiled_dims="nk"):
    assert a.dtype == b.dtype == bf16 and d.dtype in (bf16, torch.float32) and c is None
    d.copy_(a.float() @ b.float().T)


def fp8_gemm_nt(
    a, b, d, c=None, recipe=None, recipe_a=None, recipe_b=None, compiled_dims="nk", disable_ue8m0_cast=False
):
    (a, sa), (b, sb) = a, b
    assert a.dtype == b.dtype == e4m3 and is_aligned(sa) and sb.is_contiguous() and sb.dtype == torch.float32
    d.copy_(spread(a, sa, 1) @ spread(b, sb, 128).T)


def einsum(expr, a, b, d, c=None, use_cublaslt=False):
    assert expr == "bhr,hdr->bhd" and a.dtype == b.dtype == d.dtype == bf16 and a.stride(2) == b.stride(2) == 1
    d.copy_(torch.einsum(expr, a.float(), b.float()))


def fp8_einsum(expr, a, b, d, c=None, recipe=(1, 128, 128)):
    (a, sa), (b, sb) = a, b
    assert expr == "bhr,hdr->bhd" and recipe == (1, 128, 128) and is_aligned(sa.permute(1, 0, 2)) and sb.is_contiguous()
    assert sb.shape == (b.shape[0], b.shape[1] // 128, b.shape[2] // 128) and sa.shape == (
        *a.shape[:2],
        a.shape[2] // 128,
    )
    d.copy_(torch.einsum(expr, spread(a.transpose(0, 1), sa.transpose(0, 1), 1).transpose(0, 1), spread(b, sb, 128)))


def m_grouped_bf16_gemm_nt_masked(a, b, d, masked_m, expected_m, compiled_dims="nk"):
    assert a.dim() == b.dim() == d.dim() == 3 and masked_m.dtype == torch.int32 and expected_m > 0
    d.fill_(float("nan"))
    for out, rows, weight, count in zip(d, a, b, masked_m.tolist(), strict=True):
        out[:count] = rows[:count] @ weight.T


def fp8_mqa_logits(q, kv, weights, cu_seq_len_k_start, cu_seq_len_k_end, clean_logits=True, max_seqlen_k=0):
    keys, scale = kv
    assert q.dtype == keys.dtype == e4m3 and scale.shape == keys.shape[:1] and weights.shape == q.shape[:2]
    assert cu_seq_len_k_start.dtype == cu_seq_len_k_end.dtype == torch.int32 and clean_logits and not max_seqlen_k
    s = torch.relu(q.float() @ (keys.float() * scale.unsqueeze(1)).T)
    found = (s * weights.unsqueeze(-1)).sum(1)
    return found.masked_fill(torch.arange(len(keys)) >= cu_seq_len_k_end.unsqueeze(1), float("-inf"))


# quack


def rmsnorm(
    x,
    weight=None,
    bias=None,
    residual=None,
    out_dtype=None,
    residual_dtype=None,
    eps=1e-6,
    prenorm=False,
    weight_offset=0.0,
):
    y = torch.nn.functional.rms_norm(x.float(), x.shape[-1:], weight if weight is None else weight.float(), eps)
    return y.to(x.dtype)


def quack_softmax(x):
    assert x.dim() == 2
    return x.softmax(-1)


def gemm(A, B, out=None, bias=None, alpha=1.0, out_dtype=None, tuned=True):
    assert A.shape[1] == B.shape[0] and not tuned
    return A @ B


STANDING_IN = {
    "flash_mla": dict(
        flash_mla_with_kvcache=flash_mla_with_kvcache,
        flash_mla_sparse_fwd=flash_mla_sparse_fwd,
        get_mla_metadata=lambda: (Schedule(), None),
    ),
    "deep_gemm": {
        f.__name__: f
        for f in (
            *(bf16_gemm_nt, fp8_gemm_nt, einsum, fp8_einsum, fp8_mqa_logits),
            *(m_grouped_bf16_gemm_nt_masked, get_mn_major_tma_aligned_tensor),
        )
    },
    "quack": dict(rmsnorm=rmsnorm, softmax=quack_softmax),
    "quack.gemm_interface": dict(gemm=gemm),
}


def lists(rows, *shape):
    found = torch.randint(0, rows, shape)
    found[torch.rand(shape) < 0.2] = -1
    return found


def attended_case(B, T, second, h=64):
    rows = dict(entries=torch.randn(B, 150, 512).to(bf16), index=lists(150, B, T, 70)) if second else {}
    q, keys = torch.randn(B, T, h, 512).to(bf16), torch.randn(B, 100, 512).to(bf16)
    given = dict(q=q, keys=keys, window=lists(100, B, T, 40), sink=torch.randn(h), entries=None, index=None)
    return tuple(attention.arguments(**given | rows, scale=512**-0.5, sink_on_window=False).values())


def cases():
    x, w = torch.randn(3, 256).to(bf16), (torch.randn(384, 256) / 16).to(bf16)
    codes, scale, _ = quantize(w.float(), "fp8")
    grouped = torch.randn(2, 5, 256).to(bf16)
    ends = torch.tensor([4, 4, 9, 11])
    weights = (torch.randn(4, 24, 256) / 16).to(bf16)
    scored = torch.randn(1, 3, 32, 64).to(bf16), torch.randn(1, 300, 64).to(bf16), torch.randn(1, 3, 32)
    yield "flash_mla", attention, attended_case(3, 1, True), 0.05
    yield "flash_mla", attention, attended_case(2, 1, False, 128), 0.05
    yield "flash_mla", attention, attended_case(2, 3, True), 0.01
    yield "flash_mla", attention, attended_case(1, 5, False), 0.01
    yield "deep_gemm", linear, (x, w, None, None), 0.01
    yield "deep_gemm", linear, (x, codes, scale, None), 0.05
    yield "deep_gemm", linear_wide, (x, w), 1e-5
    yield "deep_gemm", grouped_linear, (grouped, w, None, None), 0.01
    yield "deep_gemm", grouped_linear, (grouped, codes[:256], scale[:2], None), 0.05
    yield "deep_gemm", grouped_mm, (torch.randn(11, 256).to(bf16), weights, ends), 0.01
    seen = torch.tensor([[300, 120, 5]])
    yield "deep_gemm", indexer, (*scored, seen, 40, None, None, None), 0.15
    q, keys, heads = scored
    rows, of_rows = quantize_rows(keys.float())
    yield "deep_gemm", indexer, (q, rows, heads, seen, 40, None, None, of_rows), 0.15
    yield "quack", rms_norm, (x, torch.rand(256), 1e-6), 0.01
    yield "quack", unit_norm, (torch.randn(2, 3, 64).to(bf16), 1e-6), 0.01
    yield "quack", softmax, (torch.randn(2, 3, 64), -1), 1e-5
    yield "quack", linear, (x, w, None, None), 0.01
    yield "torch", linear, (x, w, None, None), 0.01


def test_arms_of_peers_are_called_as_they_ask_and_give_what_the_op_gives(peers):
    timing, main = importlib.import_module("benchmarks.timing"), importlib.import_module("benchmarks.__main__")
    seen = set()
    for name, op, args, most in cases():
        arm = peers.PEERS[name](op, args)
        assert arm is not None, (name, op.name)
        got, want = arm(*args), op.meaning(*args)
        assert got.shape == want.shape and (got.dtype == want.dtype or op is linear_wide), (name, op.name)
        assert main.wrong(got, want.double() if want.is_floating_point() else want) < most, (name, op.name)
        assert timing.microseconds({name: arm}, [args, args], rounds=1)[name] > 0
        seen.add((name, op.name))
    assert len(seen) == 11


def test_what_a_library_has_not_has_no_arm(peers):
    q, *rest = attended_case(1, 1, True)
    tables = torch.ones(1, 1, 1, 32), torch.zeros(1, 1, 1, 32)
    none = [
        ("flash_mla", attention, (q, *rest[:-3], *tables, 0)),
        ("flash_mla", attention, (q[:, :, :6].contiguous(), *rest)),
        ("flash_mla", attention, (q, *rest[:-4], True, None, None, 0)),
        ("flash_mla", attention, (q, *rest[:-1], 64)),
        ("deep_gemm", linear, (torch.randn(2, 64), torch.randn(8, 64), None, None)),
        ("deep_gemm", linear, (torch.randn(2, 96).to(bf16), *quantize(torch.randn(8, 96), "fp8"))),
        ("deep_gemm", linear, (torch.randn(2, 64).to(bf16), *quantize(torch.randn(8, 64), "mxfp4"))),
        ("quack", softmax, (torch.randn(2, 3), 0)),
        *((name, silu, (torch.randn(3),)) for name in peers.PEERS),
    ]
    for name, op, args in none:
        assert peers.PEERS[name](op, args) is None, (name, op.name)


def test_a_library_that_is_not_there_or_breaks_is_told(peers, monkeypatch, capsys):
    main, cases = importlib.import_module("benchmarks.__main__"), importlib.import_module("benchmarks.cases")
    monkeypatch.setitem(sys.modules, "deep_gemm", None)  # the import fails
    args = torch.randn(2, 64).to(bf16), torch.rand(64), 1e-6
    assert peers.deep_gemm(linear, (args[0], torch.randn(8, 64).to(bf16), None, None)) is None
    assert "deep_gemm" in peers.ABSENT and "ModuleNotFoundError" in peers.ABSENT["deep_gemm"]
    monkeypatch.setattr(sys.modules["quack"], "rmsnorm", lambda x, weight, eps: 1 / 0)
    case = cases.Case("norm", rms_norm, lambda: args)
    assert main.arms_of(case, args, ["torch", "quack"]).keys() == {"torch"}
    assert "quack does not run norm: ZeroDivisionError" in capsys.readouterr().out


def test_a_scheduler_is_made_once_for_all_copies(peers):
    made = []
    sys.modules["flash_mla"].get_mla_metadata = lambda: (made.append(Schedule()) or made[-1], None)
    args = attended_case(2, 1, True)
    arm = peers.flash_mla(attention, args)
    arm(*args), arm(*args)
    assert [s.uses for s in made] == [2]
