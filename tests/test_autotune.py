"""Autotuning without a GPU: an injected timer, a kernel that is a Python function, a clock that is told the time."""

import json
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import pytest
import torch

if find_spec("cutlass") is None:
    pytest.skip("GPU kernels need CuTeDSL, which has wheels for Linux only", allow_module_level=True)

from dsv4_compile import autotune, tuning
from dsv4_compile import kernel as base
from dsv4_compile.cache.store import Store
from dsv4_compile.config import resolve
from dsv4_compile.errors import DSV4Warning, UnknownName
from dsv4_compile.kernels import attention as kernel_of_attention
from dsv4_compile.kernels import router
from dsv4_compile.lowerings.attention import attention
from dsv4_compile.lowerings.norm import unit_norm
from dsv4_compile.op import Implementation
from dsv4_compile.passes import PassManager

ROWS = torch.randn(3, 8)


@dataclass(frozen=True)
class Size:
    D: int


@dataclass(frozen=True)
class Speed:
    """What the timer says about a configuration, in nanoseconds."""

    ns: int
    kind: str = "right"

    @property
    def us(self) -> float:
        return self.ns / 1000


@pytest.fixture
def settings(monkeypatch):
    """Settings of a process that has compiled nothing."""
    monkeypatch.setattr(tuning, "SETTINGS", tuning.Settings())
    return tuning.SETTINGS


@pytest.fixture
def toy(tmp_path, monkeypatch, settings):
    """toy(*speeds) -> a kernel of these configurations and an implementation of unit_norm that launches it."""
    monkeypatch.setattr(base, "STORE", Store(tmp_path))
    monkeypatch.setattr(tuning, "device", lambda: {"name": "a toy", "processors": 1})
    monkeypatch.setattr(base.Kernel, "recorded", lambda self, *of: tuning.recorded(base.STORE, self.record(*of)))

    def make(*speeds):
        kernel = base.Kernel("toy", router.__file__, lambda shape, config: (None, ()), lambda shape: iter(speeds))

        def launch(config):
            def run(x, out):
                if config.kind == "broken":
                    raise RuntimeError("does not start")
                latest.append(config)
                out.copy_(unit_norm.meaning(x, 1e-6) * (1.5 if config.kind == "wrong" else 1))

            return run

        for config in speeds:
            kernel.loaded[Size(8), config] = launch(config)

        def run(x, eps):
            out = torch.empty_like(x)
            kernel.launcher(Size(8), work=(4,))(x, out)
            return out

        return kernel, Implementation("cuda", None, None, None, run)

    latest = []
    make.latest = latest
    return make


@pytest.fixture
def timer(toy):
    """Says what the configuration that ran says of itself, and keeps how often it was asked for how many rounds."""

    def measured(call, inputs, rounds):
        call(*inputs[0])
        measured.asked.append((toy.latest[-1].us, rounds))
        return [toy.latest[-1].us / 1e6] * rounds

    measured.asked = []
    return measured


def arguments():
    return {"x": ROWS, "eps": 1e-6}


def test_the_fastest_is_found_kept_and_used(toy, timer, capfd):
    kernel, implementation = toy(Speed(5000), Speed(3000), Speed(4000))
    assert kernel.choice(Size(8), (4,)) == Speed(5000)
    (outcome,) = autotune.tune(unit_norm, implementation, arguments(), timer)
    assert outcome.choice == 1 and outcome.margin == pytest.approx(1 / 3)
    (line,) = capfd.readouterr().err.splitlines()
    assert "toy" in line and "3.00 us, the default 5.00 us" in line
    assert kernel.choice(Size(8), (4,)) == Speed(3000)
    assert kernel.choice(Size(8), (8,)) == Speed(5000)  # another class of work
    (entry,) = base.STORE.entries()
    trials = json.loads(base.STORE.load(entry.key))["trials"]
    assert [t["us"] for t in trials] == pytest.approx([5.0, 3.0, 4.0])


def test_what_is_in_the_cache_is_not_timed_again(toy, timer):
    _, implementation = toy(Speed(5000), Speed(3000))
    autotune.tune(unit_norm, implementation, arguments(), timer)
    timer.asked.clear()
    assert autotune.tune(unit_norm, implementation, arguments(), timer) == [] and not timer.asked
    again, _ = toy(Speed(5000), Speed(3000))  # as another process finds it
    assert again.choice(Size(8), (4,)) == Speed(3000)
    others, _ = toy(Speed(5000), Speed(3000), Speed(9000))  # other candidates: the record is not about them
    assert others.choice(Size(8), (4,)) == Speed(5000)


def test_a_compile_times_what_the_gpu_claims(toy, timer, rewritten, monkeypatch):
    kernel, implementation = toy(Speed(5000), Speed(3000))
    claim = lambda self, op, arguments: (implementation, []) if op is unit_norm else (None, [])  # noqa: E731
    monkeypatch.setattr(PassManager, "claim", claim)
    monkeypatch.setattr(autotune, "tune", partial(autotune.tune, timer=timer))

    def normed(x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) + 1

    for mode in ("cached", "full"):
        torch._dynamo.reset()
        result, _ = rewritten(normed, ROWS, autotune=mode)
        torch.testing.assert_close(result, normed(ROWS))
        assert bool(timer.asked) == (mode == "full")
    assert kernel.choice(Size(8), (4,)) == Speed(3000)


def test_wrong_and_broken_candidates_are_out_and_say_why(toy, timer):
    _, implementation = toy(Speed(5000), Speed(1000, "wrong"), Speed(2000, "broken"), Speed(4000))
    (outcome,) = autotune.tune(unit_norm, implementation, arguments(), timer)
    assert outcome.choice == 3
    assert "a wrong result" in outcome.trials[1].why and "does not start" in outcome.trials[2].why
    assert 1.0 not in [us for us, _ in timer.asked]  # rejected before it was timed


def test_where_nothing_works_the_default_stays(toy, timer):
    kernel, implementation = toy(Speed(5000), Speed(1000, "wrong"))
    launched = kernel.loaded
    launched[Size(8), Speed(5000)] = launched[Size(8), Speed(1000, "wrong")]
    (outcome,) = autotune.tune(unit_norm, implementation, arguments(), timer)
    assert outcome.choice == 0 and "nothing could be timed" in str(outcome)


def test_near_ties_go_to_the_earlier(toy, timer):
    _, implementation = toy(Speed(3050), Speed(3000), Speed(3200))
    assert autotune.tune(unit_norm, implementation, arguments(), timer)[0].choice == 0


def test_hopeless_candidates_get_a_first_look_only(toy, timer):
    _, implementation = toy(Speed(3000), Speed(30000), Speed(3500))
    autotune.tune(unit_norm, implementation, arguments(), timer)
    looks = {us: [rounds for u, rounds in timer.asked if u == us] for us in (3.0, 30.0, 3.5)}
    assert looks[30.0] == [autotune.QUICK] and looks[3.5] == looks[3.0] == [autotune.QUICK, autotune.ROUNDS]


def test_after_its_time_nothing_more_is_tried_but_the_default_always():
    clock = iter(range(0, 1000, 10)).__next__
    run = lambda config, x: x  # noqa: E731
    timed = lambda call, inputs, rounds: [1e-6] * rounds  # noqa: E731
    outcome = autotune.race([Speed(1000), Speed(2000), Speed(3000)], run, [(ROWS,)], lambda got: "", timed, 15.0, clock)
    assert [t.us is None for t in outcome.trials] == [False, False, True] and "no time" in outcome.trials[2].why


def test_off_takes_no_notice_of_the_cache(toy, timer, settings):
    kernel, implementation = toy(Speed(5000), Speed(3000))
    autotune.tune(unit_norm, implementation, arguments(), timer)
    settings.take("off", False)
    assert kernel.choice(Size(8), (4,)) == Speed(5000)
    settings.take("cached", False)
    assert kernel.choice(Size(8), (4,)) == Speed(3000)


@pytest.mark.parametrize("text", ["nonsense", "{}", '{"choice": 7}', '{"choice": "1"}'])
def test_a_record_that_makes_no_sense_is_put_aside(text, toy):
    kernel, _ = toy(Speed(5000), Speed(3000))
    base.STORE.save(kernel.record(Size(8), (4,)), text.encode())
    with pytest.warns(DSV4Warning, match="makes no sense"):
        assert kernel.choice(Size(8), (4,)) == Speed(5000)
    assert not list(base.STORE.entries())


def test_batch_invariant_kernels_are_divided_alike_for_any_number_of_tokens(settings):
    shape, rows = kernel_of_attention.Shape(512, 64, True, False, 0), tuning.rounded(640)
    counts = (1, 3, 64, 1000)
    ranked = lambda n: kernel_of_attention.rank(shape, (tuning.by_twos(n), rows))  # noqa: E731
    best = lambda: {ranked(n)[0].division for n in counts}  # noqa: E731
    assert len(best()) > 1
    settings.take("cached", True)
    assert len(best()) == 1 and {c.division for n in counts for c in ranked(n)} == best()
    assert ranked(1)[0] != ranked(8)[0], "blocks have what several have for fewer tokens"
    settings.take("cached", False)
    assert len(best()) == 1  # others in the process still rely on it


@pytest.mark.parametrize(("count", "want"), [(0, 1), (1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_classes_of_tokens_are_powers_of_two(count, want, settings):
    assert tuning.of_tokens(count) == want


@pytest.mark.parametrize(("count", "want"), [(0, 0), (1, 32), (128, 128), (640, 640), (641, 768), (1152, 1280)])
def test_classes_of_sizes(count, want):
    assert tuning.rounded(count) == want


def test_inputs_are_like_the_arguments_and_indices_stay_within():
    given = {
        "q": torch.zeros(2, 3, 4, 8).transpose(0, 1).to(torch.bfloat16),
        "keys": torch.zeros(3, 10, 8, dtype=torch.bfloat16),
        "window": torch.zeros(3, 2, 5, dtype=torch.int64),
        "sink": torch.zeros(4),
        "entries": None,
        "index": None,
        "scale": 0.5,
        "sink_on_window": False,
    }
    made = list(autotune.copies(attention, given))
    assert len(made) == autotune.MOST_COPIES
    for copy in made:
        for name, like in given.items():
            if isinstance(like, torch.Tensor):
                assert (copy[name].shape, copy[name].dtype) == (like.shape, like.dtype)
                assert copy[name].stride() == like.stride()
            else:
                assert copy[name] == like
        assert -1 <= copy["window"].min() and copy["window"].max() < 10
    assert made[0]["window"].ne(made[1]["window"]).any() and made[0]["q"].data_ptr() != made[1]["q"].data_ptr()


def test_long_tensors_repeat_their_rows(monkeypatch):
    monkeypatch.setattr(autotune, "DRAWN", 100)
    x = autotune.like(torch.zeros(7, 30, 8), None, torch.Generator().manual_seed(0), {})
    assert x.shape == (7, 30, 8) and x.unique().numel() <= 104 and (x != 0).all()


def test_an_unknown_way_to_tune_is_refused():
    with pytest.raises(UnknownName, match="full"):
        resolve({"autotune": "ful"}, passes=(), devices=(), environment={})


# On a GPU


@pytest.mark.gpu
def test_attention_is_tuned_and_stays_right(tmp_path, monkeypatch, settings):
    monkeypatch.setattr(base, "STORE", Store(tmp_path))
    monkeypatch.setattr(autotune, "BUDGET", 6.0)
    q, keys = (torch.randn(2, 1, *s, device="cuda").bfloat16() for s in ((4, 64), (64,)))
    keys = keys.expand(2, 50, 64).contiguous()
    window = torch.randint(0, 50, (2, 1, 40), device="cuda")
    args = q, keys, window, torch.zeros(4, device="cuda"), None, None, 0.125, False
    given = attention.arguments(*args)
    implementation, _ = attention.claim(given)
    (outcome,) = autotune.tune(attention, implementation, given)
    assert outcome.trials[outcome.choice].us > 0
    torch.testing.assert_close(attention(*args), attention.meaning(*args), rtol=2e-2, atol=2e-2)
