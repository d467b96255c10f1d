"""Checkpoints: what Hugging Face and the official release write is read, what we write comes back bit by bit."""

import json
import re
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from dsv4_compile.reference_model import DSV4, DSV4Config, from_hf, load, names, save
from dsv4_compile.reference_model.checkpoint import CheckpointError
from dsv4_compile.reference_model.manifest import manifest
from dsv4_compile.reference_model.quant import dequantize, mxfp4_to_nvfp4

FORMATS = [("none", "none"), ("fp8", "mxfp4"), ("fp8", "nvfp4"), ("fp8", "fp8"), ("none", "mxfp4")]


def mini(linear: str = "none", experts: str = "none", **changes) -> DSV4Config:
    """All kinds of layers and one MTP block, with the multiples of 32 that 4-bit experts need."""
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2}
    schedule = {"num_hidden_layers": 3, "compress_ratios": [0, 4, 8], "num_hash_layers": 1}
    return DSV4Config.tiny().replace(**sizes, **schedule, linear_format=linear, expert_format=experts, **changes)


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """Default initialisation hides bugs (zero biases and sinks, unit norms): give everything its own values."""
    with torch.no_grad():
        for name, p in [*module.named_parameters(), *module.named_buffers()]:
            if name.endswith("tid2eid"):
                experts = max(int(p.max()) + 1, module.config.n_routed_experts)
                p.copy_(torch.rand(p.shape[0], experts).topk(p.shape[1]).indices)
            elif not p.dtype.is_floating_point or p.element_size() == 1 or "inv_freq" in name or "scale_2" in name:
                continue
            elif name.endswith("norm.weight") or "layernorm" in name:
                p.copy_(1 + 0.2 * torch.randn_like(p))
            elif p.dim() == 1:
                p.copy_(0.5 * torch.randn_like(p))
            else:
                p.copy_(1.5 * p.shape[-1] ** -0.5 * torch.randn_like(p))
    return module.eval()


@pytest.fixture(params=FORMATS, ids="-".join)
def model(request):
    return randomised(DSV4(mini(*request.param)))


@pytest.fixture
def hf():
    return randomised(DeepseekV4ForCausalLM(DeepseekV4Config(**mini().to_hf_dict())))


@pytest.fixture
def tokens():
    return torch.randint(0, 331, (1, 24))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiled_weights_are_read_as_they_are_stored(model, tokens, device, tmp_path):
    """Nothing is packed: no tensor of the model moves or changes, and the checkpoint that it came from comes out again."""
    model, tokens = model.to(device).requires_grad_(False), tokens.to(device)
    save(model, tmp_path / "before")
    before = {name: (t.data_ptr(), t.dtype, t.stride()) for name, t in model.state_dict().items()}
    compiled = torch.compile(model, backend="dsv4", options={"inner": "eager", "strict": True, "lowerings": "*"})
    state = model.new_state(1, 32)
    compiled(tokens, state)
    compiled(tokens[:, :1], state)
    assert {name: (t.data_ptr(), t.dtype, t.stride()) for name, t in model.state_dict().items()} == before
    save(model, tmp_path / "after")
    files = [sorted((tmp_path / when).rglob("*.safetensors")) for when in ("before", "after")]
    assert [f.name for f in files[0]] == [f.name for f in files[1]] != []
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))


def same(a: torch.nn.Module, b: torch.nn.Module) -> None:
    """Equal names, dtypes and bytes."""
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert torch.equal(*(t[name].contiguous().flatten().view(torch.uint8) for t in (a, b))), name


def agree(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).abs().max() <= 1e-4 * max(1, theirs.abs().max() / 7)


# Hugging Face


@torch.no_grad()
def test_what_save_pretrained_writes_gives_the_same_logits(tmp_path, hf, tokens):
    hf.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ours = load(tmp_path)
    agree(ours(tokens), hf(tokens).logits)
    assert ours.config == mini(num_nextn_predict_layers=0)
    assert not ours.training and not any(p.requires_grad for p in ours.parameters())


def test_names_in_memory_are_read_too(tmp_path, hf):
    save_file({k: v.clone() for k, v in hf.state_dict().items()}, tmp_path / "model.safetensors")
    hf.config.save_pretrained(tmp_path)
    same(load(tmp_path), from_hf(hf))


def test_from_hf_copies(hf, tokens):
    ours = from_hf(hf)
    with torch.no_grad():
        before = ours(tokens)
        agree(before, hf(tokens).logits)
        for p in hf.parameters():
            p.zero_()
        assert torch.equal(ours(tokens), before)


def test_from_hf_in_bf16_keeps_what_must_be_exact(hf):
    ours = from_hf(hf.to(torch.bfloat16))
    exact = {name for name, p in ours.named_parameters() if p.dtype == torch.float32}
    assert exact == {
        n for n, _ in ours.named_parameters() if "norm" in n or "hc_" in n or n.endswith(("ape", "sink"))
    } | {
        "layers.1.ffn.gate.bias",
        "layers.2.ffn.gate.bias",
    }


@torch.no_grad()
@pytest.mark.parametrize("format", ["hf", "official"])
def test_hugging_face_reads_what_we_write(tmp_path, tokens, format):
    ours = randomised(DSV4(mini()))
    save(ours, tmp_path, format=format, max_shard_bytes=100_000)
    theirs, info = DeepseekV4ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    agree(ours(tokens), theirs(tokens).logits)


def test_the_hf_format_is_that_of_the_model_in_memory(tmp_path, hf):
    ours = from_hf(hf)
    save(ours, tmp_path, format="hf")
    written = load_file(tmp_path / "model.safetensors")
    assert {k: (v.dtype, v.shape) for k, v in written.items()} == {
        k: (v.dtype, v.shape) for k, v in hf.state_dict().items()
    }
    assert all(torch.equal(v, hf.state_dict()[k]) for k, v in written.items())
    assert {k: s for k, (_, s) in manifest(ours.config, "hf").items()} == {
        k: tuple(v.shape) for k, v in written.items()
    }
    same(load(tmp_path), ours)


def test_quantised_names_in_memory(tmp_path):
    """Hugging Face's quantised module: packed int8 experts, and scales named as inverses."""
    ours = DSV4(mini("fp8", "mxfp4", num_nextn_predict_layers=0))
    stored = {}
    for name, t in ours.state_dict().items():
        if ".ffn.experts." not in name:
            official = re.sub(r"hc_(attn|ffn|head)\.", r"hc_\1_", name)
            theirs = names.hf(re.sub(r"\.scale$", ".weight", official))
            stored[theirs + "_scale_inv" * official.endswith(".scale")] = t
    for i, layer in enumerate(ours.layers):
        w, at = layer.ffn.experts, f"model.layers.{i}.mlp.experts."
        for leaf, suffix in (("weight", ""), ("scale", "_scale_inv")):
            w1, w2, w3 = (getattr(x, leaf).view(torch.uint8) for x in (w.w1, w.w2, w.w3))
            dtype = torch.int8 if leaf == "weight" else torch.float8_e8m0fnu
            stored[f"{at}gate_up_proj{suffix}"] = torch.cat([w1, w3], 1).view(dtype)
            stored[f"{at}down_proj{suffix}"] = w2.view(dtype)
    save_file({k: v.clone() for k, v in stored.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(ours.config.to_hf_dict()))
    same(load(tmp_path), ours)


# Official


def test_the_official_format_loses_nothing(tmp_path, model):
    for where, dtype in (("folder", torch.float32), ("one.safetensors", torch.bfloat16)):
        model = model.to(dtype)
        save(model, tmp_path / where, max_shard_bytes=50_000)
        again = load(tmp_path / where)
        assert again.config == model.config
        same(again, model)
    assert not list(tmp_path.rglob("*.partial"))


def stored_specs(path):
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as f:
            found |= {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    return {name: (t.dtype, tuple(t.shape)) for name, t in found.items()}


def test_the_official_files_are_as_the_manifest_says(tmp_path, model):
    for name, p in model.named_parameters():
        if name.endswith("norm.weight"):
            p.data = p.data.bfloat16().float()  # as a released checkpoint gives them
    model = model.to(torch.bfloat16)
    save(model, tmp_path, max_shard_bytes=50_000)
    assert stored_specs(tmp_path) == manifest(model.config)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = list(tmp_path.glob("*.safetensors"))
    assert index["weight_map"].keys() == manifest(model.config).keys() and len(files) > 3
    assert set(index["weight_map"].values()) == {f.name for f in files}
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_norms_that_bf16_would_round_stay_fp32(tmp_path):
    model = randomised(DSV4(mini())).to(torch.bfloat16)
    save(model, tmp_path)
    assert stored_specs(tmp_path)["layers.0.attn_norm.weight"][0] == torch.float32


def test_a_smaller_save_leaves_no_old_shard(tmp_path):
    model = DSV4(mini())
    (tmp_path / "adapter.safetensors").write_bytes(b"")
    save(model, tmp_path, max_shard_bytes=50_000)
    save(model, tmp_path)
    assert sorted(f.name for f in tmp_path.glob("*.safetensors")) == ["adapter.safetensors", "model.safetensors"]
    same(load(tmp_path), model)


def test_a_loaded_model_does_not_hang_on_its_file(tmp_path, model):
    """Nothing may stay mapped: a file that is written over would change the weights, one that is cut would kill the process."""
    save(model, tmp_path)
    loaded, file = load(tmp_path), tmp_path / "model.safetensors"
    with file.open("r+b") as f:
        f.write(bytes(file.stat().st_size))
    same(loaded, model)
    save(loaded, tmp_path)
    same(load(tmp_path), model)


@torch.no_grad()
def test_dequantised_weights_compute_the_same(tmp_path, model, tokens):
    save(model, tmp_path)
    plain = load(tmp_path, dequantize=True)
    assert {plain.config.linear_format, plain.config.expert_format, plain.config.mtp_expert_format} == {"none"}
    assert all(p.dtype == torch.float32 for p in plain.parameters())
    assert torch.equal(plain(tokens), model(tokens))
    half = load(tmp_path, dequantize=True, dtype=torch.bfloat16)
    w = model.layers[1].ffn.experts.w2
    assert torch.equal(half.layers[1].ffn.experts.w2.weight, w.dense(torch.bfloat16))


def test_dtype_is_that_of_plain_matrices_only(tmp_path, model):
    save(model, tmp_path)
    same(load(tmp_path, dtype=torch.bfloat16), model.to(torch.bfloat16))
    assert load(tmp_path, dtype=torch.float64).layers[0].attn_norm.weight.dtype == torch.float64


def test_scales_may_be_raw_bytes_or_fp32(tmp_path):
    model = DSV4(mini("fp8", "fp8"))
    save(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    as_bytes = {k: v.view(torch.uint8) if v.dtype == torch.float8_e8m0fnu else v for k, v in stored.items()}
    save_file(as_bytes, tmp_path / "model.safetensors")
    same(load(tmp_path), model)
    as_fp32 = {k: v.float() if v.dtype == torch.float8_e8m0fnu else v for k, v in stored.items()}
    save_file(as_fp32, tmp_path / "model.safetensors")
    base = load(tmp_path)
    assert base.layers[0].attn.wq_a.scale.dtype == torch.float32
    assert torch.equal(base.layers[0].attn.wq_a.dense(torch.float32), model.layers[0].attn.wq_a.dense(torch.float32))


@pytest.mark.gpu
def test_loading_onto_a_gpu_keeps_every_byte(tmp_path, model):
    save(model, tmp_path)
    there = load(tmp_path, device="cuda")
    assert all(t.is_cuda for t in there.state_dict().values())
    for ours, theirs in zip(model.layers, there.layers, strict=True):
        for a, b in ((ours.attn.wq_a, theirs.attn.wq_a), (ours.ffn.experts.w2, theirs.ffn.experts.w2)):
            assert torch.equal(a.dense(torch.float32), b.dense(torch.float32).cpu())
    same(there.cpu(), model)


# NVFP4


@pytest.fixture
def modelopt(tmp_path):
    """A ModelOpt checkpoint made of an official one: NVFP4 in layers 0 and 2, layer 1 and MTP left as they were."""
    model = DSV4(mini("fp8", "mxfp4"))
    save(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for name in [
        n for n in stored if ".ffn.experts." in n and n.endswith("weight") and n.startswith(("layers.0", "layers.2"))
    ]:
        weight, scale, scale_2 = mxfp4_to_nvfp4(stored[name].view(torch.uint8), stored.pop(name[:-6] + "scale"))
        stored |= {name: weight.clone(), name + "_scale": scale, name + "_scale_2": scale_2.reshape(1)}
        if not name.startswith("layers.2"):
            stored[name[:-6] + "input_scale"] = torch.tensor(0.5)
    config = model.config.to_hf_dict()
    config["quantization_config"] |= {
        "quant_algo": "MIXED_PRECISION",
        "moe_quant_algo": "NVFP4",
        "quantized_layers": {f"layers.{i}.ffn.experts": {"quant_algo": "NVFP4"} for i in (0, 2)},
        "ignore": ["*.attn.*", "*.shared_experts.*", "mtp*", "head"],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(stored, tmp_path / "model.safetensors")
    return model, tmp_path


def test_nvfp4_layers_and_others_hold_the_same_values(modelopt):
    model, path = modelopt
    loaded = load(path)
    assert (loaded.config.expert_format, loaded.config.mtp_expert_format) == ("nvfp4", "mxfp4")
    for ours, theirs in zip([*loaded.layers, loaded.mtp[0]], [*model.layers, model.mtp[0]], strict=True):
        for w in ("w1", "w2", "w3"):
            a, b = getattr(ours.ffn.experts, w), getattr(theirs.ffn.experts, w)
            assert torch.equal(a.dense(torch.float32), b.dense(torch.float32))
    scales = [layer.ffn.experts.w1.input_scale.tolist() for layer in loaded.layers]
    assert scales == [[0.5] * 4, [1.0] * 4, [1.0] * 4]  # stored; none after MXFP4; none stored
    assert loaded.mtp[0].ffn.experts.w1.weight.equal(model.mtp[0].ffn.experts.w1.weight)


def test_a_global_nvfp4_flag_does_not_reach_mtp_or_unlisted_layers(modelopt):
    _, path = modelopt
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]["quantized_layers"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"layers\.1\.ffn\.experts\.0\.w1\.scale_2") as caught:
        load(path)
    assert all(name.startswith("layers.1.ffn.experts.") for name in caught.value.missing)


def test_a_layer_that_nvfp4_cannot_hold_is_named(modelopt):
    _, path = modelopt
    stored = load_file(path / "model.safetensors")
    scale = stored["layers.1.ffn.experts.3.w2.scale"].view(torch.uint8)
    scale[0, 0] = 60
    stored["layers.1.ffn.experts.3.w2.weight"][0] = 1
    save_file(stored, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.ffn\.experts\.3\.w2\.weight must become NVFP4.*no exact"):
        load(path)
    value = dequantize(
        stored["layers.1.ffn.experts.3.w2.weight"].view(torch.uint8), scale.view(torch.float8_e8m0fnu), format="mxfp4"
    )
    assert torch.equal(load(path, dequantize=True).layers[1].ffn.experts.w2.weight[3], value)


# Progress


def test_progress_is_reported(tmp_path, monkeypatch, capsys):
    model, seen = DSV4(mini()), []
    save(model, tmp_path, max_shard_bytes=100_000, progress=lambda *a: seen.append(a))
    assert seen[0][0] == f"model-00001-of-{seen[0][2]:05}.safetensors" and seen[-1] == ("", seen[0][2], seen[0][2])
    seen.clear()
    load(tmp_path, progress=lambda *a: seen.append(a))
    total = len(dict(model.state_dict()))
    assert [(done, of) for _, done, of in seen] == [(i, total) for i in range(total + 1)] and seen[0][
        0
    ] == "embed.weight"
    load(tmp_path)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    load(tmp_path)
    assert f"{total}/{total}" in capsys.readouterr().err
