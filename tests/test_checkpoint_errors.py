"""What a broken checkpoint says: which tensor or file, what was expected, what to do.  And that saving refuses the same way."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv4_compile.reference_model import DSV4, DSV4Config, load, save
from dsv4_compile.reference_model.checkpoint import CheckpointError

BF16, E8M0 = torch.bfloat16, torch.float8_e8m0fnu


def mini(linear: str = "fp8", experts: str = "mxfp4", **changes) -> DSV4Config:
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2}
    schedule = {"num_hidden_layers": 3, "compress_ratios": [0, 4, 8], "num_hash_layers": 1}
    return DSV4Config.tiny().replace(**sizes, **schedule, linear_format=linear, expert_format=experts, **changes)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine")
    save(DSV4(mini()), folder)
    return load_file(folder / "model.safetensors")


@pytest.fixture
def refused(tmp_path, pristine):
    """refused(change) -> the error that loading gives after `change` has edited the dict of tensors."""

    def run(change, config=None, **options):
        stored = {name: t.clone() for name, t in pristine.items()}
        change(stored)
        save_file(stored, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(config or mini().to_hf_dict()))
        with pytest.raises(CheckpointError) as caught:
            load(tmp_path, **options)
        return caught.value

    return run


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of several shards, the first and the second being `model-00001-of-...` and `model-00002-of-...`."""
    save(DSV4(mini()), tmp_path, max_shard_bytes=50_000)
    return tmp_path


def shard(folder, number):
    (file,) = folder.glob(f"model-{number:05}-of-*.safetensors")
    return file


# Tensors


def test_missing_tensors_are_listed(refused):
    names = ("layers.0.attn.wq_a.scale", "layers.2.ffn.experts.3.w2.weight", "mtp.0.e_proj.weight")
    error = refused(lambda stored: [stored.pop(name) for name in names])
    assert set(error.missing) == set(names) and not error.unexpected and not error.misshapen
    assert "3 missing:\n" in str(error) and all(f"  {name}\n" in str(error) for name in names)


def test_unexpected_tensors_are_listed(refused):
    error = refused(lambda stored: stored.update({"layers.7.attn_norm.weight": torch.ones(64), "x": torch.ones(1)}))
    assert set(error.unexpected) == {"layers.7.attn_norm.weight", "x"} and not error.missing
    assert "x (in model.safetensors:x)" in str(error)


def test_misshapen_tensors_show_both_shapes(refused):
    error = refused(lambda stored: stored.update({"head.weight": torch.ones(64, 331), "norm.weight": torch.ones(63)}))
    assert set(error.misshapen) == {"head.weight", "norm.weight"}
    assert "head.weight: expected bfloat16 [331, 64], found float32 [64, 331]" in str(error)


@pytest.mark.parametrize(
    "name, value",
    [
        ("layers.0.attn.wq_a.weight", lambda t: t.to(BF16)),
        ("layers.0.attn.wq_a.scale", lambda t: t.to(BF16)),
        ("layers.0.ffn.experts.0.w1.weight", lambda t: t.float()),
        ("layers.0.ffn.experts.0.w1.scale", lambda t: t.float()),
        ("layers.0.ffn.gate.tid2eid", lambda t: t.float()),
        ("layers.0.attn_norm.weight", lambda t: t.int()),
    ],
)
def test_a_wrong_dtype_is_misshapen(refused, name, value):
    error = refused(lambda stored: stored.update({name: value(stored[name])}))
    assert error.misshapen == (name,)


def test_a_long_list_is_counted_by_pattern(refused):
    error = refused(lambda stored: [stored.pop(n) for n in [*stored] if ".experts." in n and n.endswith("scale")])
    assert len(error.missing) == 48 and "48 missing" in str(error)
    assert "like layers.*.ffn.experts.*.w*.scale" in str(error) and len(str(error).splitlines()) < 30


def test_the_wrong_config_shows_in_shapes_and_names(refused):
    wrong = mini(o_lora_rank=24, num_nextn_predict_layers=0).to_hf_dict()
    error = refused(lambda stored: None, wrong)
    assert "layers.1.attn.wo_a.weight" in error.misshapen and "mtp.0.enorm.weight" in error.unexpected
    assert "The config says 3 layers, 0 MTP" in str(error)


def test_an_unquantised_config_over_quantised_files_says_so(refused):
    error = refused(lambda stored: None, mini("none", "none").to_hf_dict())
    assert "layers.0.attn.wq_a.scale" in error.unexpected
    assert "linear_format='none'" in str(error) and "quantization_config" in str(error)


def test_one_tensor_under_two_names(refused):
    error = refused(lambda stored: stored.update({"lm_head.weight": stored["head.weight"].clone()}))
    assert "head.weight is stored twice" in str(error)


# Values


@pytest.mark.parametrize(
    "name, poison",
    [
        ("embed.weight", lambda t: t.view(-1)[5:6].fill_(torch.nan)),
        ("layers.1.hc_attn_fn", lambda t: t.view(-1)[5:6].fill_(torch.inf)),
        ("layers.2.attn.attn_sink", lambda t: t[:1].fill_(torch.nan)),
        ("layers.0.attn.wq_b.weight", lambda t: t.view(torch.uint8)[0, :1].fill_(0xFF)),
        ("layers.0.attn.wq_b.scale", lambda t: t.view(torch.uint8)[0, :1].fill_(0xFF)),
        ("mtp.0.ffn.experts.2.w3.scale", lambda t: t.view(torch.uint8)[0, :1].fill_(0xFF)),
    ],
)
def test_nan_weights_are_named(refused, tmp_path, name, poison):
    error = refused(lambda stored: poison(stored[name]))
    assert f"{name} (model.safetensors:{name}) has 1 NaN or infinite values of" in str(error)
    assert load(tmp_path, check_finite=False).config == mini()


def test_an_infinite_sink_or_bias_is_no_error(tmp_path):
    model = DSV4(mini())
    model.layers[1].attn.attn_sink.data[0] = -torch.inf  # no sink
    model.layers[1].ffn.gate.bias.data[0] = -torch.inf  # an expert switched off
    save(model, tmp_path)
    assert load(tmp_path).layers[1].attn.attn_sink[0] == -torch.inf


@pytest.mark.parametrize("expert", [-1, 4])
def test_a_hash_table_out_of_range_is_named(refused, expert):
    error = refused(lambda stored: stored["layers.0.ffn.gate.tid2eid"].view(-1)[7:8].fill_(expert))
    assert "layers.0.ffn.gate.tid2eid" in str(error) and "outside 0 to 3" in str(error)


def test_experts_stored_in_two_dtypes(tmp_path):
    save(DSV4(mini("none", "none")), tmp_path)
    name, file = "layers.0.ffn.experts.2.w1.weight", tmp_path / "model.safetensors"
    stored = load_file(file)
    save_file(stored | {name: stored[name].half()}, file)
    with pytest.raises(CheckpointError, match=rf"weight of {name} is torch\.float16, before it torch\.float32"):
        load(tmp_path)


# Files


def test_a_cut_file_is_named(folder):
    file = shard(folder, 2)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=rf"cannot read {file} \(\d+ bytes; .*cut off or damaged, fetch it again"):
        load(folder)


@pytest.mark.parametrize(
    "content, fix",
    [(b"", "cut off"), (b"\xff" * 100, "cut off"), (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull")],
)
def test_a_damaged_file_says_what_to_do(folder, content, fix):
    shard(folder, 1).write_bytes(content)
    with pytest.raises(CheckpointError, match=fix):
        load(folder)


def test_a_missing_shard_is_named(folder):
    shard(folder, 3).unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of the [0-9]+ files of its index: fetch model-00003-of-"):
        load(folder)


def test_an_index_that_promises_too_much(folder):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["layers.9.x"] = shard(folder, 1).name
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"names tensors that the files lack.*layers\.9\.x \(model-00001"):
        load(folder)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match=r"is not a safetensors index.*fetch it again"):
        load(folder)


def test_a_folder_without_index_is_read_whole_but_nothing_twice(folder):
    (folder / "model.safetensors.index.json").unlink()
    assert load(folder).config == mini()
    save_file({"norm.weight": torch.ones(64)}, folder / "z.safetensors")
    with pytest.raises(CheckpointError, match=r"norm\.weight is in two files.*remove one file"):
        load(folder)


def test_an_unknown_dtype_is_named(folder):
    save_file({"x": torch.ones(2, dtype=torch.bool)}, shard(folder, 1))
    with pytest.raises(CheckpointError, match="x has dtype BOOL, expected one of F64, F32"):
        load(folder)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is not valid JSON"),
        ("[]", "is not a JSON object"),
        ('{"hidden_size": -1}', "does not describe a DeepSeek-V4: hidden_size=-1: expected a positive integer"),
        ('{"n_experts": 4}', "does not describe a DeepSeek-V4: unknown config field 'n_experts'"),
        ('{"model_type": "llama"}', "expected 'deepseek_v4'"),
    ],
)
def test_a_wrong_config_file_is_named(folder, text, message):
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_paths_that_hold_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere: expected a folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no config\.json: copy the one"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(mini().to_hf_dict()))
    with pytest.raises(CheckpointError, match=r"holds no \.safetensors file: other formats must be converted"):
        load(tmp_path)
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="has no 'config' in its metadata: give the folder"):
        load(tmp_path / "x.safetensors")


# Saving


def test_saving_refuses_what_a_format_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match="checkpoint format 'gguf': expected 'official' or 'hf'"):
        save(DSV4(mini()), tmp_path, format="gguf")
    with pytest.raises(ValueError, match="linear_format='fp8': Hugging Face reads quantised weights in the official"):
        save(DSV4(mini()), tmp_path, format="hf")
    with pytest.raises(ValueError, match="sink_mode='swa_scale', hash_gate='scored': Hugging Face's model computes"):
        save(DSV4(mini("none", "none", sink_mode="swa_scale")), tmp_path, format="hf")
    model = DSV4(mini())
    model.layers[0].adapter = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"no name for layers\.0\.adapter\.weight, layers\.0\.adapter\.bias: remove"):
        save(model, tmp_path)
    assert not any(tmp_path.iterdir())
