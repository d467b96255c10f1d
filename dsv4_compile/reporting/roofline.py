"""How long a call must take at least: its operations at the peak rate, or its bytes at the memory's."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """The two ceilings of a machine: floating-point operations a second and bytes a second."""

    name: str
    flops: float
    bandwidth: float

    def seconds(self, flops: float, moved: float) -> float:
        return max(flops / self.flops, moved / self.bandwidth)

    def bound(self, flops: float, moved: float) -> str:
        """Which ceiling it meets: "compute" or "memory"."""
        return "compute" if flops / self.flops > moved / self.bandwidth else "memory"


H200 = Machine("H200", 989e12, 4.8e12)  # its data sheet: dense bf16, HBM3e
