"""Every site at the sizes of the released models, on the meta device: nothing is allocated, nothing computed.

One layer of each kind by default, at decode; with DSV4_TEST_COVERAGE=all every layer of Flash and Pro, prefill and decode,
of our model and of Hugging Face's, which takes an hour.
"""

import os
from functools import partial

import pytest
import torch

import dsv4_compile
from dsv4_compile import hf
from dsv4_compile.backend import backend
from dsv4_compile.reference_model import DSV4, DSV4Config
from dsv4_compile.reference_model.schedule import CSA, HCA, SWA

ALL = os.environ.get("DSV4_TEST_COVERAGE") == "all"
ONE_OF_EACH = dict(
    num_hidden_layers=3,
    layer_types=(SWA, CSA, HCA),
    mlp_layer_types=("hash_moe", "moe", "moe"),
)
HF_FIELDS = [
    "vocab_size",
    "hidden_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "qk_rope_head_dim",
    "q_lora_rank",
    "o_groups",
    "o_lora_rank",
    "sliding_window",
    "index_n_heads",
    "index_head_dim",
    "index_topk",
    "n_routed_experts",
    "num_experts_per_tok",
    "routed_scaling_factor",
    "swiglu_limit",
    "hc_mult",
    "hc_sinkhorn_iters",
    "max_position_embeddings",
]


def ours(config, phase):
    """A model and what else a call of it takes."""
    with torch.device("meta"):
        model = DSV4(config).eval().requires_grad_(False)
    model.to("meta")  # tables that are computed on the CPU
    return model, {"state": model.new_state(1, 4096)} if phase == "decode" else {}


def hugging_face(config, phase):
    """The same of Hugging Face's."""
    transformers = pytest.importorskip("transformers")
    fields = {name: getattr(config, name) for name in HF_FIELDS}
    fields |= {name: list(getattr(config, name)) for name in ("layer_types", "mlp_layer_types")}
    fields["compress_rates"] = dict(config.compress_rates)
    theirs = transformers.DeepseekV4Config(**fields, num_nextn_predict_layers=0, tie_word_embeddings=False)
    with torch.device("meta"):
        model = transformers.DeepseekV4ForCausalLM(theirs).eval().requires_grad_(False)
    hf.prepare(model.to("meta"))
    if phase == "decode":
        return model, {"past_key_values": hf.StaticCache(model, batch=1, max_len=4096)}
    return model, {"use_cache": False}


@pytest.mark.parametrize("source", [ours, hugging_face] if ALL else [ours], ids=lambda f: f.__name__)
@pytest.mark.parametrize("phase", ["prefill", "decode"] if ALL else ["decode"])
@pytest.mark.parametrize("name", ["flash", "pro"] if ALL else ["flash"])
def test_every_site_is_found_at_full_size(name, phase, source):
    config = getattr(DSV4Config, name)().replace(num_nextn_predict_layers=0)
    if not ALL:
        config = config.replace(**ONE_OF_EACH)
    model, given = source(config, phase)
    tokens = torch.zeros(1, 512 if phase == "prefill" else 1, dtype=torch.int64, device="meta")
    report = dsv4_compile.explain(model, tokens, **given)
    assert {f: report.counts[f] for f in report.sites} == dict(report.sites), report
    assert report.unexplained == []
    layers = len(config.layer_types)
    assert report.sites["moe"] == layers and report.sites["mhc_boundary"] == 2 * layers and report.sites["head"] == 1


def test_an_output_on_the_meta_device_may_be_read_by_the_graph():
    """As what lies between layers does; Inductor itself loses the order then."""

    def f(x):
        y = torch.softmax(x, -1)
        return y, y.sin()

    assert dsv4_compile.explain(f, torch.empty(3, 8, device="meta")).rules["raise.softmax"] == 1


def test_every_site_of_mtp_is_found():
    """Counted by explain from the configuration, and by the backend from the modules that the graph went through."""
    fields = dict(num_hidden_layers=1, layer_types=(SWA,), mlp_layer_types=("moe",))
    model = DSV4(DSV4Config.tiny().replace(**fields, hc_sinkhorn_iters=2)).eval().requires_grad_(False)
    report = dsv4_compile.explain(model, torch.arange(9).unsqueeze(0), mtp=True, options={"strict": True})
    assert {f: report.counts[f] for f in report.sites} == dict(report.sites) and report.sites["mtp"] == 1, report
    assert report.unexplained == []
    torch._dynamo.reset()
    reports = []
    options = {"inner": "eager", "strict": True}
    torch.compile(model, backend=partial(backend, options=options, observe=reports.append))(
        torch.arange(9).unsqueeze(0), mtp=True
    )
    assert reports[0].sites["mtp"] == 1 and not reports[0].missing
