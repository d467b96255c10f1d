"""All experts in one op: what is found on a GPU, the formula, and on a GPU the numbers."""

import os
from functools import partial
from importlib.util import find_spec

import pytest
import torch
from torch.nn import functional as F

from dsv4_compile.config import Config
from dsv4_compile.lowerings import OPS
from dsv4_compile.lowerings.experts import experts
from dsv4_compile.match import Found, value
from dsv4_compile.passes import PassManager
from dsv4_compile.patterns import RULES
from dsv4_compile.patterns import experts as pattern
from dsv4_compile.reference_model import DSV4Config
from dsv4_compile.reference_model.model import MoE
from dsv4_compile.reference_model.quant import quantize
from dsv4_compile.warm import look

LIMIT = 4.0


def case(
    N=2, k=2, X=5, D=32, I=16, H=24, format="none", own="none", chosen=False, n=0, dtype=torch.bfloat16, seed=0, rows=0
):
    """Arguments of the op; no two logits are alike. rows: of a table of choices, by token."""
    g = torch.Generator().manual_seed(seed)

    def stored(*shape, format):
        weight, *scales = quantize((torch.randn(*shape, generator=g) * shape[-1] ** -0.5).to(dtype), format)
        return weight, *scales, *[None] * (2 - len(scales))

    routed = [stored(X, *s, format=format) for s in ((I, D), (I, D), (D, I))]
    shared = [stored(*s, format=own) for s in ((H, D), (H, D), (D, H))]
    (w, s, t), (v, r, u) = zip(*routed, strict=True), zip(*shared, strict=True)
    logits = torch.stack([torch.linspace(-3, 3, X)[torch.randperm(X, generator=g)] for _ in range(N)])
    expert = torch.randint(0, X, (rows or N, k), generator=g) if chosen else None
    token = torch.randint(-rows, rows, (N,), generator=g) if rows else None
    bias = None if chosen else torch.rand(X, generator=g) * 0.1 / X
    x = torch.randn(N, D, generator=g).to(dtype)
    mixed = [None] * 3
    if n:
        wide = torch.promote_types(dtype, torch.float32)
        coefficients = (torch.rand(N, *s, generator=g).to(wide) for s in ((n,), (n, n)))
        mixed = [torch.randn(N, n, D, generator=g).to(dtype), *coefficients]
    return x, logits, k, 1.5, 1e-20, *w, LIMIT, *v, LIMIT / 2, bias, expert, *s, *t, *r, *u, *mixed, token


def formula(x, logits, k, factor, eps, w1, w3, w2, limit, v1, v3, v2, own_limit, bias, expert, *rest):
    """Plain weights, token by token, in fp64."""
    *_, X, post, comb, token = rest
    expert, out = expert if token is None else expert[token], []

    def mlp(x, a, b, c, limit):
        return c.double() @ (F.silu((a.double() @ x).clamp(max=limit)) * (b.double() @ x).clamp(-limit, limit))

    for i, token in enumerate(x.double()):
        score = F.softplus(logits[i].double()).sqrt()
        picked = expert[i].tolist() if bias is None else (score + bias).argsort(descending=True)[:k].tolist()
        total = sum(score[e] for e in picked) + eps
        y = sum(score[e] / total * factor * mlp(token, w1[e], w3[e], w2[e], limit) for e in picked)
        y = y + mlp(token, v1, v3, v2, own_limit)
        out.append(y if X is None else post[i].double()[:, None] * y + comb[i].double().T @ X[i].double())
    return torch.stack(out)


@pytest.mark.parametrize("n", [0, 3])
@pytest.mark.parametrize(("chosen", "rows"), [(False, 0), (True, 0), (True, 7)], ids=["routed", "chosen", "table"])
def test_the_meaning_is_the_formula(chosen, rows, n):
    args = case(chosen=chosen, n=n, dtype=torch.float64, rows=rows)
    torch.testing.assert_close(experts(*args), formula(*args), rtol=1e-5, atol=1e-6)
    torch.library.opcheck(experts.target, args)


# What is found


def found(config, N, kind="moe", read=False):
    """Ops of a feed-forward block of the reference model, on meta tensors. read: somebody reads the choices."""
    with torch.device("meta"):
        block = MoE(config, kind, config.expert_format).to(torch.bfloat16).requires_grad_(False)
        x, token = torch.randn(1, N, config.hidden_size, dtype=torch.bfloat16), torch.zeros(1, N, dtype=torch.int64)

    def call(x, token):
        y, expert = block(x, token, None)
        return (y + 0, expert * 2) if read else y

    manager = PassManager(Config(inner="eager"), RULES, OPS)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(call, backend=partial(look, manager), fullgraph=True, dynamic=False)(x, token)
    return manager.report.counts


@pytest.mark.parametrize("kind", ["moe", "hash_moe"])
def test_all_experts_of_few_tokens_are_one(kind):
    config = DSV4Config.tiny()
    counts = found(config, 3, kind)
    assert counts["experts"] == counts["moe"] == counts["router"] == 1, counts
    assert found(config, 9, kind)["experts"] == 0


def test_rows_of_a_table_are_read_inside(monkeypatch):
    made = []
    monkeypatch.setattr(pattern, "Found", lambda arguments, *rest: made.append(arguments) or Found(arguments, *rest))
    config = DSV4Config.tiny()
    for read in (False, True):
        assert found(config, 3, "hash_moe", read)["experts"] == 1
    inside, given = ([value(a[n]).shape if n in a else None for n in ("expert", "token")] for a in made)
    k, V = config.num_experts_per_tok, config.vocab_size
    assert inside == [(V, k), (3,)] and given == [(3, k), None]


def test_choices_that_somebody_reads_are_made_apart():
    counts = found(DSV4Config.tiny(), 3, read=True)
    assert counts["experts"] == 0 and counts["router"] == counts["moe"] == counts["shared_expert"] == 1, counts


# On a GPU

needs_cutlass = pytest.mark.skipif(find_spec("cutlass") is None, reason="GPU kernels need CuTeDSL")


@needs_cutlass
@pytest.mark.parametrize(
    "target", ["sm_90a", "sm_100a"] if os.environ.get("DSV4_TEST_CONFIGS") == "all" else ["sm_90a"]
)
def test_it_compiles_without_a_gpu_and_does_not_spill(target, monkeypatch):
    from dsv4_compile.kernels import experts as kernel
    from dsv4_compile.kernels import stream

    monkeypatch.setattr(stream, "arch", lambda: target)
    shape = kernel.shape(1, 6, 24, 512, 256, "mxfp4", True, "bf16", 256, "fp8", True, False, False, 4)
    _, facts = kernel.KERNEL.build(shape, next(kernel.configs(shape)), target)
    assert len(facts["kernels"]) == 3 and all(k["stack"] == 0 for k in facts["kernels"].values()), facts


@needs_cutlass
def test_blocks_of_the_first_launch_have_alike_much_to_read():
    from dsv4_compile.kernels import experts as kernel
    from dsv4_compile.kernels import side_by_side

    for N, k in ((1, 6), (3, 6), (8, 6), (1, 1)):
        shape = kernel.shape(N, k, 256, 4096, 2048, "mxfp4", True, "bf16", 2048, "fp8", True, False, False, 4)
        config = next(kernel.configs(shape))
        each, many = side_by_side.blocks(shape.routed.up, shape.own, (config.up, config.own))
        assert each * N + many <= 132 and each > 0 and many > 0
        matrices = N * k * 2 * 2048 * 4096 * (4 + 8 / 32) / 8 + 2 * 2048 * 4096
        tiles = -(-shape.routed.up.tiles(config.up) // each)
        assert tiles * config.up.rows * 4096 * (4 + 8 / 32) / 8 < 1.1 * matrices / 132 + 128 * 4096


SIZES = [
    dict(N=1, k=6, X=24, D=4096, I=2048, H=2048),
    dict(N=1, k=1, X=33, D=64, I=32, H=96),
    dict(N=3, k=4, X=40, D=512, I=256, H=128),
    dict(N=8, k=6, X=64, D=1056, I=320, H=544),
]


WAYS = {"routed": dict(n=4), "chosen": dict(chosen=True), "table": dict(chosen=True, rows=50, n=4)}
WAYS_IN_TURN = "routed", "chosen", "table", "routed", "chosen"
STORED = [("none", "none"), ("mxfp4", "fp8"), ("fp8", "fp8"), ("nvfp4", "nvfp4"), ("mxfp4", "none")]
TRIED = [(sizes, way, "mxfp4", "fp8", "bf16") for sizes in SIZES for way in WAYS]  # three kernels each to compile
TRIED += [
    (SIZES[2], way, *stored, dtype)
    for way, stored in zip(WAYS_IN_TURN, STORED, strict=True)
    for dtype in ("bf16", "fp32")
]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("sizes", "way", "format", "own", "dtype"),
    TRIED,
    ids=lambda x: "x".join(map(str, x.values())) if isinstance(x, dict) else x,
)
def test_the_kernel_is_the_meaning(sizes, way, format, own, dtype, kernel_parity):
    # products are rounded before sums, which may cancel
    rtol, atol = (1e-2, 6e-2) if dtype == "bf16" else (1e-4, 1e-4)
    how = dict(format=format, own=own, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    args, others = (case(**sizes, **WAYS[way], **how, seed=s) for s in (0, 1))
    kernel_parity(experts, *args, others=others, rtol=rtol, atol=atol)


@pytest.mark.gpu
def test_a_vector_that_is_not_finite_spoils_its_own_row_only():
    args = [a.cuda() if isinstance(a, torch.Tensor) else a for a in case(N=3, k=2, X=12, D=512, I=256, H=256)]
    plain = experts(*args)
    args[0][1, 7] = float("nan")
    got = experts(*args)
    assert got[1].isnan().all() and torch.equal(got[[0, 2]], plain[[0, 2]])
