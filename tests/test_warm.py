"""Kernels that a model will launch are known, and built, without a GPU."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from typer.testing import CliRunner

from dsv4_compile import warm
from dsv4_compile.commands import cli
from dsv4_compile.op import capability
from dsv4_compile.reference_model import DSV4Config

pytest.importorskip("cutlass", reason="kernels are written in CuTeDSL")

from dsv4_compile.cache.store import Store
from dsv4_compile.kernel import collecting
from dsv4_compile.kernels import experts, router
from dsv4_compile.lowerings.linear import grouped_linear
from dsv4_compile.reference_model.schedule import CSA, HCA, SWA


def one_layer(**change) -> DSV4Config:
    fields = dict(num_hidden_layers=1, layer_types=(SWA,), mlp_layer_types=("moe",))
    return DSV4Config.tiny().replace(**fields, hc_sinkhorn_iters=2, num_nextn_predict_layers=0, **change)


def test_launches_are_listed_and_nothing_is_compiled():
    x = torch.zeros(3, 8)
    with collecting() as wanted:
        router.launch(x, x[0], torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2), 1.0, 0.0)
    assert [(k.name, shape) for k, shape, _ in wanted] == [("router", router.Shape(8, 2))]


def test_inputs_that_lie_apart_are_copied_without_a_gpu_too():
    """The heads of several tokens, as attention leaves them, are groups of wo_a."""
    x = torch.empty(3, 2, 64, dtype=torch.bfloat16).transpose(0, 1)
    arguments = grouped_linear.arguments(x, torch.empty(2 * 48, 64, dtype=torch.bfloat16)).values()
    with FakeTensorMode(), collecting() as wanted, warm.compiling_for("sm_90a"):
        grouped_linear.run(*map(warm.on_gpu, arguments))
    assert [(k.name, shape.M, shape.G) for k, shape, _ in wanted] == [("gemv", 3, 2)]


def test_a_survey_names_the_kernels_of_a_model_and_what_tuning_tries():
    config = one_layer(n_routed_experts=12, num_experts_per_tok=3, index_head_dim=64).replace(layer_types=(CSA,))
    e4m3 = torch.float8_e4m3fn
    found = warm.survey(config, "sm_90a", 1, [1], 64, torch.bfloat16, candidates=True, index_dtype=e4m3)
    assert not found.unknown, found.unknown
    shapes = {w.kernel: w.shape for w in found.wanted}
    assert {"mhc_boundary", "linears", "indexer", "experts"} <= shapes.keys()
    assert [c.entries for c in shapes["prologue"].compressors] == ["bf16", "fp8"], "that of the keys, and the indexer's"
    assert shapes["indexer"].keys == "fp8" and not {"compressor", "compressor_append"} & shapes.keys()
    each = {w.shape for w in found.wanted if w.kernel == "experts"}
    assert {(s.routed.X, s.routed.k) for s in each} == {(12, 3)}
    assert {s.streams for s in each} == {0, 4}, "of a body that layers share, and of layers written out"
    assert {w.shape.settled for w in found.wanted if w.kernel == "mhc_boundary"} == {False, True}
    tried = [w.config for w in found.wanted if w.shape == shapes["experts"]]
    assert tried == experts.KERNEL.candidates(shapes["experts"]) and len(tried) > 1


def test_of_a_state_with_keys_in_e4m3_one_kernel_writes_them_and_one_of_each_kind_reads_them():
    config = one_layer(index_head_dim=128, head_dim=512, qk_rope_head_dim=64).replace(layer_types=(CSA,))
    kept = dict(index_dtype=torch.float8_e4m3fn, kv_dtype=torch.float8_e4m3fn)
    found = warm.survey(config, "sm_90a", 1, [1], 64, torch.bfloat16, **kept)
    shapes = {w.kernel: w.shape for w in found.wanted}
    assert [c.entries for c in shapes["prologue"].compressors] == ["bytes", "fp8"] and shapes["indexer"].keys == "fp8"
    assert shapes["prologue"].keys.cache == "bytes" and "attention_stored" in shapes
    assert not {"attention", "compressor", "compressor_append"} & shapes.keys()


def test_layers_of_a_kind_are_looked_at_once():
    few = warm.one_of_each(DSV4Config.flash())
    assert few.layer_types == (SWA, CSA, HCA, CSA) and few.num_hidden_layers == 4
    assert few.mlp_layer_types == ("hash_moe", "hash_moe", "moe", "moe")
    assert few.replace(num_hidden_layers=43) != few and few.hidden_size == 4096
    assert warm.one_of_each(few) == few
    assert warm.one_of_each(few, 2).layer_types[:4] == (*[few.layer_types[0]] * 2, *[few.layer_types[1]] * 2)


def test_what_was_built_is_in_the_cache_and_is_not_built_again_and_what_was_not_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("DSV4_CACHE_DIR", str(tmp_path))
    shape = router.Shape(8, 2)
    good, bad = (
        warm.Wanted("dsv4_compile.kernels.router", "router", shape, c) for c in (next(router.configs(shape)), None)
    )
    told = []
    warm.build_all([good, bad, good], "sm_90a", 1, lambda *done: told.append(done))  # one after the other
    failed = next(done for done in told if done[0] is bad)
    assert sorted(done for done in told if done is not failed) == [(good, False, None), (good, True, None)]
    assert not failed[1] and isinstance(failed[2], Exception)
    assert Store(tmp_path).load(router.KERNEL.key(shape, good.config, "sm_90a"))


def test_the_architecture_asked_for_is_the_one_that_ops_are_claimed_for(monkeypatch):
    for name, expected in {"sm_90a": (9, 0), "sm_100a": (10, 0), "sm_80": (8, 0)}.items():
        monkeypatch.setenv("DSV4_ARCH", name)
        assert capability(torch.device("cuda")) == expected


def test_kernels_of_batch_invariant_are_asked_for(monkeypatch):
    seen = []
    monkeypatch.setattr(warm, "survey", lambda *given, **kept: seen.append(given) or warm.Survey())
    for given in ([], ["--invariant"]):
        assert CliRunner().invoke(cli.app, ["warm", *given]).exit_code == 0
    assert [given[-1] for given in seen] == [False, True]
