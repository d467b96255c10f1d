"""Time on a GPU, or of the host where there is none, and what a call puts on the device."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import torch


@dataclass(frozen=True)
class Span:
    """A kernel, copy or fill that ran from `start` to `end`, in us."""

    name: str
    start: float
    end: float


class Clock:
    def __init__(self, device: torch.device):
        self.device, self.on_gpu = device, device.type == "cuda"

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def us(self, work: Callable[[], object], rounds: int = 9, calls: int = 10) -> float:
        """Median time of one of `calls` calls that follow each other."""
        times = []
        for _ in range(rounds):
            self.wait()
            start = perf_counter()
            for _ in range(calls):
                work()
            self.wait()
            times.append((perf_counter() - start) / calls * 1e6)
        return median(times)

    def read_bandwidth(self) -> float:
        """Bytes a second that one long sum reads."""
        x = torch.randn((1 << 30) if self.on_gpu else (1 << 20), device=self.device)
        x.sum()
        return x.numel() * 4 / (self.us(x.sum, 5, 4) * 1e-6)

    def spans(self, work: Callable[[], object], calls: int = 6) -> list[list[Span]]:
        """By call, what ran on the device, in the order of its starts."""
        if not self.on_gpu:
            return []
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity

        self.wait()
        with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profile:
            for _ in range(calls):
                work()
                self.wait()
        found = sorted(
            (e.time_range.start, e.time_range.end, e.name)
            for e in profile.events()
            if e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", False) and "##" not in e.name
        )
        whole = len(found) // calls
        assert whole * calls == len(found), f"{len(found)} kernels in {calls} equal calls"
        return [[Span(n, a, b) for a, b, n in found[i * whole : (i + 1) * whole]] for i in range(calls)]
