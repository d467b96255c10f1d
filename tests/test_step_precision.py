"""How much rounding costs in a decode step: the compiled model in bf16 against eager in bf16, both held against eager in fp64,
all from the same state. On a GPU layers are as wide as DeepSeek-V4-Flash's and run by their kernels: `pytest -m gpu`.

Choices cannot differ, so that nothing has to be replayed, which would bring other kernels: a bias prefers the same experts for
all tokens, the table of a hash layer says which, and the indexer may take every entry there is. Held to the limit are the root
mean square of the error of all logits, and the mean over the rows of each one's largest; see `test_precision`.
"""

import copy

import pytest
import torch

import dsv4_compile
from dsv4_compile.reference_model import DSV4, DSV4Config, State
from dsv4_compile.reference_model.model import Router
from dsv4_compile.reference_model.schedule import CSA, HCA, SWA

LIMIT = 1.05
KINDS = (SWA, CSA, HCA)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FORMATS = {"plain": ("none", "none"), "stored": ("fp8", "mxfp4")}  # of dense weights, and of experts
POSITIONS = (638, 639)  # tokens seen before: the second step closes a window of 4, and of 128


def model_of(device: str, formats: tuple[str, str]) -> DSV4:
    """A layer of each kind; all experts' bias is drawn, and some are far ahead."""
    config = DSV4Config.flash() if device == "cuda" else DSV4Config.tiny()
    fields = dict(num_hidden_layers=3, layer_types=KINDS, mlp_layer_types=("hash_moe", "moe", "moe"))
    fields |= dict(linear_format=formats[0], expert_format=formats[1], mtp_expert_format=formats[1])
    fields |= dict(num_nextn_predict_layers=0, index_topk=256, max_position_embeddings=4096)
    fields |= dict(n_routed_experts=16, vocab_size=2048) if device == "cuda" else dict(moe_intermediate_size=64)
    torch.manual_seed(0)
    with torch.device(device):
        model = DSV4(config.replace(**fields)).eval().requires_grad_(False)
        for p in model.parameters():
            if p.dtype == torch.float32 and bool((p == p.flatten()[0]).all()):
                p.add_(torch.randn_like(p) * 0.3)
        for router in (m for m in model.modules() if isinstance(m, Router) and m.bias is not None):
            router.bias.add_(10.0 * (torch.randperm(len(router.bias)) < router.k))
    return model.to(torch.bfloat16)


def state_of(model: DSV4, batch: int, position: int, seed: int) -> State:
    """As if so many tokens had been seen."""
    torch.manual_seed(seed)
    state = model.new_state(batch, POSITIONS[-1] + 1)
    for part in state.tensors():
        if part.is_floating_point():
            part.normal_()
    state.position.fill_(position)
    return state


def widened(model: DSV4, state: State) -> State:
    """The same numbers, as `model` keeps them."""
    wide = model.new_state(len(state.position), POSITIONS[-1] + 1)
    for part, value in zip(wide.tensors(), state.tensors(), strict=True):
        part.copy_(value)
    return wide


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_step_rounds_no_worse_than_eager(device, formats, batch):
    model = model_of(device, FORMATS[formats])
    wide = copy.deepcopy(model).double()
    compiled = torch.compile(model, backend="dsv4", options={"inner": "eager", "strict": True})
    square, rows = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for seed, position in enumerate(POSITIONS * max(2, 16 // batch)):
            tokens = torch.randint(0, model.config.vocab_size, (batch, 1), device=device)
            state = state_of(model, batch, position, seed)
            want = wide(tokens, widened(wide, state))[:, -1]
            for i, run in enumerate((model, compiled)):
                off = (run(tokens, copy.deepcopy(state))[:, -1].double() - want).abs()
                square[i] += off.square().sum().cpu()
                rows[i] += off.amax(-1).sum().cpu()
    if device == "cuda":
        ran = {op for (op, how) in dsv4_compile.reports()[-1].runs if how.startswith("cuda")}
        assert {"attention", "experts", "mhc_boundary", "indexer", "output_projection", "head"} <= ran, ran
    ratio = (square[1] / square[0]).sqrt().item(), (rows[1] / rows[0]).item()
    print(f"\n{device}, {formats}, {batch}: {ratio[0]:.3f} of eager's root mean square error, {ratio[1]:.3f} by rows")
    assert max(ratio) <= LIMIT
