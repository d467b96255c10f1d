"""What the compiler takes for granted about torch: one fact a test, without any code of ours but where it says so.

A test that fails with a new torch says which part of the compiler lost its ground. DSV4_TEST_FACTS=all runs those too that
take long, most of all with Inductor: half a minute on one core.
"""

import inspect
import os
import re
import shutil

import pytest
import torch
import torch._inductor.config as inductor_config
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.utils import fresh_cache
from torch.nn import functional as F

pytestmark = pytest.mark.torch_facts
REUSES = "reuse_hash_fn" in inspect.signature(torch.compiler.nested_compile_region).parameters  # torch 2.13 on
aten = torch.ops.aten
on_demand = pytest.mark.skipif(os.environ.get("DSV4_TEST_FACTS") != "all", reason="on demand: DSV4_TEST_FACTS=all")
has_compiler = shutil.which("g++") or shutil.which("clang++")
with_inductor = pytest.mark.skipif(
    os.environ.get("DSV4_TEST_FACTS") != "all" or not has_compiler,
    reason="on demand: DSV4_TEST_FACTS=all, and a C++ compiler",
)


@pytest.fixture(autouse=True)
def without_caches():
    counters.clear()
    with inductor_config.patch(force_disable_caches=True), torch.no_grad():
        yield


class Pass(CustomGraphPass):
    """Lists the calls of the graphs that it gets, then edits them."""

    def __init__(self, edit=None, uuid=None):
        self.graphs, self.nodes, self.edit, self.id = [], [], edit, uuid

    def __call__(self, graph):
        self.nodes = list(graph.nodes)
        self.graphs.append([str(n.target) for n in self.nodes if n.op == "call_function"])
        if self.edit:
            self.edit(graph)

    def uuid(self):
        return self.id


def through(passes, with_inductor=False, seen=None):
    """A backend: Inductor's with a joint pre-pass; without Inductor the graph is run as it is, so nothing is compiled."""

    def keep(gm, inputs, **how):
        if seen is not None:
            seen.append(how)
        return make_boxed_func(gm.forward)

    def backend(gm, inputs):
        extra = {} if with_inductor else {"inner_compile": keep}
        return compile_fx(gm, inputs, config_patches={"joint_custom_pre_pass": passes}, **extra)

    return backend


class Block(nn.Module):
    """Writes a row of its cache in place."""

    def __init__(self, kind="a"):
        super().__init__()
        self.proj, self.kind = nn.Linear(8, 8, bias=False), kind
        self.register_buffer("kv", torch.zeros(64, 8))

    def forward(self, x, position):
        self.kv.index_copy_(0, position, self.proj(x))
        y = torch.softmax(x @ self.kv.t(), -1) @ self.kv
        return x + (y if self.kind == "a" else y.sigmoid())


class Region(Block):
    @torch.compiler.nested_compile_region
    def forward(self, x, position):
        return Block.forward(self, x, position)


X, POSITION = torch.randn(1, 8), torch.tensor([3])


def compiled(f, passes, **how):
    return torch.compile(f, backend=through(passes, **how), fullgraph=True)


# The hook


@pytest.mark.parametrize("mode", [torch.inference_mode, pytest.param(torch.no_grad, marks=on_demand)])
def test_the_joint_pre_pass_runs_without_gradients_on_functional_aten(mode):
    passes, layer = Pass(), Block()
    with mode():
        compiled(layer, passes)(X, POSITION)
    (calls,) = passes.graphs
    assert all(t.startswith(("aten.", "prims.", "<built-in function getitem>")) for t in calls)
    assert "aten.index_put.default" in calls and calls[-1] == "aten.copy_.default"  # written once, at the end
    assert [t for t in calls if t.split(".")[1].endswith("_")] == ["aten.copy_.default"]
    assert layer.kv[3].abs().sum() > 0


def test_an_error_in_a_pass_reaches_the_user():
    def broken(graph):
        raise ValueError("planted")

    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="planted"):
        compiled(lambda x: x + 1, Pass(broken))(torch.ones(2))


def test_weights_are_placeholders_with_names():
    names, passes = {}, Pass()

    def backend(gm, inputs):
        names.update(enumerate(n.name for n in gm.graph.nodes if n.op == "placeholder"))
        return through(passes)(gm, inputs)

    torch.compile(Block(), backend=backend)(X, POSITION)
    assert not any(n.op == "get_attr" for n in passes.nodes)
    found = {names[n.meta["desc"].idx] for n in passes.nodes if n.op == "placeholder"}
    assert any("parameters_weight" in f for f in found) and any("buffers_kv" in f for f in found)


@pytest.mark.parametrize(
    ("f", "wanted"),
    [
        (lambda x: F.rms_norm(x, (8,), torch.ones(8), 1e-6), "full pow mean add rsqrt mul mul"),
        (lambda x: torch.softmax(x, -1), "amax sub exp sum div"),
        (F.silu, "neg exp add div"),
        (F.softplus, "exp log1p gt where"),
        (lambda x: x.topk(2, -1, sorted=False)[1], "topk getitem"),
    ],
    ids=["rms_norm", "softmax", "silu", "softplus", "topk"],
)
def test_what_idioms_come_apart_into(f, wanted):
    passes = Pass()
    compiled(f, passes)(torch.randn(4, 8))
    short = " ".join(re.sub(r"^(aten|prims)\.(\w+)\..*", r"\2", t) for t in passes.graphs[0])
    assert short.replace("<built-in function getitem>", "getitem") == wanted


# Layers, state, shapes


@on_demand
def test_layers_of_a_kind_share_a_body():
    torch.manual_seed(1)
    passes, layers = Pass(), nn.ModuleList(Region(k) for k in "abab")

    def forward(x, position):
        for layer in layers:
            x = layer(x, position)
        return x

    compiled(forward, passes)(X, POSITION)
    assert len(passes.graphs) == 3  # two kinds, and what is around them


@on_demand
def test_buffers_and_marked_arguments_keep_their_address():
    def write(kv, x, position):
        return kv.index_copy_(0, position, x).sum()

    def static(f, *args):
        torch._dynamo.reset()
        seen, passes = [], Pass()
        torch.compile(f, backend=through(passes, seen=seen))(*args)
        inputs = [n for n in passes.nodes if n.op == "placeholder"]
        (kv,) = (i for i, n in enumerate(inputs) if tuple(n.meta["val"].shape) == (64, 8))
        return kv in seen[0]["static_input_idxs"]

    marked = torch.zeros(64, 8)
    torch._dynamo.mark_static_address(marked)
    assert static(Block(), X, POSITION) and static(write, marked, X, POSITION)
    assert not static(write, torch.zeros(64, 8), X, POSITION)


@on_demand
def test_a_position_that_is_a_tensor_never_recompiles():
    passes, kv, position = Pass(), torch.zeros(64, 8), torch.tensor([0])

    def step(kv, x, position):
        kv.index_copy_(0, position % 64, x)
        seen = torch.where(torch.arange(64) <= position, 0.0, float("-inf"))
        return torch.softmax(x @ kv.t() + seen, -1) @ kv

    f = compiled(step, passes)
    f(kv, X, position)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(70):
            position += 1
            f(kv, X, position)
    assert len(passes.graphs) == 1


@on_demand
def test_a_marked_length_compiles_once():
    passes, embed = Pass(), nn.Embedding(16, 8)
    f = compiled(lambda ids: torch.softmax(embed(ids) @ embed.weight.t(), -1), passes)
    for n in (16, 18, 23, 40, 33):
        ids = torch.randint(0, 16, (1, n))
        torch._dynamo.mark_dynamic(ids, 1)
        f(ids)
    assert len(passes.graphs) == 1


class Projected(nn.Module):
    """A region that makes a size of its input a constant, as its weight has that size."""

    def __init__(self):
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(8, 8)), 1

    @torch.compiler.nested_compile_region
    def forward(self, x, y):
        return x + y @ self.weight * self.scale


def projected(settle=False):
    layers = [Projected() for _ in range(3)]

    def f(x, y):
        if settle and y.shape[1] != 8:
            raise ValueError
        for layer in layers:
            x = layer(x, y)
        return x

    return f, layers


@on_demand
def test_a_size_that_a_region_makes_constant_has_to_be_settled_before():
    """Where Dynamo reuses the trace of a region (torch 2.13), it asks for a symbol that has become a number."""
    args = torch.randn(4, 8), torch.randn(4, 8)
    f, _ = projected(settle=True)
    torch.testing.assert_close(torch.compile(f, backend="eager", dynamic=True)(*args), f(*args))
    f, _ = projected()
    if REUSES:
        with pytest.raises(torch._dynamo.exc.InternalTorchDynamoError, match="KeyError: 8"):
            torch.compile(f, backend="eager", dynamic=True)(*args)


@on_demand
def test_numbers_of_a_layer_that_reuses_a_trace_are_not_guarded():
    """Compile again after such a change: torch 2.13 compares layers while it traces, and guards those it traced."""
    args = torch.randn(4, 8), torch.randn(4, 8)
    f, layers = projected()
    run = torch.compile(f, backend="eager", dynamic=False)
    torch.testing.assert_close(run(*args), f(*args))
    for layer, guarded in ((layers[0], True), (layers[2], not REUSES)):
        layer.scale += 1
        assert torch.allclose(run(*args), f(*args)) == guarded


def test_a_graph_runs_op_by_op_without_a_compiler():
    seen = []

    def run(gm, inputs):
        seen.extend(str(n.target) for n in gm.graph.nodes)
        return make_boxed_func(torch.fx.Interpreter(gm).run)

    layer = Block()
    backend = aot_autograd(fw_compiler=run, decompositions=select_decomp_table())
    got = torch.compile(layer, backend=backend, fullgraph=True)(X, POSITION)
    torch.testing.assert_close(got, layer(X, POSITION))  # a second write of the same changes nothing
    assert "aten.amax.default" in seen


# With Inductor


@with_inductor
def test_a_hit_skips_the_pass_a_new_uuid_misses_and_none_bypasses():
    def compile_(uuid):
        torch._dynamo.reset()
        counters.clear()
        passes = Pass(uuid=uuid)
        compiled(lambda x: x.sin() * 2, passes, with_inductor=True)(torch.ones(16))
        found = counters["inductor"]
        return len(passes.graphs), *(found[f"fxgraph_cache_{what}"] for what in ("miss", "hit", "bypass"))

    with inductor_config.patch(force_disable_caches=False), fresh_cache():
        assert compile_("one") == (1, 1, 0, 0)
        assert compile_("one") == (0, 0, 1, 0)
        assert compile_("two") == (1, 1, 0, 0)
        assert compile_(None) == (1, 0, 0, 1)


@with_inductor
def test_a_composite_from_a_pass_breaks_inductor():
    """So meanings are traced with the decomposition table before they are written back."""

    def edit(graph):
        for n in graph.nodes:
            n.target = aten.silu.default if n.target is aten.sin.default else n.target

    with pytest.raises(Exception, match="both a fallback and a decomp"):
        compiled(lambda x: x.sin() * 3, Pass(edit), with_inductor=True)(torch.ones(8))


@with_inductor
def test_a_missing_compiler_is_named():
    with (
        inductor_config.patch({"cpp.cxx": (None, "no-such-compiler")}),
        fresh_cache(),
        pytest.raises(Exception, match="InvalidCxxCompiler"),
    ):
        torch.compile(lambda x: x.sin() + 1, backend="inductor")(torch.ones(64))
