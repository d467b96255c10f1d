"""A compiled callable as one CUDA graph: what mode="decode" makes of a call on a GPU.

The first two calls run as they are: kernels load, libraries take their workspaces. The next one is captured, and every
call is a replay from then on. Inputs that stay where they are (parameters, buffers, what `mark_static_address` marks, and
anything large) are used in place, so that state is written where its owner sees it; small ones are copied into tensors of
the graph's own before a replay, and back after it. Results are new tensors, as without capture; those that share memory
with an input in place go on sharing it. A call whose inputs lie elsewhere is captured anew; graphs of several states are
kept side by side. An address is compared before every replay, so the graph holds no input alive and never reads one that
is gone.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import CAPTURE_FAILED, INPUTS_MOVE, NOT_CAPTURED, DSV4Warning

WARM_UPS = 2
GRAPHS = 4  # kept at a time
LARGE = 1 << 20  # bytes; copying more in and out costs more than a capture saves
MOVES = 8  # captures that may be made before they must have paid

Run = Callable[..., Any]


class Device(Protocol):
    """warm: run some work as it will be captured -> its result. capture: record it, without running it -> a function that
    runs it again, and the tensors that hold the result after each run."""

    def warm(self, work: Callable[[], Any]) -> Any: ...

    def capture(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]: ...


class Cuda:
    """torch's CUDA graphs. All graphs of one callable share memory, as no two of them run at once."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def warm(self, work: Callable[[], Any]) -> Any:
        now = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(now)
        with torch.cuda.stream(self.stream):
            result = work()
        now.wait_stream(self.stream)
        for x in result:
            if isinstance(x, Tensor) and x.is_cuda:
                x.record_stream(now)
        return result

    def capture(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        graph = torch.cuda.CUDAGraph()
        with recording(graph, self.stream, self.pool):
            result = work()
        return graph.replay, result


@contextmanager
def recording(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any = None) -> Iterator[None]:
    """`torch.cuda.graph` of one thread, others may use the GPU; and if it fails, all is as before. Torch (2.11 to 2.13) stays
    on the capture's stream then, goes on giving memory to its pool, and takes generators for captured, so that every random
    number raises."""
    before, pool = torch.cuda.current_stream(stream.device), pool or torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.device(stream.device), torch.cuda.graph(graph, pool, stream, "thread_local"):
            yield
    except Exception:
        torch.cuda.set_stream(before)
        with suppress(RuntimeError), torch.cuda.device(stream.device):
            end_pool(stream.device.index, pool)
            anything = torch.zeros(1, device=stream.device)
            with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):  # when it ends, generators are free again
                anything.zero_()
        raise


def end_pool(index: int, pool: Any) -> None:
    """No more memory for a pool, if it still gets any."""
    with suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(index, pool)


class Captured:
    """A callable on flat inputs, replayed. `still`: which inputs are said to stay where they are."""

    def __init__(self, run: Run, still: Sequence[bool], device: Device):
        self.run, self.still, self.device = run, still, device
        self.graphs: list[Graph] = []  # the latest used first
        self.warmed = self.captures = self.replays = 0
        self.off = False

    def __call__(self, *args: Any) -> Any:
        if self.off:
            return self.run(*args)
        graph = self.find(args)
        if graph is None and self.warmed < WARM_UPS:
            self.warmed += 1
            return self.device.warm(lambda: self.run(*args))
        if graph is None and (graph := self.record(args)) is None:
            return self.run(*args)
        self.replays += 1
        return graph(args)

    def find(self, args: Sequence[Any]) -> "Graph | None":
        """The graph that was captured with inputs at these addresses."""
        for at, graph in enumerate(self.graphs):
            if graph.fits(args):
                if at:
                    self.graphs.insert(0, self.graphs.pop(at))
                return graph
        return None

    def record(self, args: Sequence[Any]) -> "Graph | None":
        """Capture a call with these inputs; None if that cannot be done, for good."""
        if self.captures >= MOVES and self.replays < 2 * self.captures:
            self.give_up(INPUTS_MOVE.format(captures=self.captures, replays=self.replays))
            return None
        del self.graphs[GRAPHS - 1 :]
        try:
            graph = Graph(self.run, args, self.still, self.device)
        except Exception as error:
            self.give_up(CAPTURE_FAILED.format(error=f"{type(error).__name__}: {error}"))
            return None
        self.graphs.insert(0, graph)
        self.captures += 1
        return graph

    def give_up(self, why: str) -> None:
        self.off = True
        self.graphs.clear()
        warnings.warn(why, DSV4Warning, stacklevel=4)


class Graph:
    """One capture: where its inputs lie, the copies that it owns, how its results are handed out."""

    def __init__(self, run: Run, args: Sequence[Any], still: Sequence[bool], device: Device):
        tensors = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
        self.copied = [i for i in tensors if not still[i] and not in_place(args[i])]
        self.placed = [i for i in tensors if i not in set(self.copied)]
        self.addresses = [a.data_ptr() if isinstance(a, Tensor) else None for a in args]
        mine = list(args)
        with torch.inference_mode(False):  # usable in every mode
            for i in self.copied:
                mine[i] = torch.empty_strided(
                    args[i].shape, args[i].stride(), dtype=args[i].dtype, device=args[i].device
                )
        self.own = [mine[i] for i in self.copied]
        self.copy_in(args)
        self.replay, result = device.capture(lambda: run(*mine))
        memory = {args[i].untyped_storage().data_ptr(): i for i in self.placed if args[i].numel()}
        self.kind, self.outputs = type(result), [output(x, memory, args) for x in result]

    def fits(self, args: Sequence[Any]) -> bool:
        return lie_at(list(args), self.addresses, self.placed)

    def __call__(self, args: Sequence[Any]) -> Any:
        self.copy_in(args)
        self.replay()
        with torch.no_grad():
            for i, own in zip(self.copied, self.own, strict=True):
                if not args[i].is_inference() or torch.is_inference_mode_enabled():  # else nobody may write to it
                    args[i].copy_(own)
        return self.kind(give(args) for give in self.outputs)

    def copy_in(self, args: Sequence[Any]) -> None:
        with torch.no_grad():
            for i, own in zip(self.copied, self.own, strict=True):
                own.copy_(args[i])


def one_by_one(tensors: list[Any], addresses: list[int | None], places: list[int]) -> bool:
    return all(tensors[i].data_ptr() == addresses[i] for i in places)


# Torch built for CUDA has the same in C++; a whole model has thousands of inputs.
lie_at = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", one_by_one)


def in_place(x: Tensor) -> bool:
    """Whether an input that may move is used where it lies all the same: too large to copy, or with elements that overlap."""
    overlaps = any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True))
    return overlaps or x.numel() * x.element_size() > LARGE


def output(x: Any, memory: dict[int, int], args: Sequence[Any]) -> Callable[[Sequence[Any]], Any]:
    """How a result of the captured call is handed out after a replay, given the inputs of that replay."""
    if not isinstance(x, Tensor):
        return lambda args: x
    i = memory.get(x.untyped_storage().data_ptr()) if x.numel() else None
    if i is None or x.dtype != args[i].dtype:
        return lambda args: x.clone()
    if x is args[i]:
        return lambda args: args[i]
    size, stride, offset = x.shape, x.stride(), x.storage_offset()  # not x itself: it would keep the input alive
    return lambda args: args[i].as_strided(size, stride, offset)


def captured(run: Run, gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Run:
    """`run`, captured on later calls if it works on a GPU; else `run`, with a warning if only its inputs are in the way."""
    devices = {x.device for x in inputs if isinstance(x, Tensor)}
    cuda = [d for d in devices if d.type == "cuda"]
    if not cuda:
        return run
    if why := obstacle(inputs, devices):
        warnings.warn(NOT_CAPTURED.format(why=why), DSV4Warning, stacklevel=3)
        return run
    return Captured(run, stays(gm), Cuda(cuda[0]))


def obstacle(inputs: Sequence[Any], devices: set[torch.device]) -> str:
    """Why calls with such inputs cannot be replayed; empty if they can."""
    if len(devices) > 1:
        return f"its inputs lie on several devices ({', '.join(sorted(map(str, devices)))})"
    sizes = (s for x in inputs for s in (x.shape if isinstance(x, Tensor) else [x]))
    return (
        "its sizes are symbolic (dynamic=True or mark_dynamic)"
        if any(isinstance(s, torch.SymInt) for s in sizes)
        else ""
    )


def stays(gm: torch.fx.GraphModule) -> list[bool]:
    """For each input: a parameter, a buffer or marked by `mark_static_address`."""
    notes = (n.meta.get("tensor_dict") or {} for n in gm.graph.find_nodes(op="placeholder"))
    return [note.get("_dynamo_static_input_type") is not None for note in notes]
