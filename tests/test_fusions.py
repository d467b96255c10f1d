"""The five fusions in whole models: every site is found, and any of them may be switched off."""

import copy
import os
from functools import partial

import pytest
import torch
import torch._inductor.config as inductor_config
from functorch.compile import make_boxed_func
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass

import dsv4_compile
from dsv4_compile.backend import backend
from dsv4_compile.config import Config, resolve
from dsv4_compile.errors import DSV4Warning
from dsv4_compile.lowerings import OPS
from dsv4_compile.op import DEVICES
from dsv4_compile.passes import PassManager
from dsv4_compile.patterns import RULES
from dsv4_compile.reference_model import DSV4, DSV4Config, load
from dsv4_compile.reference_model.model import Block
from dsv4_compile.reference_model.nano import CHECKPOINT
from dsv4_compile.reference_model.schedule import CSA, HCA, SWA

FUSIONS = ("attention", "compressor", "mhc", "moe", "router")
KINDS = (SWA, CSA, HCA)


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
    assert report.sites and {f: report.counts[f] for f in report.sites} == dict(report.sites), report
    assert report.unexplained == []


REAL = [("nano", "prefill"), ("nano", "decode")]
REAL += [("tiny", "prefill"), ("tiny", "decode")] if os.environ.get("DSV4_TEST_COVERAGE") == "all" else []


@pytest.mark.parametrize(("name", "phase"), REAL)
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


VARIANTS = {  # where a model has several, each concerns fusions of its own
    "sink on the window, three streams, one expert": dict(sink_mode="swa_scale", hc_mult=3, num_experts_per_tok=1),
    "one Sinkhorn iteration, nvfp4": dict(hc_sinkhorn_iters=1, expert_format="nvfp4", moe_intermediate_size=32),
    "fp8": dict(linear_format="fp8", expert_format="fp8"),
}


@pytest.mark.parametrize("change", VARIANTS.values(), ids=VARIANTS)
def test_every_site_of_a_variant_is_found(change):
    model = small(KINDS, ("hash_moe", "moe", "moe"), **change)
    all_found(dsv4_compile.explain(model, tokens_for(model, 19)))


@pytest.mark.parametrize(("dtype", "length"), [(torch.bfloat16, 19), (torch.float64, 1)], ids=str)
def test_every_site_is_found_in_every_dtype(dtype, length):
    model = small(KINDS, ("hash_moe", "moe", "moe")).to(dtype)
    all_found(dsv4_compile.explain(model, tokens_for(model, length, batch=1), model.new_state(1, 32)))


class Capture(CustomGraphPass):
    """Keeps a copy of the graph that reaches the passes."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.module = copy.deepcopy(graph.owning_module)

    def uuid(self) -> None:
        return None


@pytest.fixture(scope="module")
def joint():
    """By phase: the functional graph of one CSA layer, which has all five fusions, its inputs, and what it returns."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("region", "known"):
            patch.setattr(Block, name, Block.work)  # one graph, without the body of a region apart
        model = small()
        for phase, length in (("prefill", 11), ("decode", 1)):
            capture, calls = Capture(), []

            def keep(gm, inputs, calls=calls, **kwargs):
                return make_boxed_func(lambda *args: (calls.append(copy.deepcopy(args)), gm(*args))[1])

            def through(gm, inputs, capture=capture, keep=keep):
                patches = {"joint_custom_pre_pass": capture, "force_disable_caches": True}
                return compile_fx(gm, inputs, inner_compile=keep, config_patches=patches)

            torch._dynamo.reset()
            state, x = model.new_state(2, 32), tokens_for(model, length)
            torch.compile(model, backend=through, fullgraph=True, dynamic=False)(x, state)
            found[phase] = capture.module, calls[0], model(x, model.new_state(2, 32))
    return found


WHOLE = os.environ.get("DSV4_TEST_PASSES") == "all"  # each choice raises the patterns anew: five minutes in all
NAMES = tuple(dict.fromkeys(r.name for r in RULES))
CHOICES = {"all": {}, "none": {"passes": "none"}}
CHOICES |= {f"{name} alone": {"passes": name} for name in NAMES}
CHOICES |= {f"idioms and {name}": {"passes": f"raise.*,{name}"} for name in NAMES if name.startswith("fuse.")}
CHOICES |= {f"all but {name}": {"disable": name} for name in NAMES}


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_each_pass_alone_and_all_together_give_the_same_logits(joint, phase):
    captured, inputs, want = joint[phase]
    least = 1e-4 * max(1.0, want.abs().max().item() / 7)
    for name, options in CHOICES.items():
        if not (WHOLE or name == "all" or (phase == "decode" and name.startswith("idioms"))):
            continue
        config = resolve({"strict": True} | options, None, passes=set(NAMES), devices=DEVICES)
        manager = PassManager(config, RULES, OPS)
        rewritten = copy.deepcopy(captured)
        with rewritten.graph.find_nodes(op="placeholder")[0].meta["val"].fake_mode:  # as where the passes are called
            manager(rewritten.graph)
        rewritten.recompile()
        got = next(o for o in rewritten(*copy.deepcopy(inputs)) if o.shape == want.shape)
        assert (got - want).abs().max() <= least, name
        found = {f for f, count in manager.report.rules.items() if count}
        assert found == {f for f in found if config.enabled(f)}, name
        if not options:
            assert {f"fuse.{f}" for f in FUSIONS} <= found


def test_fusions_that_are_switched_off(monkeypatch):
    """By name; or by a glob, in a variable."""
    model = small()
    monkeypatch.setenv("DSV4_DISABLE", "fuse.rout*, fuse.mo?")
    by_variable = resolve({}, None, passes=set(NAMES), devices=DEVICES)
    monkeypatch.delenv("DSV4_DISABLE")
    options = {"disable": "fuse.moe,fuse.router"}
    by_name = resolve(options, None, passes=set(NAMES), devices=DEVICES)
    off = {"fuse.moe", "fuse.router"}
    assert all({n for n in NAMES if not c.enabled(n)} == off for c in (by_name, by_variable))
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
