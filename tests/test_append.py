"""Cache writes: the ops against a loop, found in models, and written in place by whoever claims them."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._inductor.utils import run_and_get_code

from dsv4_compile.backend import backend
from dsv4_compile.errors import BadOp
from dsv4_compile.lowerings.append import append, norm_rope_append
from dsv4_compile.lowerings.rope import norm_rope
from dsv4_compile.op import Tensor, op
from dsv4_compile.reference_model.layers import put, rms_norm, rope

EPS = 1e-3


def drawn(B=2, S=9, T=3, C=10, dtype=torch.float32, seed=0):
    """Ring, slots and rows."""
    g = torch.Generator().manual_seed(seed)
    slot = torch.rand(B, S, generator=g).argsort(-1)[:, :T]
    return torch.randn(B, S, C, generator=g).to(dtype), slot, torch.randn(B, T, C, generator=g)


def prologue(B=2, S=9, T=3, dtype=torch.float32, seed=0):
    """Arguments of `norm_rope_append`: 10 channels, 6 of them rotary."""
    ring, slot, x = drawn(B, S, T, dtype=dtype, seed=seed)
    angle = torch.randn(B, T, 3, generator=torch.Generator().manual_seed(seed))
    return ring, slot, x, 1 + torch.randn(10) / 5, EPS, angle.cos(), angle.sin()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 7), st.integers(0, 7), st.booleans(), st.integers(0, 99))
def test_the_op_says_what_a_loop_says(B, S, T, narrow, seed):
    ring, slot, rows = drawn(B, S, min(S, T), dtype=torch.bfloat16 if narrow else torch.float32, seed=seed)
    want, before = ring.clone(), ring.clone()
    for b in range(B):
        for t, s in enumerate(slot[b].tolist()):
            want[b, s] = rows[b, t].to(ring.dtype)
    for run in (append, append.meaning):
        assert torch.equal(run(ring, slot, rows), want) and torch.equal(ring, before)


def test_the_whole_prologue():
    ring, slot, x, weight, eps, cos, sin = args = prologue()
    want = append(ring, slot, norm_rope(x, weight, eps, cos, sin))
    for run in (norm_rope_append, norm_rope_append.meaning):
        torch.testing.assert_close(run(*args), want)


@pytest.mark.parametrize(
    "target, args", [(append, drawn()), (norm_rope_append, prologue())], ids=["append", "prologue"]
)
def test_the_op_that_writes(target, args):
    want = target(*args)
    torch.library.opcheck(target.target, args)
    torch.library.opcheck(target.writing_target, args)
    given = args[0].clone()
    assert target.writing_target(given, *args[1:]) is None
    torch.testing.assert_close(given, want)


def test_what_cannot_be_written_in_place_is_said():
    @op("dsv4::two_of_one", outputs=("a", "b"))
    def two(x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, x + 2

    with pytest.raises(BadOp, match="as many tensor arguments"):
        two.on("cpu", in_place="x")
    strided = drawn()[0].transpose(1, 2)
    implementation = append.implementations[0]
    verdict = implementation.accepts(dict(ring=strided, slot=None, rows=None), torch.device("cpu"), False)
    assert verdict == "ring is not contiguous"


# In graphs


class Cache(torch.nn.Module):
    """Two caches, written and read by each step; sizes that nothing else has."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.register_buffer("ring", torch.zeros(2, 37, 10, dtype=dtype))
        self.register_buffer("pool", torch.zeros(2, 41, 10, dtype=dtype))
        self.weight = torch.nn.Parameter(1 + torch.randn(10) / 5, requires_grad=False)

    def forward(self, x, position, cos, sin):
        put(self.ring, position % 37, rope(rms_norm(x, self.weight, EPS), cos, sin))
        put(self.pool, position // 2, 2 * x)
        return (self.ring.float().sum(1) + self.pool.float().sum(1)) * x[:, 0]


class Layer(Cache):
    @torch.compiler.nested_compile_region
    def forward(self, x, position, cos, sin):
        return Cache.forward(self, x, position, cos, sin)


class Stack(torch.nn.Module):
    """Two layers, one body."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x, position, cos, sin):
        for layer in self.layers:
            x = x + layer(x, position, cos, sin).unsqueeze(1) / 100
        return x


def step(position, B=2, T=1):
    angle = torch.full((B, T, 3), 0.1 * position)
    g = torch.Generator().manual_seed(position)
    return torch.randn(B, T, 10, generator=g), torch.full((B, T), position), angle.cos(), angle.sin()


def compiled(module, reports, **options):
    chosen = {"strict": True, "lowerings": "c*"} | options
    return torch.compile(module, backend=partial(backend, options=chosen, observe=reports.append), fullgraph=True)


@pytest.mark.parametrize(
    "kind, options",
    [
        (Cache, {}),
        (Cache, {"inner": "eager"}),
        (Cache, {"lowerings": "cuda"}),
        (Stack, {}),
        (Stack, {"inner": "eager"}),
        (Stack, {"regions": "0"}),
    ],
    ids=str,
)
def test_steps_write_in_place(kind, options):
    """Twice around the rings: no recompile, no cache moved, none allocated."""
    torch.manual_seed(0)
    module, plain, reports = kind().eval(), kind().eval(), []
    plain.load_state_dict(module.state_dict())
    caches = list(module.buffers())
    memory = [t.data_ptr() for t in caches]
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        run = compiled(module, reports, **options)
        with torch._inductor.config.patch(force_disable_caches=True):
            got, code = run_and_get_code(run, *step(0))
        torch.testing.assert_close(got, plain(*step(0)))
        for position in range(1, 76):
            torch.testing.assert_close(run(*step(position)), plain(*step(position)), rtol=1e-4, atol=1e-4)
    assert memory == [t.data_ptr() for t in caches] and len(reports) == 1
    for cache, want in zip(caches, plain.buffers(), strict=True):
        torch.testing.assert_close(cache, want)
    layers = len(caches) // 2
    assert (reports[0].counts["append"], reports[0].counts["keys"]) == (2 * layers, layers)
    claimed = options.get("lowerings") != "cuda"  # else the plain writes come back
    assert {by == "cpu" for op, by in reports[0].runs if op.endswith("append")} == {claimed}
    assert ("inner" in options) == (not code)
    made = allocations("\n".join(code))
    assert "(2, 37, 10)" not in made and "(2, 41, 10)" not in made
    assert not code or any("dsv4.norm_rope_append_.default" in text for text in code) == claimed


def allocations(code: str) -> str:
    return "\n".join(line for line in code.splitlines() if "empty_strided" in line and " = " in line)


def test_a_cache_that_is_still_read_is_copied(rewritten):
    """Functional: what is asked for is a new cache beside the old one."""
    ring, slot, rows = drawn()

    def f(ring, slot, rows):
        new = ring.index_put((torch.arange(2).unsqueeze(1), slot), rows)
        return new, ring * 2

    for inner in ("eager", "inductor"):
        torch._dynamo.reset()
        (new, old), report = rewritten(f, ring, slot, rows, inner=inner)
        assert report.counts["append"] == 1
        torch.testing.assert_close(new, f(ring, slot, rows)[0])
        torch.testing.assert_close(old, drawn()[0] * 2)
        assert torch.equal(ring, drawn()[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [1, 3])
def test_one_write_of_rows_that_are_cast(T, dtype, rewritten):
    def f(ring, slot, rows):
        put(ring, slot, rows * 1.5)
        return ring + 1

    ring, slot, rows = drawn(T=T, dtype=dtype)
    mine = ring.clone()
    got, report = rewritten(f, mine, slot, rows)
    assert report.counts["append"] == 1
    torch.testing.assert_close(got, f(ring, slot, rows))
    torch.testing.assert_close(mine, ring)


WRITES = {  # of rows for all sequences at the same slots
    "index_copy": lambda ring, slot, rows: ring.index_copy_(1, slot, rows),
    "by index": lambda ring, slot, rows: ring.__setitem__((slice(None), slot), rows),
    "by scattering": lambda ring, slot, rows: ring.scatter_(1, slot.view(1, -1, 1).expand(rows.shape), rows),
}


@pytest.mark.parametrize("name", WRITES)
def test_static_caches_raise(name, rewritten):
    """One list of slots for all rows of the batch."""

    def f(ring, slot, x, weight, cos, sin):
        WRITES[name](ring, slot, rope(rms_norm(x, weight, EPS), cos, sin))
        return ring + 1

    ring, slot, x, weight, _, cos, sin = prologue()
    mine, args = ring.clone(), (slot[0], x, weight, cos, sin)
    got, report = rewritten(f, mine, *args)
    assert report.runs == {("norm_rope_append", "cpu"): 1}
    torch.testing.assert_close(got, f(ring, *args))
    torch.testing.assert_close(mine, ring)


def accumulated(ring, slot, rows):
    return ring.index_put((torch.arange(2).unsqueeze(1), slot), rows, accumulate=True)


def other_batch(ring, slot, rows):
    return ring.index_put((1 - torch.arange(2).unsqueeze(1), slot), rows)


def whole_batch(ring, slot, rows):
    return ring.index_put((torch.arange(2), slot[:, 0]), rows[:, 0])


@pytest.mark.parametrize("f", [accumulated, other_batch, whole_batch])
def test_other_writes_stay(f, rewritten):
    args = drawn()
    got, report = rewritten(f, *args)
    assert report.counts["append"] == 0
    torch.testing.assert_close(got, f(*args))


# On a GPU


def keys_of(B, T, S, d, dr, dtype, ring_dtype, shared, seed=0):
    """Arguments of the prologue, on the GPU."""
    g = torch.Generator().manual_seed(seed)
    angle = torch.randn(1 if shared else B, T, dr // 2, generator=g)
    ring, x = torch.randn(B, S, d, generator=g).to(ring_dtype), torch.randn(B, T, d, generator=g).to(dtype)
    slot = torch.rand(B, S, generator=g).argsort(-1)[:, :T]
    return ring, slot, x, 1 + torch.randn(d, generator=g) / 5, EPS, angle.cos(), angle.sin()


@pytest.mark.gpu
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("B", "T", "S", "d", "dr"), [(1, 1, 128, 512, 64), (3, 2, 9, 64, 16), (2, 5, 5, 20, 6)])
def test_the_kernel_writes_normed_and_turned_rows(B, T, S, d, dr, dtype, shared, kernel_parity):
    tolerance = dict(rtol=1e-2, atol=1e-2) if dtype == torch.bfloat16 else dict(rtol=1e-5, atol=1e-5)
    args, others = (keys_of(B, T, S, d, dr, dtype, dtype, shared, seed) for seed in (0, 1))
    kernel_parity(norm_rope_append, *args, others=others, **tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_the_kernel_writes_in_place_and_nothing_else(dtypes):
    args = [a.cuda() if isinstance(a, torch.Tensor) else a for a in keys_of(3, 2, 11, 64, 16, *dtypes, False)]
    ring, slot, *rest = args
    before, want = ring.clone(), norm_rope_append.meaning(*args)
    norm_rope_append.writing_target(ring, slot, *rest)
    torch.testing.assert_close(ring, want, rtol=1e-2, atol=1e-2)
    others = torch.ones(3, 11, dtype=torch.bool, device="cuda").scatter(1, slot, False)
    assert torch.equal(ring[others], before[others])
