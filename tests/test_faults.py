"""Planted faults: verify refuses them, and bisect names those that change the model's output.

Every fault is tried by `verify`. A few are hunted by `bisect` in a model of all three kinds of layer; with
DSV4_TEST_FAULTS=all every one is, and pairs of them. Those of MTP, and pairs of faults that meet, have a smaller model.
"""

import importlib.util
import itertools
import math
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4_compile.accuracy.bisect import Bisection, Hunt
from dsv4_compile.accuracy.capture import Captured
from dsv4_compile.accuracy.metrics import logits
from dsv4_compile.config import Config
from dsv4_compile.lowerings import OPS
from dsv4_compile.passes import PassManager
from dsv4_compile.patterns import RULES
from dsv4_compile.reference_model import DSV4, DSV4Config
from dsv4_compile.reference_model.schedule import CSA, HCA, SWA
from dsv4_compile.reporting.report import Site


def loaded(name: str) -> Any:
    """Test files do not import each other: these hold no tests."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


faults = loaded("faults")
GENERAL = len(faults.FAULTS)
loaded("faults_in_bytes")

KINDS = (SWA, CSA, HCA)
CONFIG = Config(regions=False, inner="eager", lowerings=("cpu",))
THRESHOLD = 1e-4  # of logits up to about 4; all rewrites together are off by less than 1e-5
ALL = os.environ.get("DSV4_TEST_FAULTS") == "all"
E4M3 = torch.float8_e4m3fn  # of the indexer's keys
MTP = [f for f in faults.FAULTS if f.op == "mtp_join"]
IN_BYTES = faults.FAULTS[GENERAL:]
HERE = [f for f in faults.FAULTS[:GENERAL] if f not in MTP]  # in the larger model


@pytest.fixture(autouse=True)
def fresh():
    """In place of the fixture of that name for all tests: the captured model stays."""


LATEST: dict[Callable[[], Captured], tuple[Captured, list[Site]]] = {}


def current(make: Callable[[], Captured]) -> tuple[Captured, list[Site]]:
    """A captured model and its rewrites. To capture one makes Dynamo forget the other, so one is kept at a time."""
    if make not in LATEST:
        LATEST.clear()
        found = make()
        LATEST[make] = found, places(found)
    return LATEST[make]


@pytest.fixture
def captured() -> Captured:
    return current(larger)[0]


@pytest.fixture
def sites(captured: Captured) -> list[Site]:
    return current(larger)[1]


@pytest.fixture
def predicting() -> Captured:
    return current(with_mtp)[0]


def larger() -> Captured:
    """SWA, CSA and HCA, a hash router and learned ones, MXFP4 experts; no parameter at a value that hides a mistake. The
    tokens go into a state with room for all of them, so that they are written before they are read."""
    torch.manual_seed(0)
    config = DSV4Config.tiny().replace(
        num_hidden_layers=3,
        layer_types=KINDS,
        mlp_layer_types=("hash_moe", "moe", "moe"),
        hc_sinkhorn_iters=2,
        num_nextn_predict_layers=0,
        expert_format="mxfp4",
        moe_intermediate_size=64,
        swiglu_limit=1.0,
    )
    model = drawn(config)
    return Captured(model, (torch.randint(0, config.vocab_size, (2, 19)), model.new_state(2, 32, 18, E4M3)), {})


def drawn(config: DSV4Config) -> DSV4:
    model = DSV4(config).eval().requires_grad_(False)
    for p in model.parameters():
        if p.dtype == torch.float32 and bool((p == p.flatten()[0]).all()):
            p.add_(torch.randn_like(p) * 0.3)
    return model


def in_bytes() -> Captured:
    """One layer of HCA, whose keys are rows of bytes."""
    torch.manual_seed(0)
    config = DSV4Config.tiny().replace(
        num_hidden_layers=1,
        layer_types=KINDS[2:],
        mlp_layer_types=("moe",),
        hc_sinkhorn_iters=2,
        num_nextn_predict_layers=0,
    )
    model = drawn(config)
    state = model.new_state(2, 32, 18, kv_dtype=E4M3)
    return Captured(model, (torch.randint(0, config.vocab_size, (2, 19)), state), {})


class Predicts(torch.nn.Module):
    """The logits of MTP alone."""

    def __init__(self, model: DSV4):
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(tokens, mtp=True)[1]


def with_mtp() -> Captured:
    """One layer, and MTP."""
    torch.manual_seed(0)
    config = DSV4Config.tiny().replace(
        num_hidden_layers=1, layer_types=KINDS[:1], mlp_layer_types=("moe",), hc_sinkhorn_iters=2
    )
    return Captured(Predicts(drawn(config)), (torch.randint(0, config.vocab_size, (2, 9)),), {})


def places(captured: Captured) -> list[Site]:
    """All rewrites of the model as it is."""
    manager = PassManager(CONFIG, RULES, OPS)
    assert logits(captured.rewritten(manager), captured.plain) < THRESHOLD / 10
    (graph,) = manager.report.graphs
    return graph.sites


def needed(sites: list[Site], site: Site) -> list[str]:
    """A rewrite and those that it takes up."""
    parts = {s.id: s.absorbs for s in sites}
    found, todo = [], [site.id]
    while todo:
        found.append(todo.pop())
        todo.extend(parts[found[-1]])
    return found


def emitted(sites: list[Site], fault) -> Site:
    """The last place in the model where the op of a fault is emitted."""
    return next(s for s in reversed(sites) if (s.op, s.fusion) == (fault.op, fault.fusion))


def test_there_are_many_faults_and_every_op_has_some(sites):
    assert len(faults.FAULTS) >= 40
    assert {f.op for f in faults.FAULTS} >= {s.op for s in sites} | {"mtp_join"}


def test_verify_lets_every_right_rewrite_pass(captured, sites):
    manager = PassManager(replace(CONFIG, verify=True, strict=True), RULES, OPS)
    captured.rewritten(manager)
    report = manager.report
    assert [c for c in report.checks if c.reason] == [] and len(report.checks) == len(sites)


def rounds(sites: list[Site]) -> list[list]:
    """Faults that are planted at once, each in the first of the rounds that it fits into: none of them stands where another
    needs the right op."""
    by_id = {s.id: s for s in sites}
    reads = {f: {(by_id[i].op, by_id[i].layer) for i in needed(sites, emitted(sites, f))} for f in HERE}
    place = {f: (f.op, emitted(sites, f).layer) for f in HERE}
    together: list[list] = []
    for f in HERE:
        apart = (s for s in together if not any(place[f] in reads[g] or place[g] in reads[f] for g in s))
        some = next(apart, None)
        if some is None:
            together.append(some := [])
        some.append(f)
    return together


def test_verify_catches_the_faults(captured, sites):
    missed = [name for some in rounds(sites) for name in passed(captured, sites, some)]
    print(f"\nverify caught {len(HERE) - len(missed)} of {len(HERE)}; missed: {missed}")
    assert len(missed) <= 0.05 * len(HERE)


def passed(captured: Captured, sites: list[Site], some: list) -> list[str]:
    """Names of those among some faults, planted at once, that `verify` lets pass."""
    spots = {f: emitted(sites, f) for f in some}
    with ExitStack() as stack, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        wrong = [stack.enter_context(faults.planted(f, site.layer)) for f, site in spots.items()]
        chosen = tuple({i for site in spots.values() for i in needed(sites, site)})
        manager = PassManager(replace(CONFIG, verify=True, sites=chosen), RULES, (*OPS, *wrong))
        (slot,) = captured.slots
        slot.rewrite(manager)
    refused = {c.site for c in manager.report.mismatches}
    assert len(told) == len(refused) and all("does not compute the same" in str(w.message) for w in told)
    stand = [w for w in wrong if slot.now.find_nodes(op="call_function", target=w.target)]
    assert len(refused) + len(stand) == len(some)
    return [f.name for f, site in spots.items() if site.id not in refused]


def hunt(captured: Captured, plants: list[tuple[object, str]]) -> tuple[Bisection, list[Site]]:
    """What is found, and the wrong rewrites that move the logits alone."""
    with ExitStack() as stack:
        wrong = [stack.enter_context(faults.planted(f, layer)) for f, layer in plants]
        hunt = Hunt(captured, CONFIG, RULES, (*OPS, *wrong), logits, 500)
        found = hunt.run("logits", THRESHOLD)
        return found, [s for s in hunt.sites if s.op.startswith("fault_") and hunt.value([s.id]) > THRESHOLD]


def named(found: Bisection) -> list[Site]:
    return [s for g in found.guilty for s in g.sites]


def bound(found: Bisection) -> int:
    """Compiles that a search may take, the contributions of the members of a group included."""
    log = math.ceil(math.log2(found.sites))
    return sum(len(g.sites) * (log + 2) + (len(g.sites) if len(g.sites) > 1 else 0) for g in found.guilty) + 2


def check(captured: Captured, plants: list[tuple[object, str]], cancel: bool = False) -> Bisection:
    """Hunt, and hold what was found against what was planted: all that move the logits alone, unless some cancel."""
    found, guilty = hunt(captured, plants)
    for site in named(found):
        assert any(site.op.endswith(f.op) and site.layer == layer for f, layer in plants), f"{site} is innocent"
    if found.value > THRESHOLD:
        assert named(found) and (cancel or set(guilty) <= set(named(found))), f"{found}\nof {guilty}"
    assert found.rest <= THRESHOLD and found.compiles <= bound(found), found
    return found


BY_NAME = {f.name: f for f in faults.FAULTS}
SOME = [["moe: scales of the next block", "mhc_pre: comb transposed"]]


@pytest.mark.parametrize("names", SOME, ids=str)
def test_bisect_names_the_faults(captured, sites, names):
    plants = [(BY_NAME[n], emitted(sites, BY_NAME[n]).layer) for n in names]
    found = check(captured, plants)
    assert {(s.op.split("_", 2)[2], s.layer) for s in named(found)} == {(f.op, layer) for f, layer in plants}
    assert all(g.value > THRESHOLD for g in found.guilty)
    print(f"\n{found}\nbound: {bound(found)}")


def test_verify_catches_the_faults_of_mtp(predicting):
    sites = places(predicting)
    assert [name for fault in MTP for name in passed(predicting, sites, [fault])] == []


def test_verify_catches_the_faults_of_keys_in_bytes():
    captured, sites = current(in_bytes)
    assert [name for fault in IN_BYTES for name in passed(captured, sites, [fault])] == []


def test_bisect_names_faults_that_show_only_together(predicting):
    """As one group; neither would be found by rewriting one place at a time."""
    found = meeting(predicting, faults.ONLY_TOGETHER)
    assert [sorted(s.op.split("_", 2)[2] for s in g.sites) for g in found.guilty] == [["moe", "router"]]
    assert max(found.guilty[0].contribution) <= THRESHOLD < found.guilty[0].value
    print(f"\n{found}\nbound: {bound(found)}")


def meeting(captured: Captured, some, cancel: bool = False) -> Bisection:
    """Hunt for faults that are planted into the same layer."""
    sites = places(captured)
    plants = [(f, emitted(sites, f).layer) for f in some]
    found = check(captured, plants, cancel)
    print(f"\n{', '.join(f.name for f in some)}: {found.value:.1e}, {found.compiles} of {bound(found)} compiles")
    return found


if ALL:
    PAIRS = list(itertools.combinations(HERE[::5], 2))[::5]

    @pytest.fixture(params=["captured", "predicting"])
    def either(request) -> Captured:
        return request.getfixturevalue(request.param)

    def test_faults_that_cancel_are_no_fault(either):
        found = meeting(either, faults.CANCEL)
        assert found.value <= THRESHOLD and not found.guilty

    def test_bisect_names_faults_that_cancel_beside_another(either):
        other = BY_NAME["mhc_post: post forgotten"]
        found = meeting(either, (*faults.CANCEL, other), cancel=True)
        names = {s.op.split("_", 2)[2] for s in named(found)}
        assert names - {"router", "moe"} == {"mhc_post"}
        assert len(names) != 2  # of the two that cancel both or none

    def test_bisect_names_faults_that_show_only_together_in_the_larger_model(captured):
        found = meeting(captured, faults.ONLY_TOGETHER)
        assert [sorted(s.op.split("_", 2)[2] for s in g.sites) for g in found.guilty] == [["moe", "router"]]

    @pytest.mark.parametrize("fault", MTP, ids=lambda f: f.name)
    def test_bisect_names_every_fault_of_mtp(predicting, fault):
        found = meeting(predicting, [fault])
        assert len(named(found)) == (found.value > THRESHOLD)

    @pytest.mark.parametrize("fault", HERE, ids=lambda f: f.name)
    def test_bisect_names_every_fault_that_shows(captured, sites, fault):
        found = check(captured, [(fault, emitted(sites, fault).layer)])
        print(
            f"\n{fault.name}: {found.value:.1e}, {len(named(found))} named, {found.compiles} of {bound(found)} compiles"
        )

    @pytest.mark.parametrize("pair", PAIRS, ids=lambda p: " + ".join(f.name for f in p))
    def test_bisect_names_pairs_of_faults(captured, sites, pair):
        found = check(captured, [(f, emitted(sites, f).layer) for f in pair])
        print(f"\n{len(named(found))} named, {found.compiles} of {bound(found)} compiles")
