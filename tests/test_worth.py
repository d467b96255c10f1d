"""What Inductor was measured to do faster is left to it, unless somebody asks for the kernel."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dsv4_compile import tuning
from dsv4_compile.lowerings import gemv
from dsv4_compile.lowerings.compressor import compressor
from dsv4_compile.lowerings.linear import grouped_linear, linear
from dsv4_compile.lowerings.linears import LINEARS
from dsv4_compile.lowerings.mhc import MANY, mhc_pre
from dsv4_compile.lowerings.output_projection import output_projection
from dsv4_compile.lowerings.prologue import PROLOGUES

pytestmark = pytest.mark.skipif(find_spec("cutlass") is None, reason="kernels need CuTeDSL")


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="cuda")


def fp8(N, K):
    scale = empty(-(-N // 128), -(-K // 128), dtype=torch.float8_e8m0fnu)
    return empty(N, K, dtype=torch.float8_e4m3fn), scale


def projected(M, G, R, K, D):
    (a, a_scale), (b, b_scale) = fp8(G * R, K), fp8(D, G * R)
    return empty(G, M, K), a, b, a_scale, None, b_scale, None


def readers(M, K, *rows):
    weights, scales = zip(*(fp8(N, K) for N in rows), strict=True)
    return empty(M, K), *weights, 0, *scales


def windows(B, n, R, d=512):
    c, table = empty(B, 4096, d, dtype=torch.float32), empty(B, n, 32, dtype=torch.float32)
    return c, c, empty(B, n, R, dtype=torch.int64), empty(d), table, table, 1e-6, False


def before_attention(B, T, heads=64, d=512):
    q_table, table = (empty(B, T, *lead, 32, dtype=torch.float32) for lead in ((1,), ()))
    slot = empty(B, T, dtype=torch.int64)
    keys = empty(B, 128, d), slot, empty(B, T, d), empty(d), 1e-6, table, table
    return empty(B, T, heads, d), 1e-6, q_table, q_table, *keys


def streams(tokens):
    exact = (empty(*shape, dtype=torch.float32) for shape in ((24, 256), (24,), (3,)))
    return empty(1, tokens, 4, 64), *exact, 20, 1e-6, 1e-6


CASES = {  # whether a compiled model takes the kernel
    "queries of Flash": (linear, lambda: (empty(64, 1024), *fp8(32768, 1024)), True),
    "keys of Pro, 16": (linear, lambda: (empty(16, 7168), *fp8(512, 7168)), True),
    "keys of Pro, 64": (linear, lambda: (empty(64, 7168), *fp8(512, 7168)), False),
    "nothing": (linear, lambda: (empty(0, 7168), *fp8(512, 7168)), True),
    "groups of Flash": (grouped_linear, lambda: (empty(8, 32, 4096), *fp8(8192, 4096)), True),
    "groups of Flash, 64": (grouped_linear, lambda: (empty(8, 64, 4096), *fp8(8192, 4096)), False),
    "output of Flash, 32": (output_projection, lambda: projected(32, 8, 1024, 4096, 4096), True),
    "output of Flash, 64": (output_projection, lambda: projected(64, 8, 1024, 4096, 4096), False),
    "queries and keys of Flash, 64": (LINEARS[2], lambda: readers(64, 4096, 1024, 512), True),
    "queries and keys of Pro, 64": (LINEARS[2], lambda: readers(64, 7168, 1536, 512), False),
    "a window that closes": (compressor, lambda: windows(1, 1, 128), True),
    "short windows": (compressor, lambda: windows(1, 8, 32), True),
    "few long windows": (compressor, lambda: windows(1, 4, 128), False),
    "many long windows": (compressor, lambda: windows(4, 4, 128), True),
    "before attention, 64": (PROLOGUES[0], lambda: before_attention(64, 1), True),
    "mixtures of one token": (mhc_pre, lambda: streams(1), True),
    "mixtures of many": (mhc_pre, lambda: streams(MANY), True),
    "mixtures of more": (mhc_pre, lambda: streams(MANY + 1), False),
    "before attention, many": (PROLOGUES[0], lambda: before_attention(1, 65), False),
}


@pytest.mark.parametrize(("op", "made", "taken"), CASES.values(), ids=list(CASES))
def test_what_is_faster_is_taken(op, made, taken, monkeypatch):
    monkeypatch.setenv("DSV4_ARCH", "sm_90a")
    with FakeTensorMode():
        arguments = op.arguments(*made())
        implementation, reasons = op.claim(arguments, if_worth=True)
        assert (implementation is not None) == taken, reasons
        assert op.claim(arguments)[0] is not None


@pytest.mark.parametrize(("op", "made"), [case[:2] for case in CASES.values()], ids=list(CASES))
def test_where_tokens_must_not_depend_on_others_nothing_depends_on_their_number(op, made, monkeypatch):
    monkeypatch.setenv("DSV4_ARCH", "sm_90a")
    monkeypatch.setattr(tuning.SETTINGS, "batch_invariant", True)
    with FakeTensorMode():
        assert op.claim(op.arguments(*made()), if_worth=True)[0] is not None


OUTPUT = dict(M=16, G=1, R=7168, K=16384, format="fp8", e8m0=True, dtype="bf16", out="bf16")


def test_launches_of_fewer_vectors_are_taken_where_they_are_faster(monkeypatch):
    """Of 16 vectors of 16,384 columns a launch takes 14, in more than the time of two of eight."""
    from dsv4_compile.kernels.gemv import Shape

    monkeypatch.setenv("DSV4_ARCH", "sm_90a")
    output = Shape(**OUTPUT)
    assert gemv.rows_at_once(output) == 14 and gemv.vectors_at_once(output, 16) == 8
    assert gemv.vectors_at_once(replace(output, K=1024, R=32768), 16) == 16
    assert gemv.vectors_at_once(replace(output, M=20), 8) == 7, "even shares"


def test_groups_that_need_several_launches_are_moved_once(monkeypatch):
    from dsv4_compile.kernel import collecting

    monkeypatch.setenv("DSV4_ARCH", "sm_90a")
    moved = []
    compact = gemv.compact
    monkeypatch.setattr(gemv, "compact", lambda x: (moved.append(x) if not x.is_contiguous() else None) or compact(x))
    with FakeTensorMode(), collecting() as launches:
        y = grouped_linear.run(empty(3, 40, 256), *fp8(3 * 128, 256), None)
    assert y.shape == (3, 40, 128) and y.is_contiguous() and len(moved) == 2
    assert [shape.M for _, shape, _ in launches] == [14] * 3 and all(shape.by_token for _, shape, _ in launches)
