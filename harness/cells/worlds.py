"""Capabilities of each world, for code that reads cells and records. Imports no torch.

`harness.worlds` implements how each world executes a cell.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from alst_impl.config import Frozen

World = Literal["cuda", "cpu", "phantom", "schedule"]


class Traits(Frozen):
    """Capabilities of a world."""

    forecast: bool
    """One process runs a single rank. There are no values to compare and no times to measure."""
    executes: bool
    """Training steps are executed. Otherwise a schedule is simulated with modelled times and bytes."""
    gpus: bool
    """Ranks run on GPUs of this machine, which are monitored through NVML."""
    allocator: bool
    """CUDA's caching allocator counts the memory and takes settings."""

    @property
    def phantom(self) -> bool:
        """Whether steps run on phantom devices."""
        return self.forecast and self.executes


TRAITS: Mapping[World, Traits] = {
    "cpu": Traits(forecast=False, executes=True, gpus=False, allocator=False),
    "cuda": Traits(forecast=False, executes=True, gpus=True, allocator=True),
    "phantom": Traits(forecast=True, executes=True, gpus=False, allocator=True),
    "schedule": Traits(forecast=True, executes=False, gpus=False, allocator=False),
}
FORECAST = [name for name, traits in TRAITS.items() if traits.forecast]
