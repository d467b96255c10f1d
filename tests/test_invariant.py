"""`batch_invariant`: a token's bits in calls of 1 to 64 tokens; and without it, in calls of one size, whoever is beside it.

On a GPU: `pytest -m gpu tests/test_invariant.py`; kernels that the cache lacks are compiled first, in all processors. Without
one `DSV4_TEST_CONFIGS=all DSV4_ARCH=sm_90a` compiles them all, and looks at a whole decode step.
"""

import importlib.util
import os
import sys
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

if find_spec("cutlass") is None:
    pytest.skip("GPU kernels need CuTeDSL, which has wheels for Linux only", allow_module_level=True)

from dsv4_compile import tuning, warm
from dsv4_compile.kernel import STORE, Kernel, arch, collecting, trying
from dsv4_compile.kernels import attention, attention_wide, experts, gemv, linears, moe, shared_expert, stream
from dsv4_compile.kernels import division as of_kernels
from dsv4_compile.lowerings import gemv as products
from dsv4_compile.lowerings.linear import linear
from dsv4_compile.lowerings.linears import LINEARS
from dsv4_compile.reference_model import DSV4, DSV4Config, Loop, decode_step
from dsv4_compile.reference_model.schedule import CSA, HCA, SWA


def helper(name):
    """A file beside this one that holds no tests."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


_, generated, tokens, launches = (helper(name) for name in ("draws", "generated", "tokens", "launches"))
CASES, FORMATS, MOST = tokens.CASES, tokens.FORMATS, tokens.MOST
FAMILIES, Draw, build = generated.FAMILIES, generated.Draw, launches.build
bf16 = torch.bfloat16
ALL = os.environ.get("DSV4_TEST_CONFIGS") == "all"


@pytest.fixture
def alike(monkeypatch):
    """Inside, nothing depends on the number of tokens; `alike(False)`: it may."""

    def choose(on):
        monkeypatch.setattr(tuning.SETTINGS, "batch_invariant", on)

    choose(True)
    return choose


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setenv("DSV4_ARCH", "sm_90a")


# Divisions


def parts(shape, config):
    """(work, configuration) of each product of a launch."""
    if isinstance(shape, linears.Mixed):
        return [(shape.first.work, config.first), (shape.second.work, config.second)]
    if isinstance(shape, moe.Shape):
        return [(shape.up, config.up), (shape.down, config.down)]
    if isinstance(shape, experts.Shape):
        routed = parts(shape.routed, config)
        return [*routed, (shape.own, config.own), (shape.end.work, config.end)]
    return [(shape.work, config)]


def of_tokens(shape, count):
    if isinstance(shape, linears.Mixed):
        return linears.Mixed(of_tokens(shape.first, count), of_tokens(shape.second, count))
    if isinstance(shape, experts.Shape):
        return replace(shape, routed=of_tokens(shape.routed, count))
    return replace(shape, **{"N" if isinstance(shape, moe.Shape) else "M": count})


ONE = gemv.Shape(1, 1, 4096, 4096, "fp8", True, "bf16", "bf16")
QUERIES = linears.Shape(1, (32768, 8192), 1024, "fp8", True, "bf16", ("bf16", "bf16"), "fp32")
READERS = linears.Mixed(
    replace(QUERIES, rows=(1024, 512), K=4096, norm="none"),
    replace(QUERIES, rows=(1024, 64), K=4096, norm="none", format="bf16"),
)
SHARED = shared_expert.Shape(1, 4096, 2048, "fp8", True, "bf16", 4)
ROUTED = moe.Shape(1, 6, 256, 4096, 2048, "mxfp4", True, "bf16")
SHAPES = [
    *((gemv.KERNEL, replace(ONE, format=f)) for f in ("bf16", "fp8", "mxfp4", "nvfp4")),
    (gemv.KERNEL, replace(ONE, G=3, R=130, K=96, format="fp32", dtype="fp32", out="fp32")),
    (gemv.KERNEL, replace(ONE, R=7168, K=16448)),  # 8 vectors do not fit
    (linears.KERNEL, QUERIES),
    (linears.KERNEL, READERS),
    (shared_expert.KERNEL, SHARED),
    (moe.KERNEL, ROUTED),
    (moe.KERNEL, replace(ROUTED, D=192, I=64, X=24, k=4, format="nvfp4")),
    (experts.KERNEL, experts.shape(1, 6, 256, 4096, 2048, "mxfp4", True, "bf16", 2048, "fp8", True, False, False, 4)),
    (experts.KERNEL, experts.shape(1, 16, 40, 192, 64, "bf16", True, "bf16", 96, "mxfp4", True, True, True, 0)),
]


@pytest.mark.parametrize(("kernel", "shape"), SHAPES, ids=lambda x: getattr(x, "name", None) or str(x)[:60])
def test_all_that_tuning_may_choose_divides_alike(kernel, shape, alike, hopper):
    """And there is something to choose for each number of tokens up to the most that fit."""
    found, least = set(), []
    for count in range(1, 9) if ALL else (1, 3, 8):
        given = of_tokens(shape, count)
        candidates = kernel.candidates(given)
        found |= {tuple(of_kernels.division(*part) for part in parts(given, c)) for c in candidates}
        least += [len(candidates)]
    assert len(found) == 1 and least[0] > 0 and least == sorted(least, key=bool, reverse=True), (found, least)


def test_without_the_option_each_number_of_tokens_has_what_is_best_for_it(alike, hopper):
    alike(False)
    shapes = [replace(ONE, K=8192, format="mxfp4", M=M) for M in (1, 8)]
    best = [next(gemv.configs(shape)) for shape in shapes]
    assert all(c.chains == 1 and c.spread for c in best)
    assert len({of_kernels.division(s.work, c) for s, c in zip(shapes, best, strict=True)}) == 2


def test_what_one_process_chose_before_is_not_taken_for_it(alike, hopper, monkeypatch):
    kernel = Kernel("gemv", gemv.KERNEL.file, gemv.program, gemv.configs)
    monkeypatch.setattr(Kernel, "recorded", lambda *of: None)
    shape, chosen = replace(ONE, K=8192, format="mxfp4"), []
    for on in (False, True, False):
        alike(on)
        chosen.append(kernel.choice(shape))
    assert chosen[0] == chosen[2] and chosen[0].spread and not chosen[1].spread


class Sum(str):
    def __add__(self, other):
        return Sum("(" + str(self) + " " + str(other) + ")")


@pytest.mark.parametrize("chains", of_kernels.CHAINS)
def test_the_order_of_a_tree_does_not_depend_on_who_begins_it(chains):
    teams = 16 // chains
    begun = [stream.tree([Sum(c * teams + t) for c in range(chains)]) for t in range(teams)]
    assert stream.tree(begun) == stream.tree([Sum(i) for i in range(16)])


def test_products_are_taken_by_eights(alike):
    assert products.at_once(30, lambda n: n <= 8) == 8 and products.at_once(2, lambda n: n <= 3) == 3
    assert products.at_once(2, lambda n: n <= 16, 16) == 16 and products.at_once(30, lambda n: n <= 12, 16) == 12
    assert list(products.turns(19, 8)) == [(0, 8), (8, 8), (16, 3)] and products.few(torch.zeros(1), 64) is True
    alike(False)
    assert products.at_once(5, lambda n: n <= 8) == 5 and products.at_once(5, lambda n: n < 5) == 0
    assert products.at_once(30, lambda n: n <= 8) == 8 and products.at_once(30, lambda n: n < 8) == 0
    assert [products.at_once(n, lambda m: m <= 16, 16) for n in (7, 16, 17, 30, 40, 64)] == [7, 16, 9, 15, 14, 16]
    assert [products.at_once(n, lambda m: m <= 8, 16) for n in (7, 16, 17)] == [7, 8, 6]
    assert products.few(torch.zeros(1), 9) is not True and products.few(torch.zeros(1), 64, 9) is True
    assert products.few(torch.zeros(1), 65, 9) is not True


@pytest.mark.parametrize(
    ("count", "expected"), [(0, []), (5, [(0, 5)]), (8, [(0, 8)]), (19, [(0, 8), (8, 8), (11, 8)])]
)
def test_launches_of_one_call_take_as_many_tokens(count, expected, alike):
    """Each place in the batch has the same products, or its bits would depend on it: the last one computes some again."""
    alike(False)
    assert list(products.turns(count, 8)) == expected


def test_stored_weights_are_read_as_often_as_is_worth_it():
    bf16_, fp8 = (torch.empty(64, 256, dtype=t) for t in (torch.bfloat16, torch.float8_e4m3fn))
    mxfp4, scale = torch.empty(64, 128, dtype=torch.uint8), torch.empty(1)
    assert products.times((bf16_, None, False)) == 1 and products.times((bf16_.float(), None, True)) == 1
    assert [products.times(x) for x in ((bf16_, None, True), (fp8, scale, False), (mxfp4, scale, False))] == [5, 5, 9]
    assert products.times((fp8, scale, False), (bf16_, None, False)) == 2
    takes = [products.takes_fp32(*sides) for sides in ((bf16_, bf16_), (bf16_, bf16_.float()), (bf16_.float(), bf16_))]
    assert takes == [False, True, True], "as they are, if both sides are"


def test_many_vectors_are_launches_of_one_division(alike, hopper):
    from torch._subclasses.fake_tensor import FakeTensorMode

    def listed(op, *shapes):
        with FakeTensorMode(), collecting() as launches:
            made = [torch.empty(s, dtype=bf16, device="cuda") for s in shapes]
            op.run(*made, *[None] * 2) if op is linear else op.run(*made, 0, None, None)
        return launches

    for launches in (listed(linear, (19, 256), (40, 256)), listed(LINEARS[2], (19, 256), (40, 256), (24, 256))):
        assert [shape.M for _, shape, _ in launches] == [8, 8, 3]
        assert len({of_kernels.division(*part) for _, s, c in launches for part in parts(s, c)}) == 1


@pytest.mark.parametrize(("on", "expected"), [(True, [16, 16, 7]), (False, [13, 13, 13])])
def test_launches_that_multiply_stored_weights_take_sixteen_vectors(on, expected, alike, hopper):
    alike(on)
    given = tokens.counted("linear", 0, 1024, 2048, "fp8", bf16).given(39)
    launched = launches.launched_by(linear, given.values())
    assert [shape.M for _, shape, _ in launched] == expected and all(c.rows > stream.ROWS for *_, c in launched)
    assert len({of_kernels.division(*part) for _, s, c in launched for part in parts(s, c)}) == 1


def combinations(shape):
    """Configurations of a division that differ in what may differ, with several sums of a warp among them."""
    found = {}
    for n in (8, 1):
        for c in of_kernels.configs_of(shape.work.of(n)):
            key = n, c.rows, c.chains, c.blocks, c.resident > 1
            found.setdefault(key, (replace(shape, M=n), c))
    return list(found.values())


DIVIDED = gemv.Shape(1, 1, 1090, 2048, "fp8", True, "bf16", "fp32")


@pytest.mark.parametrize("format", FORMATS if ALL else ["bf16", "mxfp4"])
def test_it_compiles_without_a_gpu_and_does_not_spill(format, alike, hopper):
    each = combinations(replace(DIVIDED, format=format))
    assert len({c.chains for _, c in each}) > 1
    for shape, config in each if ALL else [max(each, key=lambda one: one[1].chains)]:
        _, facts = gemv.KERNEL.build(shape, config, "sm_90a")
        assert facts["kernels"] and all(k["stack"] == 0 for k in facts["kernels"].values()), (config, facts)


ROWS = attention.Shape(512, 64, True, False, 64)


def lists(count):
    """Configurations of attention in which blocks have one part of a list or two, best first for so many tokens."""
    found = {(c.splits, c.parts): c for c in reversed(attention.rank(ROWS, (count, 640)))}
    return list(found.values())


def test_attention_divides_its_lists_alike(alike):
    for entries, rows in ((False, 128), (True, 192), (True, 640), (True, 8320)):
        shape = replace(ROWS, entries=entries)
        found = [attention.rank(shape, (count, rows)) for count in (1, 8, 64)]
        assert len({c.division for each in found for c in each}) == 1
    assert {c.parts for c in lists(1)} == {1, 2} and lists(1) and attention.rank(ROWS, (8, 640))[0].parts == 2


def test_attention_by_warpgroups_divides_alike(alike):
    """And whoever is chosen is so for any number of tokens: for 640 rows warpgroups, which one token hardly costs more."""
    shape = attention_wide.Shape(**asdict(ROWS))
    for rows in (128, 640, 8320):
        found = [attention_wide.rank(shape, (count, rows)) for count in (1, 8, 64)]
        assert len({c.division for each in found for c in each}) == 1
        assert len({attention.wider(ROWS, (count, rows), True) for count in (1, 3, 8, 64)}) == 1
    assert attention.wider(ROWS, (1, 640), True) and not attention.wider(replace(ROWS, d=128), (8, 640), True)
    least = attention_wide.least(shape, (1, 640))
    alike(False)
    best = min(
        attention_wide.least(shape, (1, 640)), attention.estimate(ROWS, attention.rank(ROWS, (1, 640))[0], 1, 640)
    )
    assert least < 1.15 * best


def test_attention_in_parts_does_not_spill(alike, hopper):
    two = [c for c in lists(8) if c.parts == 2]
    for config in two if ALL else two[-1:]:
        _, facts = attention.KERNEL.build(ROWS, config, "sm_90a")
        assert all(k["stack"] == 0 for k in facts["kernels"].values()), (config, facts)


# A whole step


def small(stored):
    """A layer of each kind; every row a multiple of 16 bytes."""
    kinds = (SWA, CSA, HCA)
    formats = dict(linear_format="fp8", expert_format="mxfp4", mtp_expert_format="mxfp4") if stored else {}
    sizes = dict(hidden_size=128, moe_intermediate_size=64, q_lora_rank=64, o_lora_rank=32, o_groups=2)
    return DSV4Config.tiny().replace(
        num_hidden_layers=3,
        layer_types=kinds,
        mlp_layer_types=("hash_moe", "moe", "moe"),
        num_nextn_predict_layers=0,
        **sizes,
        **formats,
    )


ADDS = {"sum", "mean", "mm", "bmm", "addmm", "baddbmm", "dot", "mv", "cumsum", "var", "norm", "logsumexp", "softmax"}


@pytest.mark.skipif(not ALL, reason="half a minute: DSV4_TEST_CONFIGS=all")
@pytest.mark.parametrize("stored", [False, True], ids=["bf16", "stored"])
def test_nothing_but_our_kernels_adds_numbers_in_a_step(stored, alike, hopper):
    """And they are the same for one sequence and for many."""
    from dsv4_compile.config import Config
    from dsv4_compile.graphs.graph import head
    from dsv4_compile.lowerings import OPS
    from dsv4_compile.patterns import RULES

    class Seen(warm.Asking):
        def __call__(self, graph):
            super().__call__(graph)
            self.left = [head(n) for n in graph.nodes if n.op == "call_function"]

    def ops(batch):
        with torch.device("meta"):
            model = DSV4(small(stored)).to("meta", bf16).eval().requires_grad_(False)
        manager = Seen(Config(inner="eager", batch_invariant=True), RULES, OPS, warm.Survey())
        how = dict(backend=partial(warm.look, manager), dynamic=False, fullgraph=True)
        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(decode_step, **how)(model, Loop.start(model.new_state(batch, 64), 0))
        return [name for name in manager.left if name.startswith("dsv4.") or name.removeprefix("aten.") in ADDS]

    one = ops(1)
    assert {"dsv4.experts", "dsv4.attention", "dsv4.head", "dsv4.linears_7"} <= {*one}
    assert [n for n in one if not n.startswith("dsv4.")] == [] and one == ops(33)


# Ops, for many tokens and for some of them

BESIDE = {"shared_expert": 4}  # tokens of a call without the option, where 8 are more than the kernel takes
TRIED = [*((first, 1) for first in (0, 7, 8, 40, 63)), (5, 3), (20, 8), (30, 17)]  # tokens: the first, and how many


def test_every_op_with_a_kernel_is_among_them():
    """Or one that launches the same."""
    alike = (
        {f"linears_{n}" for n in range(2, 8)} | {f"prologue_{n}" for n in range(3)} | {"normed_linears_1", "mhc_head"}
    )
    assert set(FAMILIES) - {case.op.name for case in CASES.values()} <= alike


@pytest.mark.parametrize("name", CASES)
def test_what_belongs_to_single_tokens_is_known(name):
    case = CASES[name]
    made, other = case.given(17), case.given(5)
    assert case.of_tokens and all(made[n].shape[case.axis] == 17 for n in case.of_tokens)
    rest = [n for n, a in made.items() if torch.is_tensor(a) and n not in case.of_tokens]
    assert all(made[n].shape == other[n].shape for n in rest)


def differences(case, device):
    """Where a call for some tokens says something else than one for all of them; the results for all."""
    given = {n: a.to(device) if torch.is_tensor(a) else a for n, a in case.given().items()}
    many, found = results(case.op, given, device), []
    for first, count in TRIED:
        places = torch.arange(first, first + count, device=device)
        some = results(case.op, case.some(given, places), device)
        alike = (same(a.index_select(case.out, places), b) for a, b in zip(many, some, strict=True))
        found += [] if all(alike) else [(first, count)]
    return found


def results(op, given, device):
    """By the device's own implementation."""
    implementation, reasons = op.claim(given)
    assert implementation is not None and implementation.device == device, reasons
    made = op(**given)
    return made if isinstance(made, tuple) else (made,)


def same(a, b):
    """To the bit."""
    return a.shape == b.shape and torch.equal(*(x.contiguous().view(torch.uint8) for x in (a, b)))


@pytest.mark.parametrize("name", tokens.ON_A_CPU)
def test_on_a_cpu_what_runs_in_c_has_the_same_bits_too(name, alike):
    assert differences(tokens.ON_A_CPU[name], "cpu") == []


def launched():
    """What the tests below launch, as `warm` lists it."""
    found = {}

    def note(name, counts):
        for count in counts:
            for kernel, shape, config in launches.launched_by(CASES[name].op, CASES[name].given(count).values()):
                found[launches.wanted(kernel, shape, config)] = kernel

    before = tuning.SETTINGS.batch_invariant
    try:
        for on in (False, True):
            tuning.SETTINGS.batch_invariant = on
            for name in CASES:
                note(name, (MOST, 17, 8, 3, 1) if on else (BESIDE.get(name, 8),))
        for format in FORMATS:
            for shape, config in combinations(replace(DIVIDED, format=format)):
                found[launches.wanted(gemv.KERNEL, shape, config)] = gemv.KERNEL
        for config in lists(1):
            found[launches.wanted(attention.KERNEL, ROWS, config)] = attention.KERNEL
    finally:
        tuning.SETTINGS.batch_invariant = before
    return found


@pytest.mark.skipif(not ALL, reason="some minutes: DSV4_TEST_CONFIGS=all")
def test_all_that_they_launch_compiles_and_does_not_spill(hopper):
    wanted = launched()
    assert wanted and build(wanted) == []
    facts = {entry.key: entry.facts["kernels"] for entry in STORE.entries() if entry.key.kind == "object"}
    for one, kernel in wanted.items():
        found = facts[kernel.key(one.shape, one.config)]
        assert found is None or all(k["stack"] == 0 for k in found.values()), one


# On a GPU


@pytest.fixture(scope="session")
def compiled():
    assert build(launched()) == []


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_a_token_has_the_same_bits_in_calls_of_any_size(name, compiled, alike):
    assert differences(CASES[name], "cuda") == []


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_slots_and_neighbours_do_not_matter_in_calls_of_one_size(name, compiled, alike):
    """Each token alone among others, in another place."""
    alike(False)
    case, many = CASES[name], BESIDE.get(name, 8)
    drawn = (case.given(many, seed).items() for seed in (0, 1))
    given, others = ({n: a.cuda() if torch.is_tensor(a) else a for n, a in one} for one in drawn)
    want = results(case.op, given, "cuda")
    for place, slot in ((0, many - 1), (3, 0), (many - 2, many - 1), (2, 2)):
        mixed = dict(given)
        for n in case.of_tokens:
            mixed[n] = others[n].clone()
            mixed[n].select(case.axis, slot).copy_(given[n].select(case.axis, place))
        for a, b in zip(want, results(case.op, mixed, "cuda"), strict=True):
            assert same(a.select(case.out, place), b.select(case.out, slot)), (place, slot)


@pytest.mark.gpu
@pytest.mark.parametrize("format", FORMATS)
def test_configurations_of_a_division_give_the_same_bits(format, compiled, alike):
    each = combinations(replace(DIVIDED, format=format))
    R, K = DIVIDED.R, DIVIDED.K
    draw = Draw("division", 0, False)
    weight, scale, scale_2 = (None if t is None else t.cuda() for t in draw.stored(format, R, K))
    stored = products.words(weight), products.flat(scale), None if scale_2 is None else scale_2.view(1)
    x, found = draw.normal(1, 8, K, dtype=bf16).cuda(), []
    for shape, config in each:
        y = torch.full((1, shape.M, R), float("nan"), device="cuda")
        gemv.KERNEL.launcher(shape, config)(x[:, : shape.M].contiguous(), *stored, y, 0)
        found.append(y)
        assert same(y[0, 0], found[0][0, 0]), (config, each[0])
        assert same(y[0], found[0][0, : shape.M]), (config, each[0])
    wanted = linear.meaning(x[0].double(), *(weight.double() if scale is None else weight, scale, scale_2))
    assert (found[0][0].double() - wanted).norm() < 5e-3 * wanted.norm()


@pytest.mark.gpu
def test_attention_in_parts_gives_the_same_bits(compiled, alike, monkeypatch):
    monkeypatch.setattr(attention, "wider", lambda *of: False)
    case = tokens.attending(64, 128, 512)
    given = {n: a.cuda() if torch.is_tensor(a) else a for n, a in case.given(5).items()}
    found = []
    for config in lists(1):
        with trying({(attention.KERNEL, ROWS, (8, 640)): config}) as trial:
            found += results(case.op, given, "cuda")
        assert [*trial.seen] == [(attention.KERNEL, ROWS, (8, 640))]
        assert same(found[-1], found[0]), config
    torch.testing.assert_close(found[0], case.op.meaning(**given), rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("stored", [False, True], ids=["bf16", "stored"])
def test_a_sequence_alone_and_among_others_has_the_same_logits(stored, alike):
    """Compiled decode steps, over closed windows of all compressors."""
    config = small(stored)
    model = DSV4(config).to(bf16).cuda().eval().requires_grad_(False)
    wanted = {}
    for batch in (1, 5):
        wanted |= warm.survey(config, arch(), batch, [1], 64, bf16).wanted
    failed = []
    warm.build_all(wanted, arch(), 8, lambda w, _, error: failed.append(f"{w}: {error}") if error else None)
    assert failed == []
    text = torch.randint(0, config.vocab_size, (5, 40), device="cuda")

    @torch.no_grad()
    def logits(rows):
        torch._dynamo.reset()
        step = torch.compile(model, backend="dsv4", options={"mode": "decode", "batch_invariant": True}, fullgraph=True)
        state = model.new_state(len(rows), 64)
        return torch.stack([step(rows[:, t : t + 1], state).clone() for t in range(rows.shape[1])])

    many, alone = logits(text), logits(text[3:4])
    assert [t for t in range(len(alone)) if not same(alone[t, 0], many[t, 3])] == []
    assert alone.isfinite().all() and not same(many[0, 0], many[0, 3])
