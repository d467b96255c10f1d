"""One CUDA graph a call: what is copied, what is used in place, when it is captured anew. On a CPU a stand-in plays the GPU:
to capture is to run and to undo what that wrote; to replay is to run again on the same tensors."""

import gc
import warnings
import weakref

import pytest
import torch
from torch import nn

from dsv4_compile import cudagraph
from dsv4_compile.cudagraph import Captured, captured
from dsv4_compile.errors import DSV4Warning


class Pretend:
    """Counts what a GPU would do. `written`: the tensors that the work may write."""

    def __init__(self, written=()):
        self.written, self.warmed, self.captures, self.replays = list(written), 0, 0, 0
        self.fails = None

    def warm(self, work):
        self.warmed += 1
        return work()

    def capture(self, work):
        self.captures += 1
        if self.fails:
            raise self.fails
        kept = [w.clone() for w in self.written]
        held = work()
        for tensor, old in zip(self.written, kept, strict=True):
            tensor.copy_(old)

        def replay():
            self.replays += 1
            with torch.inference_mode():  # a GPU does not ask
                for out, new in zip(held, work(), strict=True):
                    if isinstance(out, torch.Tensor) and out is not new:
                        out.copy_(new)

        return replay, held


def step(weight, state, token):
    """Adds the token to the state; results: a new tensor, the state, a view of it, no tensor."""
    state += token
    return state * weight, state, state[1:], 7


def ready(run=step, still=(True, True, False), written=()):
    device = Pretend(written)
    return Captured(run, still, device), device


def test_two_calls_run_and_the_third_is_captured():
    weight, state = torch.full((2,), 2.0), torch.zeros(2)
    call, device = ready(written=[state])
    for n in range(1, 6):
        out, same, view, seven = call(weight, state, torch.ones(2))
        assert torch.equal(out, torch.full((2,), 2.0 * n)) and torch.equal(state, torch.full((2,), 1.0 * n))
        assert same is state and view.data_ptr() == state[1:].data_ptr() and seven == 7
    assert (device.warmed, device.captures, device.replays) == (2, 1, 3)


def test_results_are_not_overwritten_by_the_next_call():
    weight, state = torch.ones(2), torch.zeros(2)
    call, _ = ready(written=[state])
    outs = [call(weight, state, torch.ones(2))[0] for _ in range(5)]
    assert [o[0].item() for o in outs] == [1, 2, 3, 4, 5]


def test_what_an_input_that_moves_was_given_comes_back():
    def count(token):
        token += 1
        return (token * 2,)

    call, device = ready(count, [False])
    for n in range(5):
        token = torch.full((1,), n)
        (out,) = call(token)
        assert token.item() == n + 1 and out.item() == 2 * n + 2
    assert device.captures == 1


def test_another_state_is_captured_beside_the_first():
    weight, a, b = torch.ones(2), torch.zeros(2), torch.zeros(2)
    call, device = ready(written=[a, b])
    for _ in range(4):
        call(weight, a, torch.ones(2))
        call(weight, b, torch.full((2,), 3.0))
    assert a[0] == 4 and b[0] == 12 and device.captures == 2


def test_only_some_graphs_are_kept_and_none_keeps_its_inputs():
    weight, device = torch.ones(2), Pretend()
    call = Captured(step, [True, True, False], device)
    for _ in range(6):
        state = torch.zeros(2)
        device.written = [state]
        for _ in range(4):
            call(weight, state, torch.ones(2))
        gone = weakref.ref(state)
    assert len(call.graphs) == cudagraph.GRAPHS
    call.graphs.clear()
    del state, device.written
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_tokens_of_any_mode_serve_a_graph_of_any_mode(mode):
    weight, state = torch.ones(2), torch.zeros(2)
    call, device = ready(written=[state])
    with mode():
        inside = torch.ones(2)
        for _ in range(3):
            call(weight, state, inside)
    call(weight, state, inside)
    call(weight, state, torch.ones(2))
    assert state[0] == 5 and device.captures == 1


def test_what_is_large_or_overlaps_is_used_in_place():
    large, small = torch.zeros(cudagraph.LARGE // 4 + 1), torch.zeros(1)
    wide = small.expand(4)
    call, _ = ready(lambda *args: (sum(a.sum() for a in args),), [False] * 3)
    for _ in range(4):
        call(large, small, wide)
    (graph,) = call.graphs
    assert graph.copied == [1] and graph.placed == [0, 2]


def test_a_call_that_cannot_be_captured_runs_on_with_one_warning():
    weight, state = torch.ones(2), torch.zeros(2)
    call, device = ready()
    device.fails = RuntimeError("operation not permitted when stream is capturing")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(6):
            call(weight, state, torch.ones(2))
    (message,) = [str(c.message) for c in caught if c.category is DSV4Warning]
    assert "not permitted when stream is capturing" in message and "'capture': False" in message
    assert state[0] == 6 and device.captures == 1


def test_state_that_moves_every_time_ends_capture():
    weight, device = torch.ones(2), Pretend()
    call = Captured(step, [True, True, False], device)
    kept = []
    with pytest.warns(DSV4Warning, match="mark_static_address"):
        for _ in range(cudagraph.MOVES + cudagraph.WARM_UPS + 2):
            kept.append(state := torch.zeros(2))
            device.written = [state]
            out, *_ = call(weight, state, torch.ones(2))
            assert out[0] == 1
    assert device.captures == cudagraph.MOVES and call.off


# In the backend


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4).requires_grad_(False)
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x, state):
        state += x
        self.seen += 1
        return self.linear(state) + self.seen


@pytest.fixture
def pretend(monkeypatch):
    """The backend takes every device for a GPU, played by the `Pretend`s that are listed."""
    devices = []

    def wrap(run, gm, inputs):
        devices.append(Pretend())
        return Captured(run, cudagraph.stays(gm), devices[-1])

    monkeypatch.setattr(cudagraph, "captured", wrap)
    return devices


def test_in_mode_decode_the_compiled_callable_is_captured(pretend):
    model, state = Counter(), torch.zeros(4)
    torch._dynamo.mark_static_address(state)
    compiled = torch.compile(model, backend="dsv4", options={"mode": "decode", "inner": "eager"}, fullgraph=True)
    want, want_state = Counter(), torch.zeros(4)
    want.load_state_dict(model.state_dict())
    with torch.no_grad():
        for n in range(6):
            x = torch.full((4,), float(n))
            if n == 1:
                pretend[0].written = [state, model.seen]
            torch.testing.assert_close(compiled(x, state), want(x, want_state))
    torch.testing.assert_close(state, want_state)
    (device,) = pretend
    assert (device.warmed, device.captures, device.replays) == (2, 1, 4)


def test_other_modes_and_cpus_are_not_captured(pretend, monkeypatch):
    x, state = torch.ones(4), torch.zeros(4)
    with torch.no_grad():
        torch.compile(Counter(), backend="dsv4", options={"inner": "eager"})(x, state)
        assert not pretend
        torch.compile(Counter(), backend="dsv4", options={"inner": "eager", "mode": "prefill"})(x, state)
    assert not pretend
    run = lambda: None  # noqa: E731
    assert captured(run, None, [x, state]) is run


def test_symbolic_sizes_and_two_devices_are_told():
    size = torch.fx.experimental.symbolic_shapes.ShapeEnv().create_unbacked_symint()
    cpu, cuda = torch.device("cpu"), torch.device("cuda:0")
    assert "symbolic" in cudagraph.obstacle([size], {cuda})
    assert "cpu, cuda:0" in cudagraph.obstacle([], {cpu, cuda})
    assert not cudagraph.obstacle([torch.ones(1)], {cuda})


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_captured_call_is_the_call(context):
    with context():
        model, state, want_state = Counter().cuda(), torch.zeros(4, device="cuda"), torch.zeros(4, device="cuda")
        torch._dynamo.mark_static_address(state)
        want = Counter().cuda()
        want.load_state_dict(model.state_dict())
        compiled = torch.compile(model, backend="dsv4", mode="decode", fullgraph=True)
        outs = [compiled(torch.full((4,), float(n), device="cuda"), state) for n in range(8)]
        for n, out in enumerate(outs):
            torch.testing.assert_close(out, want(torch.full((4,), float(n), device="cuda"), want_state))
        torch.testing.assert_close(state, want_state)


@pytest.mark.gpu
def test_a_wait_for_the_gpu_ends_capture_and_the_result_is_right():
    def run(x):
        return (x * int(x.sum().item() > 0),)

    call = Captured(run, [False], cudagraph.Cuda(torch.device("cuda", 0)))
    x, before = torch.ones(3, device="cuda"), torch.cuda.current_stream()
    with pytest.warns(DSV4Warning, match="capturing"):
        for _ in range(4):
            assert torch.equal(call(x)[0], x)
    assert torch.equal(x + 1, torch.full((3,), 2.0, device="cuda"))  # the GPU works on
    assert torch.rand(3, device="cuda").ne(0).any() and torch.cuda.current_stream() == before
    other, large = torch.cuda.Stream(), torch.empty(1 << 24, device="cuda")
    large.record_stream(other)
    address = large.data_ptr()
    del large
    torch.cuda.synchronize()
    assert torch.empty(1 << 24, device="cuda").data_ptr() == address  # memory that another stream used is free again
