"""`dsv4 run`: the whole job on a small model, and one clear error for each kind of bad input."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from dsv4_compile.accuracy.verify import Check
from dsv4_compile.commands import cli, measure, run
from dsv4_compile.commands.screen import Screen
from dsv4_compile.commands.text import Bytes, Pieces, text_of
from dsv4_compile.reference_model import DSV4, DSV4Config, nano, save
from dsv4_compile.reporting.report import GraphReport, Report

CONFIG = DSV4Config.nano().replace(
    hidden_size=32,
    moe_intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    head_dim=16,
    qk_rope_head_dim=8,
    q_lora_rank=16,
    o_groups=2,
    o_lora_rank=8,
    sliding_window=8,
    index_n_heads=8,
    index_head_dim=16,
    index_topk=4,
    n_routed_experts=6,
    num_experts_per_tok=2,
    hc_sinkhorn_iters=3,
    max_position_embeddings=128,
    num_nextn_predict_layers=0,
)


@pytest.fixture(scope="module")
def model() -> DSV4:
    torch.manual_seed(0)
    return DSV4(CONFIG).eval().requires_grad_(False)


@pytest.fixture
def folder(model: DSV4, tmp_path: Path) -> Path:
    save(model, tmp_path / "model")
    return tmp_path / "model"


def call(*arguments: object):
    return CliRunner().invoke(cli.app, ["run", *map(str, arguments)])


# The job


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory):
    """One run of the job on a single layer: what it printed, and its report."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    save(DSV4(CONFIG.replace(num_hidden_layers=1)), folder / "model")
    report = folder / "report.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "TEXT_BYTES", 300)
        patch.setattr(run, "TIMED_STEPS", 4)
        patch.setattr(nano, "heldout", lambda: b"a text that nobody trained on\n" * 20)
        arguments = "--prompt", "def ", "--max-new-tokens", 12, "--inner", "eager", "--report", report
        result = call("--model", folder / "model", *arguments)
    return result, report


def test_run_succeeds(done) -> None:
    result, _ = done
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("def ")
    for row in ("compile, s", "weights, MB", "state, MB", "prefill, tokens/s", "decode, tokens/s", "bits per byte"):
        assert row in result.stdout
    assert "compiling decode" in result.stderr


def test_report_holds_what_was_measured(done) -> None:
    _, file = done
    report = json.loads(file.read_text())
    assert set(report) == {
        *("sites", "counts", "compile_s", "first_token_s", "prefill_tok_s", "decode_tok_s"),
        *("max_logit_error", "median_logit_error", "p99_logit_error", "choices_changed", "bits_per_byte", "recompiles"),
        "memory_mb",
    }
    weights = sum(p.numel() * p.element_size() for p in DSV4(CONFIG.replace(num_hidden_layers=1)).state_dict().values())
    assert report["memory_mb"]["weights"] == pytest.approx(weights / 1e6, rel=0.01)
    assert report["memory_mb"]["state"] > 0 and report["memory_mb"]["beside"] is None
    assert report["recompiles"] == 0
    assert 0 < report["first_token_s"] and 0 < report["compile_s"]
    for rates in (report["prefill_tok_s"], report["decode_tok_s"]):
        assert rates["compiled"] > 0 and rates["eager"] > 0 and rates["inductor"] is None
    assert report["max_logit_error"] < 1e-4 and report["choices_changed"] < 0.01
    compiled, eager = report["bits_per_byte"]["compiled"], report["bits_per_byte"]["eager"]
    assert compiled == pytest.approx(eager, abs=1e-4) and 7 < eager < 12  # untrained: about log2(260)


def test_what_verify_found_is_told(monkeypatch, capsys) -> None:
    checks = [Check("a", "rule", "op", "here", "layer"), Check("b", "rule", "op", "here", "layer", reason="wrong")]
    monkeypatch.setattr(run, "reports", lambda: [Report([GraphReport(checks=checks)])])
    run.Job(run.Ask(), Screen(), 0.0).tell_checks("decode")
    assert "verify, decode: 2 rewrites tried, 1 left out as wrong" in capsys.readouterr().err


# What is measured


def test_prefill_in_chunks_is_the_whole_sequence(model: DSV4) -> None:
    runner = measure.Runner(model, measure.Sizes(chunk=16, max_len=64))
    tokens = [256, *b"not a multiple of the chunk, hence a padded one"]
    state = runner.state()
    with torch.inference_mode():
        logits = runner.prefill(model, tokens, state)
        torch.testing.assert_close(logits, model(torch.tensor([tokens]))[0], rtol=1e-4, atol=1e-4)
        following = runner.decode(model, 65, state)
        whole = model(torch.tensor([[*tokens, 65]]))[0, -1]
    torch.testing.assert_close(following, whole, rtol=1e-4, atol=1e-4)


def test_bits_per_byte(model: DSV4) -> None:
    text = bytes(range(32, 127)) * 3
    runner = measure.Runner(model, measure.Sizes(chunk=32, max_len=64))
    parts = measure.windows([256], list(text), 64)
    assert [len(a) for a, _ in parts] == [len(b) for _, b in parts] == [64, 64, 64, 64, 29]
    ticks: list[int] = []
    with torch.inference_mode():
        read = measure.reading(runner, {"eager": model}, parts, len(text), lambda: ticks.append(1))
    assert len(ticks) == 5
    assert read.bits_per_byte["eager"] == pytest.approx(nano.bits_per_byte(model, text, 64), abs=1e-5)
    assert read.error == {"eager": 0.0}


def test_a_wrong_forward_is_seen(model: DSV4) -> None:
    runner = measure.Runner(model, measure.Sizes(chunk=16, max_len=64))

    def wrong(*args: object, **kwargs: object) -> torch.Tensor:
        return model(*args, **kwargs) + 0.5

    forwards = {"compiled": wrong, "eager": model}
    with torch.inference_mode():
        decoded = measure.decoding(runner, forwards, list(b"prompt"), list(b"and more"), lambda: None)
        read = measure.reading(runner, forwards, [([256, 65], [65, 66])], 2, lambda: None)
    assert decoded.error["compiled"] == pytest.approx(0.5, abs=1e-4)
    assert decoded.median["compiled"] == pytest.approx(0.5, abs=1e-4) and decoded.tail["eager"] == 0
    assert read.error["compiled"] == pytest.approx(0.5, abs=1e-4)
    assert measure.distance(torch.tensor([math.nan]), torch.zeros(1)) != 0


def test_other_choices_are_counted_apart_from_the_error() -> None:
    """The router's bias decides which experts are chosen and nothing else."""
    model = DSV4(CONFIG.replace(mlp_layer_types=("moe", "moe"))).eval().requires_grad_(False)
    runner, other = measure.Runner(model, measure.Sizes(chunk=16, max_len=64)), copy.deepcopy(model)
    for layer in other.layers:
        layer.ffn.gate.bias.normal_(std=10.0)
    parts = [(list(range(65, 95)), list(range(66, 96)))]
    with torch.inference_mode():
        read = measure.reading(runner, {"compiled": other, "eager": model}, parts, 30, lambda: None)
    assert read.changed["compiled"] > 0.1 and read.changed["eager"] == 0
    assert read.error["compiled"] < 1e-4


def test_the_copy_for_plain_inductor_has_the_same_weights() -> None:
    """And no e8m0, which Inductor alone cannot hand to region bodies."""
    formats = dict(linear_format="fp8", expert_format="mxfp4", moe_intermediate_size=32)
    model = DSV4(CONFIG.replace(**formats)).eval().requires_grad_(False)
    with torch.inference_mode():
        other, tokens = measure.with_plain_scales(model), torch.arange(9).unsqueeze(0)
        assert torch.equal(other(tokens), model(tokens))
    before, after = (dict(m.named_parameters()) for m in (model, other))
    changed = {name for name, p in before.items() if after[name] is not p}
    assert changed == {name for name, p in before.items() if p.dtype == torch.float8_e8m0fnu} and changed
    assert torch.float8_e8m0fnu not in {p.dtype for p in after.values()}


# Text


def test_bytes_stream_whole_characters() -> None:
    text, show = "né ✓", Bytes().stream()
    assert [show(t) for t in [*Bytes().encode(text), 257]] == ["n", "", "é", " ", "", "", "✓", ""]


@pytest.fixture
def tokenizer(folder: Path) -> Path:
    """A byte-level BPE tokenizer of 256 tokens beside the model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_pieces_stream_whole_characters(tokenizer: Path) -> None:
    text = text_of(tokenizer, CONFIG)
    assert isinstance(text, Pieces)
    show, ids = text.stream(), text.encode("né ✓")
    assert len(ids) == 7
    assert [show(i) for i in ids] == ["n", "", "é", " ", "", "", "✓"]


# Bad input


def refuse(result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    text = " ".join(result.stderr.split())
    for word in words:
        assert word in text


def test_unknown_pass() -> None:
    refuse(call("--disable", "raise.rms_nrm"), "unknown pass 'raise.rms_nrm'", "did you mean 'raise.rms_norm'?")


def test_unknown_option() -> None:
    refuse(call("--max-new-token", 3), "No such option", "--max-new-tokens")


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--inner", "inducto", ("unknown inner 'inducto'", "did you mean 'inductor'?")),
        ("--device", "tpu", ("--device tpu", "cpu, cuda or cuda:N")),
        ("--device", "cuda:99", ("--device cuda:99", "use --device cpu")),
        ("--dtype", "bfloat", ("unknown dtype 'bfloat'", "did you mean 'bfloat16'?")),
        ("--compare", "eager", ("--compare eager", "expected inductor")),
        ("--temperature", "-1", ("--temperature -1.0", "expected 0 (greedy) or more")),
        ("--report", "/no/such/folder/report.json", ("--report /no/such/folder/report.json", "folder that exists")),
        ("--model", "/no/such/model", ("/no/such/model", "expected a folder")),
    ],
)
def test_bad_value(option: str, value: str, words: tuple[str, ...]) -> None:
    refuse(call(option, value), *words)


@pytest.mark.parametrize(
    ("new", "prompt", "words"),
    [
        (16, "x" * 120, ("the prompt has 121 tokens", "is 128", "at most 7")),
        (0, "x", ("--max-new-tokens 0", "at least 1")),
    ],
)
def test_what_does_not_fit_the_context(folder: Path, new: int, prompt: str, words: tuple[str, ...]) -> None:
    refuse(call("--model", folder, "--max-new-tokens", new, "--prompt", prompt), *words)


def test_wrong_config(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"hidden_size": -32}))
    refuse(call("--model", folder), "hidden_size=-32", "expected a positive integer")


def test_config_of_another_size(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"hidden_size": 64}))
    refuse(call("--model", folder), "embed.weight", "[260, 64]", "[260, 32]")


def test_truncated_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refuse(call("--model", folder), str(file), "cut off or damaged")


def test_corrupt_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(b"\xff" * 16 + file.read_bytes()[16:])
    refuse(call("--model", folder), str(file), "cut off or damaged")


def test_nan_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    broken = DSV4(CONFIG).requires_grad_(False)
    broken.layers[1].ffn.gate.weight[0, 0] = math.nan
    save(broken, tmp_path / "model")
    refuse(call("--model", tmp_path / "model"), "layers.1.ffn.gate.weight", "NaN")


def test_no_compiler() -> None:
    import torch._inductor.config as inductor

    with inductor.patch({"cpp.cxx": (None, "no-such-compiler")}):
        refuse(call("--device", "cpu"), "no-such-compiler", "install one", "DSV4_INNER=eager")


def test_damaged_tokenizer(tokenizer: Path) -> None:
    (tokenizer / "tokenizer.json").write_text("{}")
    refuse(call("--model", tokenizer), "tokenizer.json", "fetch the file again")


def test_tokenizer_of_another_model(tokenizer: Path) -> None:
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {f"extra{i}": 256 + i for i in range(50)}
    (tokenizer / "tokenizer.json").write_text(json.dumps(content))
    refuse(call("--model", tokenizer), "has 306 tokens", "vocab_size is 260")
