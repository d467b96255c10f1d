"""The list of all tensors against the released checkpoints, the model, and bytes laid out by hand."""

import json
import re
import struct
from math import prod

import pytest
import torch

from dsv4_compile.reference_model import DSV4, DSV4Config, names
from dsv4_compile.reference_model.convert import Reader, canonical_entries
from dsv4_compile.reference_model.manifest import manifest, stored_bytes, tensors
from dsv4_compile.reference_model.shards import open_files

BF16, FP32, FP8, E8M0 = torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float8_e8m0fnu


def test_pro_has_the_released_number_of_tensors_and_bytes():
    found = manifest(DSV4Config.pro())
    assert len(found) == 145_116
    assert stored_bytes(found) / 2**30 == pytest.approx(805.32, abs=0.005)


def test_flash_has_the_released_size():
    found = manifest(DSV4Config.flash())
    assert len(found) == 69_187
    assert 156e9 < stored_bytes(found) < 160e9
    nvfp4 = stored_bytes(manifest(DSV4Config.flash().replace(expert_format="nvfp4")))
    assert nvfp4 / stored_bytes(found) == pytest.approx(164 / 156, abs=0.005)


@pytest.mark.parametrize("name, parameters", [("flash", 284_334_567_511), ("pro", 1_572_999_528_803)])
def test_parameters_are_those_of_hugging_face(name, parameters):
    plain = {"linear_format": "none", "expert_format": "none", "num_nextn_predict_layers": 0}
    config = getattr(DSV4Config, name)().replace(**plain)
    assert sum(prod(shape) for _, shape in manifest(config).values()) == parameters
    assert sum(prod(shape) for _, shape in manifest(config, "hf").values()) == parameters


def test_pro_has_the_listed_shapes():
    found, V = manifest(DSV4Config.pro()), 129280
    listed = {
        "embed.weight": (BF16, (V, 7168)),
        "head.weight": (BF16, (V, 7168)),
        "hc_head_fn": (FP32, (4, 28672)),
        "hc_head_scale": (FP32, (1,)),
        "layers.0.hc_attn_fn": (FP32, (24, 28672)),
        "layers.0.attn.attn_sink": (FP32, (128,)),
        "layers.0.attn.wq_a.weight": (FP8, (1536, 7168)),
        "layers.0.attn.wq_a.scale": (E8M0, (12, 56)),
        "layers.0.attn.wq_b.weight": (FP8, (65536, 1536)),
        "layers.0.attn.wq_b.scale": (E8M0, (512, 12)),
        "layers.0.attn.wkv.scale": (E8M0, (4, 56)),
        "layers.0.attn.wo_a.weight": (FP8, (16384, 4096)),
        "layers.0.attn.wo_b.scale": (E8M0, (56, 128)),
        "layers.0.attn.compressor.wkv.weight": (BF16, (512, 7168)),
        "layers.0.attn.compressor.ape": (FP32, (128, 512)),
        "layers.2.attn.compressor.wgate.weight": (BF16, (1024, 7168)),
        "layers.2.attn.compressor.ape": (FP32, (4, 1024)),
        "layers.2.attn.compressor.norm.weight": (BF16, (512,)),
        "layers.2.attn.indexer.wq_b.weight": (FP8, (8192, 1536)),
        "layers.2.attn.indexer.weights_proj.weight": (BF16, (64, 7168)),
        "layers.2.attn.indexer.compressor.wkv.weight": (BF16, (256, 7168)),
        "layers.2.attn.indexer.compressor.ape": (FP32, (4, 256)),
        "layers.2.attn.indexer.compressor.norm.weight": (BF16, (128,)),
        "layers.2.ffn.gate.tid2eid": (torch.int64, (V, 6)),
        "layers.3.ffn.gate.bias": (FP32, (384,)),
        "layers.3.ffn.experts.383.w1.weight": (torch.int8, (3072, 3584)),
        "layers.3.ffn.experts.383.w1.scale": (E8M0, (3072, 224)),
        "layers.3.ffn.experts.383.w2.weight": (torch.int8, (7168, 1536)),
        "layers.3.ffn.experts.383.w2.scale": (E8M0, (7168, 96)),
        "layers.3.ffn.shared_experts.w2.weight": (FP8, (7168, 3072)),
        "mtp.0.e_proj.weight": (FP8, (7168, 7168)),
        "mtp.0.hnorm.weight": (BF16, (7168,)),
        "mtp.0.hc_head_base": (FP32, (4,)),
        "mtp.0.ffn.gate.bias": (FP32, (384,)),
    }
    assert {name: found[name] for name in listed} == listed
    absent = "layers.0.ffn.gate.bias layers.3.ffn.gate.tid2eid layers.1.attn.indexer.wq_b.weight mtp.0.embed.weight"
    assert not found.keys() & set(absent.split()) and not any("mtp" in n and "compressor" in n for n in found)


@pytest.mark.parametrize("experts", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("name", ["flash", "pro"])
def test_the_model_has_exactly_these_tensors(name, experts):
    """Real dims on the meta device; five layers hold every kind of layer."""
    config = getattr(DSV4Config, name)().replace(num_hidden_layers=5, expert_format=experts)
    with torch.device("meta"):
        held = dict(DSV4(config).state_dict())
    stacked: dict[str, list] = {}
    for tensor, (dtype, shape) in tensors(config).items():
        path, expert = names.parameter(tensor)
        own = held[path]
        count = () if expert is None else (config.n_routed_experts,)
        assert tuple(own.shape) == (*count, *shape), tensor
        if own.dtype == torch.uint8:
            assert dtype in (torch.int8, torch.uint8), tensor
        elif own.dtype == FP32:
            assert dtype in (BF16, FP32), tensor
        else:
            assert own.dtype == dtype, tensor
        stacked.setdefault(path, []).append(expert)
    assert stacked.keys() == held.keys()
    assert all(found == [None] or found == list(range(config.n_routed_experts)) for found in stacked.values())


@pytest.mark.parametrize("config", [DSV4Config.flash(), DSV4Config.flash().replace(expert_format="nvfp4")])
def test_stored_names_are_unique_and_canonical(config):
    official = manifest(config)
    assert {names.canonical(name) for name in official} == tensors(config).keys()
    ends = {re.sub(r".*\.", "", name) for name in official if ".experts." in name and name.startswith("layers.")}
    four = {"weight", "weight_scale", "weight_scale_2", "input_scale"}
    assert ends == (four if config.expert_format == "nvfp4" else {"weight", "scale"})


def test_every_spelling_of_a_name_means_the_same():
    plain = DSV4Config.flash().replace(linear_format="none", expert_format="none", num_nextn_predict_layers=0)
    for name in tensors(plain):
        if ".ffn.experts." not in name:
            assert names.canonical(names.hf(name)) == names.canonical(f"model.{name}") == name
    with pytest.raises(ValueError, match=r"'blocks\.0\.x' is not a tensor of DeepSeek-V4"):
        names.hf("blocks.0.x")
    assert names.canonical("model.layers.3.attn.norm.weight") == "layers.3.attn.kv_norm.weight"
    assert names.canonical("layers.3.attn.compressor.norm.weight") == "layers.3.attn.compressor.norm.weight"
    assert names.canonical("layers.3.self_attn.q_a_proj.weight_scale_inv") == "layers.3.attn.wq_a.scale"
    assert names.canonical("model.layers.3.mlp.experts.7.up_proj.weight_scale_2") == "layers.3.ffn.experts.7.w3.scale_2"


# The true byte layout, without the safetensors library on the writing side


def lay_out(path, content: dict[str, tuple[str, list[int], bytes]]) -> None:
    """A safetensors file by its specification: length of the header, header, bytes."""
    header, offset = {}, 0
    for name, (dtype, shape, data) in content.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for *_, data in content.values()))


def test_a_slice_of_flash_is_read_byte_by_byte(tmp_path):
    """Layer 7 of Flash in real dims: wq_a (FP8, one scale for each 128 x 128), one expert's w1 (MXFP4), a norm (bf16)."""
    rows, columns = 1024, 4096
    q_codes = bytes((i * 7 + i // columns) % 120 for i in range(rows * columns))  # e4m3 codes without NaN
    q_scales = bytes(110 + i % 20 for i in range(8 * 32))
    e_codes = bytes((i * 11 + i // 2048) % 256 for i in range(2048 * 2048))
    e_scales = bytes(100 + (i * 3) % 30 for i in range(2048 * 128))
    norm = struct.pack("<H", 0x3F81) * 4096  # bf16 1.0078125
    at, expert = "layers.7.", "layers.7.ffn.experts.5.w1"
    lay_out(
        tmp_path / "model-00008-of-00046.safetensors",
        {
            f"{at}attn.wq_a.weight": ("F8_E4M3", [rows, columns], q_codes),
            f"{at}attn.wq_a.scale": ("F8_E8M0", [8, 32], q_scales),
            f"{expert}.weight": ("I8", [2048, 2048], e_codes),
            f"{expert}.scale": ("F8_E8M0", [2048, 128], e_scales),
            f"{at}attn_norm.weight": ("BF16", [4096], norm),
        },
    )
    found, expected = canonical_entries(open_files(tmp_path)), tensors(DSV4Config.flash())
    assert {name: entry.shape for name, entry in found.items()} == {name: expected[name][1] for name in found}

    def read(name: str, format: str, dense: bool):
        return Reader(found, torch.device("cpu"), torch.float32, dense, True).matrix(name, expected, format)

    stored = read(f"{at}attn.wq_a.weight", "fp8", False)
    assert stored["weight"].view(torch.uint8).numpy().tobytes() == q_codes
    assert stored["scale"].view(torch.uint8).numpy().tobytes() == q_scales and stored["scale"].dtype == E8M0
    stored = read(f"{expert}.weight", "mxfp4", False)
    assert stored["weight"].dtype == torch.uint8 and stored["weight"].numpy().tobytes() == e_codes

    wq_a = read(f"{at}attn.wq_a.weight", "none", True)["weight"]
    w1 = read(f"{expert}.weight", "none", True)["weight"]
    assert wq_a.shape == (rows, columns) and w1.shape == (2048, 4096)
    ladder = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)
    for i, j in [(0, 0), (0, 1), (1, 0), (127, 128), (128, 127), (1000, 4095), (1023, 2050)]:
        code, scale = q_codes[i * columns + j], 2.0 ** (q_scales[i // 128 * 32 + j // 128] - 127)
        exponent, mantissa = code >> 3, code & 7
        value = (8 + mantissa) / 8 * 2.0 ** (exponent - 7) if exponent else mantissa * 2.0**-9
        assert wq_a[i, j].item() == value * scale
        byte, scale = e_codes[i * 2048 + j // 2], 2.0 ** (e_scales[i * 128 + j // 32] - 127)
        assert w1[i, j].item() == ladder[byte >> 4 if j % 2 else byte & 15] * scale
    weight = read(f"{at}attn_norm.weight", "none", False)["weight"]
    assert weight.dtype == torch.float32 and weight.eq(1.0078125).all()
