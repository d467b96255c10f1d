"""Options: one meaning each, errors that name the fix."""

import pytest

from dsv4_compile.config import OPTIONS, Config, resolve
from dsv4_compile.errors import BadValue, UnknownName
from dsv4_compile.identity import identity

PASSES = ("raise.softmax", "raise.silu", "fuse.attention", "fuse.moe")


def read(options=None, mode=None, **environment):
    return resolve(options, mode, passes=PASSES, devices=("cuda", "cpu"), environment=environment)


def test_nothing_given_is_the_default():
    assert read() == Config()


@pytest.mark.parametrize("value", ["fuse.attention, raise.*", ["fuse.attention", "raise.*"]])
def test_disable_takes_globs(value):
    config = read({"disable": value})
    assert [p for p in PASSES if config.enabled(p)] == ["fuse.moe"]


def test_passes_selects_and_disable_beats_it():
    config = read({"passes": "fuse.*", "disable": "fuse.moe"})
    assert [p for p in PASSES if config.enabled(p)] == ["fuse.attention"]


def test_all_and_none():
    assert read({"passes": "all", "lowerings": "none"}) == Config(lowerings=())
    assert not read({"lowerings": "none"}).may_lower_to("cpu")
    assert read({"lowerings": "cpu"}).may_lower_to("cpu") and not read({"lowerings": "cpu"}).may_lower_to("cuda")


def test_every_option_has_a_variable_and_the_option_wins():
    values = {
        "passes": "raise.*",
        "disable": "fuse.moe",
        "lowerings": "cpu",
        "strict": "1",
        "explain": "true",
        "verify": "1",
        "regions": "0",
        "sites": "fuse.moe*",
        "inner": "eager",
        "mode": "decode",
        "capture": "1",
        "cudagraphs": "1",
        "diff": "fuse.moe,lower",
        "cache_dir": "reports",
        "autotune": "full",
        "batch_invariant": "1",
    }
    assert set(values) == set(OPTIONS)
    for name, value in values.items():
        assert read(**{f"DSV4_{name.upper()}": value}) == read({name: value}) != Config()
    assert read({"strict": False}, DSV4_STRICT="1") == Config()


def test_modes_are_presets_that_options_overrule():
    assert read(mode="debug") == Config(strict=True, explain=True, inner="eager")
    assert [read(mode=m).captures for m in ("decode", "prefill", None)] == [True, False, False]
    assert [read(mode=m).inductor_captures for m in ("decode", "prefill", None)] == [False, False, None]
    assert not read({"mode": "decode", "capture": 0}).captures
    trees = read({"mode": "decode", "cudagraphs": 1})
    assert trees.inductor_captures and not trees.captures
    assert read({"mode": "decode"}) == read(mode="decode") == read(DSV4_MODE="decode")
    assert read({"mode": "decode"}, DSV4_MODE="debug") == read(mode="decode", DSV4_MODE="debug") == read(mode="decode")
    assert not read({"strict": False}, mode="debug").strict
    assert not read(mode="debug", DSV4_STRICT="0").strict


@pytest.mark.parametrize(
    ("options", "mode", "message"),
    [
        ({"disabel": "x"}, None, r"unknown option 'disabel'; did you mean 'disable'\? Known: .*disable, explain"),
        ({"disable": "fuse.atention"}, None, r"unknown pass 'fuse.atention'; did you mean 'fuse.attention'\?"),
        ({"passes": ["fuse.x*"]}, None, r"unknown pass 'fuse.x\*'; did you mean"),
        ({"lowerings": "gpu"}, None, r"unknown lowering 'gpu'; did you mean .*Known: cpu, cuda"),
        ({"inner": "indctor"}, None, r"unknown inner 'indctor'; did you mean 'inductor'\?"),
        ({}, "decod", r"unknown mode 'decod'; did you mean 'decode'\?"),
        ({"mode": "decod"}, None, r"unknown mode 'decod'; did you mean 'decode'\?"),
        ({"diff": "lowr"}, None, r"unknown pass 'lowr'; did you mean 'lower'\?"),
    ],
)
def test_unknown_names_get_the_nearest(options, mode, message):
    with pytest.raises(UnknownName, match=message):
        read(options, mode)


@pytest.mark.parametrize(
    "options",
    [{"strict": "maybe"}, {"explain": 2}, {"disable": 3}, {"passes": [1]}, {"cudagraphs": 2}, {"cache_dir": 1}],
)
def test_unreadable_values(options):
    with pytest.raises(BadValue, match=f"option {next(iter(options))}=.*expected"):
        read(options)


def test_the_identity_follows_every_field():
    given = {
        "passes": "raise.*", "disable": "fuse.moe", "lowerings": "cpu", "strict": 1, "explain": 1, "inner": "eager",
        "verify": 1, "regions": 0, "sites": "*@layers.1*", "mode": "prefill", "diff": "lower",
    }  # fmt: skip
    identities = [
        identity(Config()),
        identity(read(mode="decode")),
        *(identity(read({k: v})) for k, v in given.items()),
    ]
    assert len(set(identities)) == len(identities)
    assert identity(Config()) == identity(read()) == identity(read({"cache_dir": "elsewhere"}))  # no path
