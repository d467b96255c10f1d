"""The golden run of nano: what the shipped checkpoint said when it was accepted, it says today, on every device.

`golden/nano.json` holds the prompt's length, the greedy tokens after it, the size of the streams after every layer, the
discrete choices, and bits per byte. DSV4_UPDATE_GOLDEN=1 writes it anew, to be looked at before it is committed.
"""

import json
import os
from pathlib import Path

import pytest
import torch

from dsv4_compile.reference_model import Selection, generate, load
from dsv4_compile.reference_model.nano import CHECKPOINT, bits_per_byte, encode, heldout

GOLDEN = Path(__file__).parent / "golden" / "nano.json"
PROMPT, NEW, TEXT = 300, 64, 8192  # tokens, tokens, bytes

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.gpu),
]


def run(device: str) -> dict:
    model = load(CHECKPOINT, device=device, dtype=torch.float32)
    prompt = encode(heldout()[: PROMPT - 1]).unsqueeze(0).to(device)
    rms: list[float] = []
    hooks = [
        layer.register_forward_hook(lambda module, args, out: rms.append(out[0].square().mean().sqrt().item()))
        for layer in model.layers
    ]
    selection = Selection()
    logits = model(prompt, selection=selection)
    for hook in hooks:
        hook.remove()
    return dict(
        prompt=PROMPT,
        tokens=torch.cat(list(generate(model, prompt, NEW))).tolist(),
        stream_rms=rms,
        logit_rms=logits.square().mean().sqrt().item(),
        **chosen(selection),
        bits_per_byte=bits_per_byte(model, heldout()[:TEXT], device=device),
    )


def chosen(selection: Selection) -> dict:
    """The choices at every tenth or fifth place of the prompt."""
    return dict(
        experts=[e[: PROMPT : PROMPT // 10].sort(-1).values.tolist() for e in selection.experts],
        entries=[
            None if e is None else e[0, : PROMPT : PROMPT // 5].sort(-1).values.tolist() for e in selection.entries
        ],
    )


def check_choices(got: dict, want: dict) -> None:
    for name in ("experts", "entries"):
        pairs = [(a, b) for x, y in zip(got[name], want[name], strict=True) if x for a, b in zip(x, y, strict=True)]
        assert sum(a != b for a, b in pairs) <= 0.01 * len(pairs), f"{name} were chosen otherwise"  # near ties apart


@pytest.mark.parametrize("device", DEVICES)
def test_nano_says_what_it_said(device):
    got = run(device)
    if os.environ.get("DSV4_UPDATE_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(got) + "\n")
    want = json.loads(GOLDEN.read_text())
    assert got["tokens"] == want["tokens"]
    for name in ("stream_rms", "logit_rms", "bits_per_byte"):
        assert got[name] == pytest.approx(want[name], rel=1e-4), name
    check_choices(got, want)


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_nano_says_it_too(device):
    want = json.loads(GOLDEN.read_text())
    model = load(CHECKPOINT, device=device, dtype=torch.float32)
    compiled = torch.compile(model, backend="dsv4", options={"inner": "eager"}, dynamic=False, fullgraph=True)
    text = torch.cat([encode(heldout()[: PROMPT - 1]), torch.tensor(want["tokens"])]).to(device)
    selection = Selection()
    logits = compiled(text[:-1].unsqueeze(0), selection=selection)[0]
    assert logits[PROMPT - 1 :].argmax(-1).tolist() == want["tokens"]
    assert logits[:PROMPT].square().mean().sqrt().item() == pytest.approx(want["logit_rms"], rel=1e-4)
    check_choices(chosen(selection), want)
