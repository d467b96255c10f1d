"""A decode step that stays on the device: its random numbers, its text, and itself as one CUDA graph."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity

from dsv4_compile import cudagraph
from dsv4_compile.commands import measure
from dsv4_compile.commands.ring import Ring
from dsv4_compile.reference_model import DSV4, DSV4Config, Loop, decode_step, draw, generate, load, nano
from dsv4_compile.reference_model.sample import argmax, philox
from dsv4_compile.reference_model.schedule import CSA, HCA, SWA

KINDS = (SWA, CSA, HCA)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def small(kinds=KINDS) -> DSV4:
    routers = ("hash_moe", *("moe",) * 2)[-len(kinds) :]
    fields = dict(num_hidden_layers=len(kinds), layer_types=kinds, mlp_layer_types=routers)
    torch.manual_seed(0)
    config = DSV4Config.tiny().replace(**fields, hc_sinkhorn_iters=2, num_nextn_predict_layers=0)
    return DSV4(config).eval().requires_grad_(False)


def text(step, model, loop, count: int) -> torch.Tensor:
    """[B, count]"""
    return torch.cat([step(model, loop).clone() for _ in range(count)], 1)


def started(model, prompt, temperature=0.0, seed=0) -> Loop:
    """A loop after a prompt [B, T]."""
    state = model.new_state(len(prompt), 64)
    model(prompt[:, :-1], state)
    return Loop.start(state, prompt[:, -1], temperature, seed)


@pytest.fixture
def prompt():
    return torch.randint(0, 100, (2, 5), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("low", "high", "key", "bits"),
    [(0, 0, 0, 0xFF1DAE59), (-1, -1, -1, 0x2C3F628B), (0x243F6A88, 0x85A308D3, 0x13198A2E, 0xDD7CE038)],
)
def test_philox_gives_the_published_numbers(low, high, key, bits):
    assert philox(*(torch.tensor([x]) for x in (low, high, key))).item() == bits


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_follow_the_distribution(temperature):
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    heat, seed = torch.tensor([temperature]), torch.tensor([3])
    picks = draw(logits.expand(40_000, 4), heat, seed, torch.arange(40_000))
    shares = torch.bincount(picks, minlength=4) / len(picks)
    torch.testing.assert_close(shares, F.softmax(logits / temperature, -1), rtol=0, atol=0.01)


def test_noise_differs_by_seed_row_and_position_and_is_off_at_zero():
    logits, heat = torch.randn(3, 50).expand(3, 50), torch.ones(1)

    def noise(seed, position):
        return draw(torch.zeros(3, 1000), heat, torch.tensor([seed]), torch.full((3,), position)).tolist()

    found = noise(0, 0), noise(1, 0), noise(0, 1)
    assert len({n for numbers in found for n in numbers}) == 9 and noise(0, 0) == found[0]
    assert torch.equal(draw(logits, torch.zeros(1), torch.tensor([5]), torch.tensor([0, 1, 2])), logits.argmax(-1))


@pytest.mark.parametrize("V", [1, 3, 511, 512, 513, 3000])
@pytest.mark.parametrize("device", DEVICES)
def test_the_largest_in_two_stages_is_the_first_of_equal_ones(V, device):
    x = torch.randint(0, 3, (4, V), device=device).float()
    x[0], x[1, : V // 2] = -float("inf"), -float("inf")
    assert torch.equal(argmax(x), (x == x.max(-1, keepdim=True).values).float().argmax(-1))
    assert torch.equal(argmax(x).cpu(), x.cpu().argmax(-1))


def test_a_loop_continues_as_generate_does(prompt):
    model = small()
    want = torch.stack(list(generate(model, prompt, 8)), 1)
    assert torch.equal(text(decode_step, model, started(model, prompt), 8), want)


def test_the_seed_decides_the_text(prompt):
    model = small()
    one, again, other = (text(decode_step, model, started(model, prompt, 1.0, seed), 8) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_a_compiled_step_is_captured_and_gives_the_same_text(prompt, monkeypatch):
    """On a CPU, with a stand-in for the GPU: what is captured writes nothing but the loop. CSA has every kind of memory."""
    model = small(KINDS[1:2])
    loop, plain = started(model, prompt, 1.0, 7), started(model, prompt, 1.0, 7)
    captures = []

    class Pretend:
        warm = staticmethod(lambda work: work())

        @staticmethod
        def capture(work):
            kept = copy.deepcopy(loop)
            held = work()
            captures.append(len(held))
            for name, old in vars(kept).items():
                if name != "state":
                    getattr(loop, name).copy_(old)
            loop.state.position.copy_(kept.state.position)  # the rings are written again with the same rows
            return work, held

    monkeypatch.setattr(
        cudagraph, "captured", lambda run, gm, inputs: cudagraph.Captured(run, [True] * len(inputs), Pretend())
    )
    step = torch.compile(decode_step, backend="dsv4", options={"mode": "decode", "inner": "eager"}, fullgraph=True)
    assert torch.equal(text(step, model, loop, 8), text(decode_step, model, plain, 8))
    assert len(captures) == 1


@pytest.mark.parametrize("device", DEVICES)
def test_the_ring_gives_tokens_in_order_and_does_not_overrun(device):
    ring, got = Ring(torch.device(device), slots=2), []
    for n in range(5):
        ring.put(torch.full((1, 1), n, device=device))
        if n:
            got.append(ring.get())
    assert got == [0, 1, 2, 3] and ring.get() == 4
    ring.put(torch.zeros(1))
    ring.put(torch.zeros(1))
    with pytest.raises(RuntimeError, match="get"):
        ring.put(torch.zeros(1))


def test_loops_that_nobody_waits_for_are_timed():
    model = small()
    runner = measure.Runner(model, measure.Sizes(8, 48))
    ours = partial(measure.step, runner, model)
    with torch.no_grad():
        rates = measure.free_running(runner, {"compiled": ours}, [1, 2, 3], 12, lambda: None)
    assert set(rates) == {"compiled", "eager"} and all(r > 0 for r in rates.values())


# On a GPU


@pytest.fixture(scope="module")
def model():
    return load(nano.CHECKPOINT, dtype=torch.float32)


@pytest.mark.gpu
def test_several_rows_draw_what_the_cpu_draws():
    args = torch.randn(3, 5000), torch.full((1,), 0.8), torch.full((1,), 3), torch.tensor([4, 4, 90])
    got = torch.compile(draw, dynamic=False, fullgraph=True)(*(a.cuda() for a in args))
    assert torch.equal(got.cpu(), draw(*args))


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_nano_as_one_graph_writes_the_text_that_the_cpu_writes(model, temperature):
    """fp32, greedy and sampled: tokens equal; a steady step waits for nothing, compiles nothing and is one launch."""
    prompt = nano.encode(b"def main(").unsqueeze(0)
    with torch.inference_mode():
        want = text(decode_step, model, started(model, prompt, temperature, 3), 40)
        there = copy.deepcopy(model).cuda()
        loop = started(there, prompt.cuda(), temperature, 3)
        step = torch.compile(decode_step, backend="dsv4", mode="decode", fullgraph=True)
        begin = text(step, there, loop, 4)  # compiles, warms up twice, captures
        graphs = counters["stats"]["unique_graphs"]
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profile:
            torch.cuda.set_sync_debug_mode("error")
            try:
                tokens = [step(there, loop).clone() for _ in range(36)]
            finally:
                torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
        assert torch.equal(torch.cat([begin, *tokens], 1).cpu(), want)
    assert counters["stats"]["unique_graphs"] == graphs
    assert [e.name for e in profile.events()].count("cudaGraphLaunch") == 36
