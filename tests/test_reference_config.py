"""The config: released values, Hugging Face's spellings, the rules, and the rope frequencies."""

import copy
import json
import pickle
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RotaryEmbedding

from dsv4_compile.reference_model.config import DSV4Config, rope_frequencies
from dsv4_compile.reference_model.formats import expert_formats

SWA, CSA, HCA = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
NAMES = ("flash", "pro", "tiny", "nano")
YARN = {"type": "yarn", "factor": 16, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 65536}
OFFICIAL = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}


@pytest.fixture(params=NAMES)
def config(request):
    return getattr(DSV4Config, request.param)()


# Released models


def test_flash_is_the_released_model():
    c = DSV4Config.flash()
    assert (c.vocab_size, c.hidden_size, c.moe_intermediate_size, c.num_hidden_layers) == (129280, 4096, 2048, 43)
    assert (c.num_attention_heads, c.head_dim, c.qk_rope_head_dim, c.q_lora_rank) == (64, 512, 64, 1024)
    assert (c.o_groups, c.o_lora_rank, c.index_topk, c.n_routed_experts) == (8, 1024, 512, 256)
    assert (c.routed_scaling_factor, c.swiglu_limit, c.hc_mult, c.hc_sinkhorn_iters) == (1.5, 10.0, 4, 20)
    assert Counter(c.layer_types) == {SWA: 2, CSA: 21, HCA: 20}
    assert c.layer_types[:4] == (SWA, SWA, CSA, HCA) and c.layer_types[42] == CSA
    assert c.num_hash_layers == 3 and c.compress_ratios == (0, 0, *(4, 128) * 20, 4, 0)
    assert (c.linear_format, c.expert_format, c.mtp_expert_format) == ("fp8", "mxfp4", "mxfp4")
    assert c.rope_scaling == YARN


def test_the_published_config_of_flash_is_flash():
    published = {
        "vocab_size": 129280,
        "hidden_size": 4096,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 43,
        "num_attention_heads": 64,
        "num_key_value_heads": 1,
        "head_dim": 512,
        "qk_rope_head_dim": 64,
        "q_lora_rank": 1024,
        "o_groups": 8,
        "o_lora_rank": 1024,
        "hc_mult": 4,
        "sliding_window": 128,
        "index_n_heads": 64,
        "index_head_dim": 128,
        "index_topk": 512,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 6,
        "num_hash_layers": 3,
        "num_nextn_predict_layers": 1,
        "hc_sinkhorn_iters": 20,
        "rope_theta": 10000,
        "compress_rope_theta": 160000,
        "max_position_embeddings": 1048576,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
        "expert_dtype": "fp4",
        "hc_eps": 1e-06,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "norm_topk_prob": True,
        "quantization_config": OFFICIAL | {"activation_scheme": "dynamic"},
        "rms_norm_eps": 1e-06,
        "rope_scaling": YARN,
        "routed_scaling_factor": 1.5,
        "scoring_func": "sqrtsoftplus",
        "swiglu_limit": 10.0,
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.57.1",
        "use_cache": True,
    }
    assert DSV4Config(**published) == DSV4Config.flash()


def test_pro_is_the_released_model():
    c = DSV4Config.pro()
    assert (c.hidden_size, c.moe_intermediate_size, c.num_hidden_layers, c.num_attention_heads) == (7168, 3072, 61, 128)
    assert (c.q_lora_rank, c.o_groups, c.o_lora_rank, c.index_topk, c.n_routed_experts) == (1536, 16, 1024, 1024, 384)
    assert c.routed_scaling_factor == 2.5
    assert Counter(c.layer_types) == {CSA: 30, HCA: 31}
    assert c.layer_types[:4] == (HCA, HCA, CSA, HCA) and c.layer_types[60] == CSA and c.num_hash_layers == 3


def test_rates(config):
    assert config.rate(SWA) == 0
    assert config.rate(CSA) == 4
    assert config.rate(HCA) == (8 if config == DSV4Config.tiny() else 128)
    with pytest.raises(ValueError, match="layer type 'full_attention'"):
        config.rate("full_attention")


# Spellings


def test_hugging_face_reads_what_we_write(config):
    hf = DeepseekV4Config(**config.to_hf_dict())
    same = "hidden_size head_dim qk_rope_head_dim q_lora_rank compress_rates index_topk swiglu_limit n_routed_experts"
    for name in same.split():
        assert getattr(hf, name) == getattr(config, name), name
    assert tuple(hf.layer_types) == config.layer_types and tuple(hf.mlp_layer_types) == config.mlp_layer_types


def test_from_hf_undoes_it(config):
    assert DSV4Config.from_hf(DeepseekV4Config(**config.to_hf_dict())) == config


@pytest.mark.parametrize("linear", ["none", "fp8"])
@pytest.mark.parametrize("experts", ["none", "fp8", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("mtp", [None, "none", "fp8", "nvfp4"])
def test_every_combination_of_formats_survives_json(tmp_path, linear, experts, mtp):
    c = DSV4Config.nano().replace(
        linear_format=linear, expert_format=experts, mtp_expert_format=mtp, sink_mode="swa_scale"
    )
    assert c.mtp_expert_format == (mtp or {"nvfp4": "mxfp4"}.get(experts, experts))
    (tmp_path / "config.json").write_text(json.dumps(c.to_hf_dict()))
    assert DSV4Config.from_json(tmp_path) == DSV4Config.from_json(tmp_path / "config.json") == c


def test_legacy_keys_say_the_same_as_new_ones():
    legacy = DSV4Config(
        num_hidden_layers=4,
        compress_ratios=[8, 4, 0, 8, 0],
        compress_rate_hca=8,
        compress_rate_csa=4,
        num_hash_layers=1,
        partial_rotary_factor=0.25,
        head_dim=256,
        rope_parameters={"rope_type": "yarn", "factor": 16, "original_max_position_embeddings": 65536},
        num_local_experts=16,
        intermediate_size=64,
        eos_token_id=[1],
    )
    assert legacy == DSV4Config(
        num_hidden_layers=4,
        layer_types=[HCA, CSA, SWA, HCA],
        compress_rates={CSA: 4, HCA: 8},
        mlp_layer_types=["hash_moe", "moe", "moe", "moe"],
        qk_rope_head_dim=64,
        head_dim=256,
        rope_scaling=YARN,
        n_routed_experts=16,
        moe_intermediate_size=64,
    )


def test_default_schedule_has_csa_on_even_layers_unlike_hugging_face():
    ours = DSV4Config(num_hidden_layers=6).layer_types
    assert ours == (SWA, SWA, CSA, HCA, CSA, HCA)
    assert tuple(DeepseekV4Config(num_hidden_layers=6).layer_types) == (HCA, HCA, HCA, CSA, HCA, CSA)


def test_nested_rope_parameters_hold_the_thetas():
    nested = {
        "main": {"rope_type": "default", "rope_theta": 5e3},
        "compress": {**YARN, "rope_type": "yarn", "rope_theta": 7e4, "attention_factor": 1.0},
    }
    c = DSV4Config(rope_parameters=nested)
    assert (c.rope_theta, c.compress_rope_theta, c.rope_scaling) == (5e3, 7e4, YARN)
    assert DSV4Config(rope_parameters={"rope_type": "default"}).rope_scaling is None


def test_informative_keys_are_tolerated():
    extra = {"architectures": ["DeepseekV4ForCausalLM"], "torch_dtype": "bfloat16", "topk_method": "noaux_tc", "_x": 1}
    assert DSV4Config(**extra, transformers_version="5.23.0", use_cache=True, expert_dtype="fp4") == DSV4Config()


@pytest.mark.parametrize(
    "quantization, formats",
    [
        ({**OFFICIAL, "expert_dtype": "fp4"}, ("fp8", "mxfp4", "mxfp4")),
        (OFFICIAL, ("fp8", "fp8", "fp8")),
        ({**OFFICIAL, "expert_dtype": "fp4", "moe_quant_algo": "NVFP4"}, ("fp8", "nvfp4", "mxfp4")),
        (
            {**OFFICIAL, "expert_dtype": "fp4", "moe_quant_algo": "NVFP4", "quantized_layers": ["mtp.0.ffn.experts"]},
            ("fp8", "mxfp4", "nvfp4"),
        ),
        (
            {**OFFICIAL, "expert_dtype": "fp4", "moe_quant_algo": "NVFP4", "ignore": ["layers", "mtp*"]},
            ("fp8", "mxfp4", "mxfp4"),
        ),
    ],
)
def test_quantization_config_says_the_formats(quantization, formats):
    c = DSV4Config(quantization_config=quantization)
    assert (c.linear_format, c.expert_format, c.mtp_expert_format) == formats


def test_nvfp4_is_decided_layer_by_layer():
    quantization = OFFICIAL | {"moe_quant_algo": "NVFP4", "expert_dtype": "fp4"}
    listed = {"layers.1.ffn.experts": {}, "model.layers.10.mlp.experts.0.w1": {}}
    given = {"quantization_config": quantization | {"quantized_layers": listed}}
    by_layer = expert_formats(given, 12, 1)
    assert [i for i, format in enumerate(by_layer) if format == "nvfp4"] == [1, 10]
    given = {"quantization_config": quantization | {"ignore": ["layers.2.*", "*.attn.*", "layers.3", "head"]}}
    assert expert_formats(given, 5, 1) == ("nvfp4", "nvfp4", "mxfp4", "mxfp4", "nvfp4", "mxfp4")


# Rules


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_siez": 1}, "unknown config field 'hidden_siez': did you mean 'hidden_size'"),
        ({"zzz": 1}, "unknown config field 'zzz': remove it"),
        ({"model_type": "deepseek_v3"}, "model_type='deepseek_v3': expected 'deepseek_v4'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0: expected a positive integer"),
        ({"hidden_size": 96.0}, "hidden_size=96.0: expected a positive integer"),
        ({"index_topk": True}, "index_topk=True: expected a positive integer"),
        ({"layer_types": [SWA]}, "layer_types has 1 entries: expected one a layer, num_hidden_layers=6"),
        ({"layer_types": ["full"] * 6}, r"layer_types\[0\]='full': expected one of 'sliding_attention'"),
        ({"mlp_layer_types": ["moe"]}, "mlp_layer_types has 1 entries"),
        ({"mlp_layer_types": ["moe"] * 5 + ["hash_moe"]}, "'hash_moe' layers must come first"),
        ({"num_hash_layers": -1}, "num_hash_layers=-1: expected an integer, 0 or more"),
        ({"compress_ratios": [0, 8, 4, 8, 4, 3]}, r"compress_ratios\[5\]=3: expected one of \[0, 4, 8\]"),
        ({"compress_ratios": [0, 8, 4, 8, 4, 0, 4]}, r"compress_ratios\[6\]=4 is past num_hidden_layers=6.*expected 0"),
        ({"compress_ratios": [0, 8, 4], "layer_types": [SWA] * 6}, "compress_ratios=.* and layer_types=.* disagree"),
        ({"compress_rates": {CSA: 4}}, "compress_rates=.*expected exactly the keys"),
        ({"compress_rate_csa": 0}, "compress_rates.*=0: expected a positive integer"),
        ({"o_groups": 4}, "o_groups=4: must divide num_attention_heads=6"),
        ({"qk_rope_head_dim": 15}, "qk_rope_head_dim=15: must be even"),
        ({"qk_rope_head_dim": 48}, "qk_rope_head_dim=48: must be below head_dim=48"),
        ({"index_head_dim": 8}, "index_head_dim=8: must be at least qk_rope_head_dim=16"),
        ({"partial_rotary_factor": 0.5, "qk_rope_head_dim": 16}, "=24 and qk_rope_head_dim=16 disagree"),
        ({"num_experts_per_tok": 11}, "num_experts_per_tok=11: must not exceed n_routed_experts=10"),
        ({"num_local_experts": 9, "n_routed_experts": 10}, "num_local_experts=9 and n_routed_experts=10 disagree"),
        ({"num_key_value_heads": 2}, "num_key_value_heads=2: expected 1"),
        ({"n_shared_experts": 0}, "n_shared_experts=0: expected 1"),
        ({"scoring_func": "relu"}, "scoring_func='relu': expected 'sqrtsoftplus' or 'softmax' or 'sigmoid'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu': expected 'silu'"),
        ({"swiglu_limit": 0}, "swiglu_limit=0: expected a number above 0; to switch the clamp off"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps='1e-6': expected a number above 0"),
        ({"rope_theta": 1}, "rope_theta=1: expected a number above 1"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers=-1: expected an integer, 0 or more"),
        ({"eos_token_id": 331}, r"eos_token_id=331: expected token ids of 0 to 330 \(vocab_size - 1\)"),
        ({"eos_token_id": [1, -2]}, r"eos_token_id=\(1, -2\): expected token ids"),
        ({"sink_mode": "none"}, "sink_mode='none': expected 'denominator' or 'swa_scale'"),
        ({"hash_gate": "x"}, "hash_gate='x': expected 'scored' or 'uniform'"),
        ({"linear_format": "mxfp4"}, "linear_format='mxfp4': expected 'none' or 'fp8'"),
        ({"expert_format": "mxfp4"}, "moe_intermediate_size=40: must be a multiple of 32, the block of expert_format"),
        ({"mtp_expert_format": "nvfp4"}, "moe_intermediate_size=40: must be a multiple of 16, the block of mtp_expert"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope type 'linear'.*'yarn' or not at all"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "without original_max_position_embeddings: add it"),
        ({"rope_scaling": YARN | {"factor": -1}}, r"rope_scaling\['factor'\]=-1: expected a number above 0"),
        ({"rope_scaling": YARN | {"attention_factor": 1.2}}, "attention_factor=1.2: expected 1.0"),
        ({"rope_scaling": YARN | {"truncate": False}}, "rope key 'truncate' is unknown"),
        (
            {"rope_scaling": YARN, "rope_parameters": YARN | {"factor": 8}},
            "rope_parameters=.* and rope_scaling=.* disa",
        ),
        ({"rope_parameters": {"main": {"rope_type": "yarn"}, "compress": {}}}, "sliding layers use plain rope"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method='awq': expected 'fp8' or 'modelopt'"),
        ({"quantization_config": OFFICIAL | {"weight_block_size": [1, 32]}}, r"weight_block_size=\[1, 32\]: expected"),
        ({"quantization_config": OFFICIAL | {"expert_dtype": "int4"}}, "expert_dtype='int4': expected 'fp4' or 'fp8'"),
    ],
)
def test_broken_rules_are_named(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        DSV4Config.tiny().replace(**changes)


@pytest.mark.parametrize("text, message", [("{", "is not valid JSON"), ("[1]", "holds a list, expected an object")])
def test_a_broken_json_file_is_named(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        DSV4Config.from_json(tmp_path)


# Copies


def test_replace_cuts_and_continues_the_schedule():
    flash = DSV4Config.flash()
    assert flash.replace(num_hidden_layers=5).layer_types == flash.layer_types[:5]
    assert flash.replace(num_hidden_layers=2).mlp_layer_types == ("hash_moe", "hash_moe")
    longer = DSV4Config.tiny().replace(num_hidden_layers=9)
    assert longer.layer_types == (SWA, HCA, CSA, HCA, CSA, SWA, CSA, HCA, CSA)
    assert longer.num_hash_layers == 2
    assert flash.replace(num_hidden_layers=3, compress_ratios=[4, 4, 128]).layer_types == (CSA, CSA, HCA)


def test_replace_takes_back_what_depends():
    nvfp4 = DSV4Config.flash().replace(expert_format="nvfp4")
    assert nvfp4.mtp_expert_format == "mxfp4"
    assert nvfp4.replace(expert_format="none").mtp_expert_format == "none"
    assert nvfp4.replace(hidden_size=2048).mtp_expert_format == "mxfp4"


def test_a_config_is_a_value(config):
    assert hash(config) == hash(config.replace()) and config == config.replace()
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    with pytest.raises(AttributeError):
        config.hidden_size = 1
    with pytest.raises(TypeError, match="read-only"):
        config.compress_rates[CSA] = 8


# Rope


def test_golden_frequencies():
    main, compress = (rope_frequencies(DSV4Config.flash(), which) for which in ("main", "compress"))
    for i, f in {0: 1, 1: 0.68765604, 15: 3.6355385e-3, 16: 2.2656249e-3, 20: 2.9697779e-4, 25: 5.3723124e-6}.items():
        assert compress[i].item() == pytest.approx(f, rel=1e-7)
    assert compress[31].item() == pytest.approx(5.6805294e-7, rel=1e-7)
    for i, f in {1: 0.7498942, 16: 0.01, 31: 1.3335215e-4}.items():
        assert main[i].item() == pytest.approx(f, rel=1e-7)
    with pytest.raises(ValueError, match="rope 'swa': expected 'main' or 'compress'"):
        rope_frequencies(DSV4Config.flash(), "swa")


def bits_as_hugging_face(config):
    hf = DeepseekV4RotaryEmbedding(DeepseekV4Config(**config.to_hf_dict()))
    for which in ("main", "compress"):
        assert torch.equal(rope_frequencies(config, which), getattr(hf, f"{which}_inv_freq"))
        assert getattr(hf, f"{which}_attention_scaling") == 1.0


def test_frequencies_have_the_bits_of_hugging_face(config):
    bits_as_hugging_face(config)


@given(
    half=st.integers(1, 32),
    theta=st.floats(10, 1e7),
    factor=st.floats(1, 64),
    original=st.integers(8, 1 << 20),
    beta=st.tuples(st.floats(1, 8), st.floats(8, 64)),
)
def test_frequencies_of_any_yarn_have_the_bits_of_hugging_face(half, theta, factor, original, beta):
    scaling = {
        "type": "yarn",
        "factor": factor,
        "beta_slow": beta[0],
        "beta_fast": beta[1],
        "original_max_position_embeddings": original,
    }
    bits_as_hugging_face(
        DSV4Config.tiny().replace(
            # A power of two, so that Hugging Face's detour by the share of the head is exact.
            head_dim=128,
            index_head_dim=64,
            qk_rope_head_dim=2 * half,
            rope_theta=theta,
            compress_rope_theta=theta,
            rope_scaling=scaling,
        )
    )
