"""The five fusions in whole models: every site is found, and any of them may be switched off."""

import copy
import itertools
from functools import partial

import pytest
import torch
import torch._inductor.config as inductor_config

import dsv4_compile
from dsv4_compile.backend import backend, build
from dsv4_compile.config import Config, resolve
from dsv4_compile.errors import DSV4Warning
from dsv4_compile.lowerings import OPS
from dsv4_compile.op import DEVICES
from dsv4_compile.passes import PassManager
from dsv4_compile.patterns import RULES
from dsv4_compile.reference_model import DSV4, DSV4Config, load
from dsv4_compile.reference_model.nano import CHECKPOINT

FUSIONS = ("attention", "compressor", "mhc", "moe", "router")
KINDS = ("sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention")


def small(kinds=KINDS[1:2], routers=("moe",), **change) -> DSV4:
    """tiny with few layers and few Sinkhorn iterations: what costs time when a graph is captured."""
    fields = dict(
        num_hidden_layers=len(kinds),
        layer_types=kinds,
        mlp_layer_types=routers,
        hc_sinkhorn_iters=2,
        num_nextn_predict_layers=0,
    )
    torch.manual_seed(0)
    return DSV4(DSV4Config.tiny().replace(**(fields | change))).eval().requires_grad_(False)


def tokens_for(model: DSV4, length: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))


def all_found(report) -> None:
    assert report.sites and {f: report.counts[f] for f in FUSIONS} == dict(report.sites), report


@pytest.mark.parametrize("name", ["nano", "tiny"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_every_site_of_the_real_models_is_found(name, phase):
    if name == "nano":
        model = load(CHECKPOINT)  # bf16, FP8 linears, MXFP4 experts
    else:
        torch.manual_seed(0)
        model = DSV4(DSV4Config.tiny()).eval().requires_grad_(False)
    if phase == "prefill":
        report = dsv4_compile.explain(model, tokens_for(model, 40))
    else:
        state = model.new_state(2, 64)
        report = dsv4_compile.explain(model, tokens_for(model, 1), state)
        assert state.position.tolist() == [0, 0]  # the caller's state is untouched
    all_found(report)


VARIANTS = {
    "sink on the window": dict(sink_mode="swa_scale"),
    "three streams": dict(hc_mult=3),
    "one Sinkhorn iteration": dict(hc_sinkhorn_iters=1),
    "one expert": dict(num_experts_per_tok=1),
    "nvfp4": dict(expert_format="nvfp4", moe_intermediate_size=32),
    "fp8": dict(linear_format="fp8", expert_format="fp8"),
}


@pytest.mark.parametrize("change", VARIANTS.values(), ids=VARIANTS)
def test_every_site_of_a_variant_is_found(change):
    model = small(KINDS, ("hash_moe", "moe", "moe"), **change)
    all_found(dsv4_compile.explain(model, tokens_for(model, 19)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("length", [1, 19])
def test_every_site_is_found_in_every_dtype(dtype, length):
    model = small(KINDS, ("hash_moe", "moe", "moe")).to(dtype)
    all_found(dsv4_compile.explain(model, tokens_for(model, length, batch=1), model.new_state(1, 32)))


@pytest.fixture(scope="module")
def captured():
    """One CSA layer has all five fusions: the graphs that Dynamo hands over, to be compiled 32 times, and eager logits."""
    model, found = small(), {}
    torch._dynamo.reset()
    for phase, length in (("prefill", 19), ("decode", 1)):

        def keep(gm, inputs, phase=phase):
            found[phase] = copy.deepcopy(gm), inputs
            return gm.forward

        state = model.new_state(2, 32)
        with torch.no_grad():
            torch.compile(model, backend=keep, fullgraph=True, dynamic=False)(tokens_for(model, length), state)
    return found


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_all_32_combinations_give_the_same_logits(captured, phase):
    gm, inputs = captured[phase]
    with torch.no_grad():
        want = copy.deepcopy(gm)(*copy.deepcopy(inputs))
    found = {}
    for off in itertools.chain.from_iterable(itertools.combinations(FUSIONS, n) for n in range(len(FUSIONS) + 1)):
        options = {"inner": "eager", "strict": True, "disable": ",".join(f"fuse.{f}" for f in off)}
        config = resolve(options, None, passes={r.name for r in RULES}, devices=DEVICES)
        manager = PassManager(config, RULES, OPS)
        with torch.no_grad():
            got = build(copy.deepcopy(gm), inputs, manager)(*copy.deepcopy(inputs))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda m, off=off: f"without {off}: {m}")
        on = {f for f in FUSIONS if manager.report.counts[f]}
        assert on == set(FUSIONS) - set(off)
        found[off] = manager.report.counts
    assert len(found) == 32


@pytest.mark.parametrize("how", ["option", "variable", "glob"])
def test_ways_to_switch_a_fusion_off(how, monkeypatch):
    model = small()
    options = {"option": {"disable": "fuse.moe,fuse.router"}, "glob": {"disable": "fuse.mo?, fuse.rout*"}}.get(how, {})
    if how == "variable":
        monkeypatch.setenv("DSV4_DISABLE", "fuse.moe,fuse.router")
    reports = []
    compiled = torch.compile(
        model, backend=partial(backend, options={"inner": "eager"} | options, observe=reports.append)
    )
    x = tokens_for(model, 9)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    counts = reports[0].counts
    assert counts["moe"] == counts["router"] == 0 and counts["attention"] == 1 and counts["mhc"] == 5


def test_trainable_parameters_fuse_when_generating_and_keep_their_gradients_otherwise():
    model, reports = small().requires_grad_(True), []
    compiled = torch.compile(model, backend=partial(backend, options={"inner": "eager"}, observe=reports.append))
    x = tokens_for(model, 9)
    state = model.new_state(2, 32)
    got = compiled(x, state)
    torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-4)
    assert reports[0].counts["moe"] == 1 and not got.requires_grad and not state.layers[0].kv.requires_grad
    with pytest.warns(DSV4Warning, match="gradients"):
        loss = compiled(x).square().mean()
    (grad,) = torch.autograd.grad(loss, model.embed.weight)
    (want,) = torch.autograd.grad(model(x).square().mean(), model.embed.weight)
    assert reports[1].counts["moe"] == 0
    torch.testing.assert_close(grad, want, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("length", [1, 19])
def test_inductor_compiles_what_the_passes_leave(length):
    model = small()
    x, eager_state, state = tokens_for(model, length), model.new_state(2, 32), model.new_state(2, 32)
    with inductor_config.patch(force_disable_caches=True):
        compiled = torch.compile(model, backend="dsv4", fullgraph=True, dynamic=False)
        for _ in range(2):
            torch.testing.assert_close(compiled(x[:, :16], state), model(x[:, :16], eager_state), rtol=1e-4, atol=1e-4)
    for a, b in zip(state.layers, eager_state.layers, strict=True):
        torch.testing.assert_close(a.kv, b.kv, rtol=1e-4, atol=1e-4)
    assert state.position.tolist() == eager_state.position.tolist()


def test_options_are_part_of_the_identity():
    a, b = (PassManager(Config(disable=d), RULES, OPS).uuid() for d in ((), ("fuse.moe",)))
    assert a != b
