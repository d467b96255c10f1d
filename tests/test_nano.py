"""nano: its text, its training, and that what was trained is what the reference model runs."""

import copy
import gzip
import hashlib
import lzma
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dsv4_compile.reference_model import DSV4, DSV4Config, load, nano, train_nano
from dsv4_compile.reference_model.nano import corpus, optim
from dsv4_compile.reference_model.nano.walk import walk
from dsv4_compile.reference_model.quant import dequantize
from dsv4_compile.reference_model.schedule import CSA, HCA

SMALL = {"sliding_window": 16, "compress_rates": {CSA: 4, HCA: 8}, "index_topk": 3, "n_routed_experts": 6}


def small(**changes) -> DSV4:
    """An untrained nano, with every parameter away from its start value, in fp64."""
    torch.manual_seed(0)
    config = DSV4Config.nano().replace(num_hidden_layers=3, **SMALL, **changes)
    model = DSV4(config).double()
    train_nano.initialise(model, 0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1 or name.endswith("ape"):
                p.add_(torch.randn_like(p) * 0.2)
    return model


# Text


def test_split_is_by_module() -> None:
    train, held, shipped = corpus.split(corpus.read())
    assert len(shipped) == 65536 and shipped[:9000] in b"".join(held)
    assert 0.03 < sum(map(len, held)) / (sum(map(len, held)) + sum(map(len, train))) < 0.06
    assert not {hashlib.sha256(t).digest() for t in train if t} & {hashlib.sha256(t).digest() for t in held if t}
    assert nano.heldout() == shipped


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("json/decoder.py", "json"),
        ("test/test_json/test_tool.py", "json"),
        ("test/test_tarfile.py", "tarfile"),
        ("_pydecimal.py", "decimal"),
        ("test/_test_multiprocessing.py", "test_multiprocessing"),
        ("shlex.py", "shlex"),
    ],
)
def test_family(name: str, module: str) -> None:
    assert corpus.family(name) == module


def test_a_changed_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.xz").write_bytes(lzma.compress(b"other"))
    with pytest.raises(ValueError, match="expected " + corpus.SHA256):
        corpus.read(tmp_path / "a.xz")
    with pytest.raises(FileNotFoundError, match="part of a checkout"):
        corpus.read(tmp_path / "b.xz")


def test_build_is_deterministic(tmp_path: Path) -> None:
    for name in ("LICENSE.txt", "b.py", "a.py", "encodings/x.py", "a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "large.py").write_text("#" * 200_001)
    first = corpus.build(tmp_path)
    (tmp_path / "a.py").touch()
    assert corpus.build(tmp_path) == first
    assert [first.count(name.encode()) for name in ("LICENSE.txt", "a.py", "b.py", "large.py", "x.py")] == [
        2,
        2,
        2,
        0,
        0,
    ]


def test_bytes_and_tokens() -> None:
    assert nano.encode(b"a\xff").tolist() == [nano.BOS, 97, 255]
    assert nano.decode(torch.tensor([nano.BOS, 97, 255, nano.EOS, nano.PAD])) == b"a\xff"


def test_bits_per_byte_of_a_known_model() -> None:
    class Repeats(torch.nn.Module):
        def forward(self, tokens):
            seen.append(tokens)
            return F.one_hot(tokens, 257) * 2.0

    text = bytes([*range(49), 48, 0])  # one byte in 51 is the one before it
    bits = [math.log2(math.exp(2) + 256) - gain / math.log(2) for gain in (0, 2)]
    for batch, shapes in ((1, [(1, 20), (1, 20), (1, 11)]), (3, [(2, 20), (1, 11)]), (2, [(2, 20), (1, 11)])):
        seen: list[torch.Tensor] = []
        have = nano.bits_per_byte(Repeats(), text, length=20, batch=batch)
        assert have == pytest.approx((50 * bits[0] + bits[1]) / 51)
        assert [tuple(t.shape) for t in seen] == shapes and all((t[:, 0] == nano.BOS).all() for t in seen)


def test_sampler_draws_the_text() -> None:
    sampler = train_nano.Sampler([b"abc", b"", b"de"], torch.device("cpu"), 0)
    assert sampler.text.tolist() == [*b"abc", nano.EOS, *b"de", nano.EOS]
    rows = sampler.draw(50, 3)
    assert rows.shape == (50, 5) and (rows[:, 0] == nano.BOS).all()
    whole = sampler.text.tolist()
    assert {tuple(r[1:].tolist()) for r in rows} == {tuple(whole[i : i + 4]) for i in range(4)}


# Training


def test_walk_is_the_reference_model() -> None:
    model = small()
    tokens = torch.randint(0, 256, (2, 49))
    logits, ahead = model(tokens[:, :-1], mtp=True)
    step = model.step(torch.zeros(2, dtype=torch.int64), 48, None, None)
    out = walk(model, tokens, step)
    torch.testing.assert_close(out.logits, logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(out.mtp_logits[:, :-1], ahead, rtol=1e-9, atol=1e-9)
    assert [int(load.sum()) for load in out.loads] == [2 * 48 * 4] * 4
    assert all(0 < float(share) < 1 for share in out.captured)

    def gradients(*losses: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        sum(losses).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    want = gradients(logits.square().sum(), ahead.square().sum())
    have = gradients(out.logits.square().sum(), out.mtp_logits[:, :-1].square().sum())
    assert want.keys() == have.keys() and not any("indexer" in name for name in want)
    for name in want:
        torch.testing.assert_close(
            have[name], want[name], rtol=1e-7, atol=1e-7 * float(want[name].abs().max()), msg=name
        )


def test_only_the_indexer_learns_from_its_loss() -> None:
    model = small()
    tokens = torch.randint(0, 256, (1, 33))
    step = model.step(torch.zeros(1, dtype=torch.int64), 32, None, None)
    indexer = [p for name, p in model.named_parameters() if ".indexer." in name]
    adam = torch.optim.Adam(indexer, lr=0.03)
    losses = []
    for _ in range(20):
        model.zero_grad()
        loss = torch.stack(walk(model, tokens, step).index_loss).sum()
        loss.backward()
        adam.step()
        losses.append(float(loss.detach()))
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {name for name, _ in model.named_parameters() if ".indexer." in name}
    assert 0 < losses[-1] < losses[0] / 2


def test_dense_walk_ignores_the_picks() -> None:
    model = small()
    tokens = torch.randint(0, 256, (1, 33))
    step = model.step(torch.zeros(1, dtype=torch.int64), 32, None, None)
    with torch.no_grad():
        dense, sparse = walk(model, tokens, step, dense=True).logits, walk(model, tokens, step).logits
        everything = DSV4(model.config.replace(index_topk=8)).double()
        everything.load_state_dict(model.state_dict())
        torch.testing.assert_close(dense, everything(tokens[:, :-1]))
    assert (dense - sparse).abs().max() > 1e-3


def test_walk_refuses_a_ragged_length() -> None:
    model = small()
    step = model.step(torch.zeros(1, dtype=torch.int64), 30, None, None)
    with pytest.raises(ValueError, match="30 tokens: training needs a multiple of the window, 16"):
        walk(model, torch.zeros(1, 31, dtype=torch.int64), step)


def test_orthogonalise() -> None:
    m = torch.randn(3, 16, 40)
    m[1] *= 1e-3
    singular = torch.linalg.svdvals(optim.orthogonalise(m))
    assert 0.6 < float(singular.min()) and float(singular.max()) < 1.3


def test_optimizer_moves_masters_and_publishes_the_stored_format() -> None:
    config = DSV4Config.nano().replace(num_hidden_layers=2, **SMALL)
    target = config.replace(linear_format="fp8", expert_format="mxfp4")
    model = DSV4(config)
    before = copy.deepcopy(model.state_dict())
    kinds = optim.formats(DSV4(target))
    assert kinds["layers.0.ffn.experts.w1.weight"] == "mxfp4" and kinds["mtp.0.e_proj.weight"] == "fp8"
    optimizer = optim.Optimizer(model, kinds, 1e-2, 1e-2, 0.0)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step(1.0)
    optimizer.publish(False)
    fixed = [name for name, t in model.state_dict().items() if torch.equal(t, before[name])]
    assert all(name.endswith(("gate.bias", "tid2eid")) for name in fixed)
    size = (model.layers[0].attn.wkv.weight - before["layers.0.attn.wkv.weight"]).square().mean().sqrt()
    assert float(size) == pytest.approx(0.2 * 1e-2, rel=0.2)
    rounded = train_nano.stored(model, target)
    optimizer.publish(True)
    for name, format in kinds.items():
        module = rounded.get_submodule(name.removesuffix(".weight"))
        want = dequantize(module.weight, module.scale, None, format)
        assert torch.equal(model.get_parameter(name), want), name


def test_balance_helps_idle_experts() -> None:
    model = DSV4(DSV4Config.nano().replace(num_hidden_layers=3, **SMALL))
    loads = [torch.tensor([9, 1, 5, 5, 0, 10])] * 4
    optim.balance(model, loads, 0.5)
    assert model.layers[2].ffn.gate.bias.tolist() == [-0.5, 0.5, 0, 0, 0.5, -0.5]
    assert model.layers[0].ffn.gate.bias is None


def test_rate_warms_up_holds_and_decays() -> None:
    assert train_nano.rate(0.0) == pytest.approx(0.01)
    assert train_nano.rate(0.3) == 1.0
    assert train_nano.rate(0.7) == pytest.approx(0.5)
    assert train_nano.rate(0.9999) == pytest.approx(0.01)


def test_training_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--steps", "3", "--batch", "1", "--seq", "64", "--eval-bytes", "200", "--device", "cpu"]
    train_nano.main([*options, "--out", str(tmp_path)], DSV4Config.nano().replace(num_hidden_layers=3, **SMALL))
    log = (tmp_path / "training.txt").read_text()
    assert log == capsys.readouterr().out
    lines = log.splitlines()
    first = float(next(line for line in lines if line.split()[1:2] == ["1"]).split()[4])
    last = float(next(line for line in lines if line.split()[1:2] == ["3"]).split()[4])
    assert first == pytest.approx(math.log2(260), rel=0.05) and last < first
    text = corpus.split(corpus.read())[2][:200]
    model = load(tmp_path / "nano.safetensors")
    assert (model.config.linear_format, model.config.expert_format) == ("fp8", "mxfp4")
    row = next(line for line in lines if line.startswith("shipped")).split()[3:]
    assert float(row[1]) == pytest.approx(nano.bits_per_byte(model, text), abs=1e-3)
    assert float(row[3]) == pytest.approx(8 * len(gzip.compress(text, 9)) / 200, abs=1e-4)
    logits = load(tmp_path / "bf16.safetensors")(nano.encode(text)[None, :-1])
    bits = F.cross_entropy(logits[0], nano.encode(text)[1:]).item() / math.log(2)
    assert float(row[0]) == pytest.approx(bits, abs=1e-3)
