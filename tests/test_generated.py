"""Generated cases of every op that has a kernel: `DSV4_TEST_CASES=5000 pytest -m gpu tests/test_generated.py`; without it 200.

`DSV4_TEST_CASES=linear:17` is one case. Kernels that the cache lacks are compiled first, in all processors; without a GPU
`DSV4_TEST_CONFIGS=all DSV4_ARCH=sm_90a pytest -k launch` does that alone. On a CPU a few cases, by the CPU's implementations.
"""

import importlib.util
import os
import sys
from collections import Counter
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from dsv4_compile.lowerings import OPS
from dsv4_compile.lowerings.norm import rms_norm
from dsv4_compile.op import Implementation


def helper(name):
    """A file beside this one that holds no tests."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


_, generated, guards = (helper(name) for name in ("draws", "generated", "guards"))
FAMILIES = generated.FAMILIES
ASKED = os.environ.get("DSV4_TEST_CASES", "200")
OFTEN = {"attention": 4, "indexer": 2, "linear": 3, "moe": 2, "mhc_boundary": 2}  # more ways through these kernels
RANKED = "attention", "indexer"  # their best configuration depends on tokens and lengths
SHOWN = 20  # failures of an op
kernels = pytest.mark.skipif(find_spec("cutlass") is None, reason="GPU kernels need CuTeDSL")


def seeds(asked):
    """By op, the cases to try."""
    name, _, seed = asked.partition(":")
    if seed:
        return {name: [int(seed)]}
    parts = {name: OFTEN.get(name, 1) for name in FAMILIES}
    return {name: range(-(-int(asked) * part // sum(parts.values()))) for name, part in parts.items()}


def test_asked_are_at_least_so_many_cases():
    assert sum(map(len, seeds("5000").values())) >= 5000 and seeds("5000").keys() == FAMILIES.keys()
    assert all(len(s) >= 2 for s in seeds("200").values()) and seeds("linear:17") == {"linear": [17]}


def test_every_op_with_a_kernel_is_among_them():
    assert set(FAMILIES) == {op.name for op in OPS if any(i.device == "cuda" for i in op.implementations)}


def plain(arguments):
    """What nobody may read is NaN for kernels; the CPU reads it, times 0."""
    return {n: a.nan_to_num() if torch.is_tensor(a) and a.dtype in guards.PLAIN else a for n, a in arguments.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_cases_on_a_cpu(name):
    family = FAMILIES[name]
    for seed in (4, 5) if name == "attention" else (0, 1):  # few heads
        first, other = (plain(family.case(seed, other)) for other in (False, True))
        guards.check(family.op, family.right, first, other, "cpu", seed, family.terms(first))


@pytest.mark.parametrize("name", FAMILIES)
def test_both_sets_of_arguments_are_of_one_shape_and_differ(name):
    family = FAMILIES[name]
    for seed in (1, 3):
        first, other, again = family.case(seed), family.case(seed, True), family.case(seed)
        for a, b, c in zip(first.values(), other.values(), again.values(), strict=True):
            if torch.is_tensor(a):
                assert (a.shape, a.dtype) == (b.shape, b.dtype) and torch.equal(*map(guards.as_bytes, (a, c)))
            else:
                assert a == b == c
        tensors = {n: a for n, a in plain(first).items() if torch.is_tensor(a) and a.dtype in guards.PLAIN}
        drawn = [n for n, a in tensors.items() if a.count_nonzero() > 8]
        assert all(not torch.equal(first[n], other[n]) for n in drawn)


def test_lists_are_of_all_kinds_and_lengths():
    tiles = {n + d for n in (32, 64, 128) for d in (-1, 0, 1)}
    assert tiles | {0, 1} <= set(generated.LENGTHS) and set(range(65)) & set(generated.TOKENS) > {1, 3, 47, 64}
    kinds = Counter()
    for seed in range(60):
        lists = generated.Draw("lists", seed, False).among(40, 2, 3, 9)
        rows = lists.flatten(0, 1).tolist()
        kinds["all absent"] += bool((lists < 0).all())
        kinds["none absent"] += bool((lists >= 0).all())
        kinds["one list absent"] += sum(set(row) == {-1} for row in rows) == 1
        kinds["half is one row"] += all(row[::2] == [rows[0][0]] * 5 for row in rows) and rows[0][0] >= 0
        kinds["unequal"] += all(row == sorted(row, key=lambda i: i < 0) for row in rows) and -1 in rows[0]
    assert all(n > 3 for n in kinds.values()), kinds


def planted(fault):
    """A norm that has it."""
    calls = []

    def run(x, weight, eps):
        calls.append(x)
        want = rms_norm.meaning(x, weight, eps)
        out = torch.empty_like(x)
        out.copy_(want * 1.1 if fault == "off by" else want)
        if fault == "other bits":
            out.view(-1)[-1] += (len(calls) - 1) * 2.0**-20
        elif fault == "output out, the first run: off by inf":
            out.view(-1).as_strided((1,), (1,), out.storage_offset() + out.numel() - 1)[:] = float("nan")
        elif fault == "outside of what was allocated":
            out.as_strided((1,), (1,), out.storage_offset() + out.numel()).fill_(0)
        elif fault == "outside of the inputs":
            x.as_strided((1,), (1,), x.storage_offset() - 1).fill_(0)
        elif fault == "inputs were changed: weight":
            weight[0] += 1
        elif fault == "expected torch.float32":
            return out.double()
        return out

    return Implementation("cpu", None, lambda a: True, None, run)


FAULTS = "off by", "other bits", "output out, the first run: off by inf", "outside of what was allocated"
FAULTS += "outside of the inputs", "inputs were changed: weight", "expected torch.float32"


@pytest.mark.parametrize("fault", ["", *FAULTS])
def test_a_planted_fault_is_found(fault, monkeypatch):
    monkeypatch.setattr(rms_norm, "implementations", [planted(fault)])
    arguments = rms_norm.arguments(torch.randn(3, 36), torch.rand(36) + 0.5, 1e-6)

    def tried():
        return guards.check(rms_norm, lambda a: rms_norm.meaning(**a), arguments, arguments, "cpu", 1)

    if not fault:
        assert tried() == 0
        return
    with pytest.raises(AssertionError, match=fault):
        tried()


class Again:
    """In the place of a CUDA graph: it runs once more, into the memory of the first time."""

    def __init__(self, run, after):
        self.run, self.after, self.made = run, after, run()

    def replay(self):
        for out, new in zip(self.made[0], self.run()[0], strict=True):
            out.copy_(new)
        self.after(self.made)


@pytest.mark.parametrize("fault", ["", "at replay", "written outside"])
def test_replays_are_compared_with_what_is_right_of_the_other_numbers(fault, monkeypatch):
    def after(made):
        if fault == "at replay":
            made[0][0].mul_(1.1)
        elif fault:
            made[1][0].whole[3] = 0

    def captured(run):
        graph = Again(run, after)
        return graph, graph.made

    monkeypatch.setattr(guards, "captured", captured)
    monkeypatch.setattr(rms_norm, "implementations", [planted("")])
    family = FAMILIES["rms_norm"]
    trial = guards.Trial(rms_norm, family.right, "cpu", True)
    first, other = family.case(4), family.case(4, True)
    trial.in_a_row(first)
    if not fault:
        trial.replayed(first, other)
        return
    with pytest.raises(AssertionError, match=fault):
        trial.replayed(first, other)


def test_inputs_may_be_those_of_a_model():
    """What lies in a parameter is a part of one, which captured launches may read early."""
    for value in (torch.ones(2, 3), torch.ones(5, 4).to(torch.float8_e4m3fn)):
        given = guards.Given({"w": value}, "cpu", True)
        assert isinstance(given.values["w"]._base, torch.nn.Parameter) and not given.changed({"w": value})
        assert guards.intact(list(given.buffers.values()))


# What they launch


def launched(asked):
    """The kernels of these cases, as for a GPU; of each static size the first cases, unless much depends on the amount of
    work."""
    from dsv4_compile.kernel import Kernel
    from dsv4_compile.warm import variants

    launches, found = helper("launches"), {}
    with patch.object(Kernel, "candidates", cache(Kernel.candidates)):
        for name, numbers in asked.items():
            family = FAMILIES[name]
            for seed in numbers if name in RANKED else list(numbers)[: 3 * len(family.specs)]:
                for kernel, shape, config in launches.launched_by(family.op, family.case(seed).values()):
                    for variant in variants(shape):
                        found[launches.wanted(kernel, variant, config)] = kernel
    return found


def build(wanted):
    """See `launches`, which needs CuTeDSL."""
    return helper("launches").build(wanted)


@kernels
def test_their_kernels_are_known_without_a_gpu(monkeypatch):
    monkeypatch.setenv("DSV4_ARCH", "sm_90a")
    wanted = launched({"attention": [5, 8], "router": [1], "mhc_enter": [2]})
    assert {w.kernel for w in wanted} == {"attention", "attention_exact", "router", "mhc_boundary"}
    assert {w.shape.settled for w in wanted if w.kernel == "mhc_boundary"} == {False, True}


@kernels
@pytest.mark.skipif(os.environ.get("DSV4_TEST_CONFIGS") != "all", reason="some minutes: DSV4_TEST_CONFIGS=all")
def test_all_that_they_launch_compiles():
    wanted = launched(seeds(ASKED))
    assert build(wanted) == [] and wanted


# On a GPU


@pytest.fixture(scope="session")
def compiled(request):
    """The kernels of all families that were asked for."""
    those = (i for i in request.session.items if getattr(i, "originalname", "") == "test_cases_on_a_gpu")
    asked = {i.callspec.params["name"] for i in those}
    wanted = launched({name: numbers for name, numbers in seeds(ASKED).items() if name in asked})
    assert build(wanted) == []


@pytest.mark.gpu
@pytest.mark.parametrize("name", FAMILIES)
def test_cases_on_a_gpu(name, compiled, capsys):
    family, failed, worst, tried = FAMILIES[name], [], 0.0, seeds(ASKED).get(name, [])
    for seed in tried:
        try:
            with torch.no_grad():
                first, other = (family.case(seed, other) for other in (False, True))
                terms = family.terms(first)
                worst = max(worst, guards.check(family.op, family.right, first, other, "cuda", seed, terms))
        except Exception as error:
            said = str(error).partition("\n")[0]
            again = f"DSV4_TEST_CASES={name}:{seed} pytest -m gpu tests/test_generated.py"
            failed.append(f"{again}  # {type(error).__name__}: {said}")
            if "CUDA error" in said:  # nothing runs after it
                break
    with capsys.disabled():
        print(f"\n{name}: {len(tried)} cases, {len(failed)} failed, at most {worst:.2f} of the error allowed", end="")
    assert not failed, "\n".join([f"{len(failed)} of {len(tried)} cases", *failed[:SHOWN]])
