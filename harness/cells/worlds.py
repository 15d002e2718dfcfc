"""What a world has, for those who read cells and records. `harness.worlds` holds how each executes. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from alst_impl.config import Frozen

World = Literal["cuda", "cpu", "phantom", "schedule"]


class Traits(Frozen):
    """What cells of a world can be asked for."""

    forecast: bool
    """One process plays one rank of all: no values to compare, no time to measure."""
    executes: bool
    """Steps run; otherwise a schedule is played with modelled times and bytes."""
    gpus: bool
    """Ranks run on GPUs of this machine, which NVML watches."""
    allocator: bool
    """CUDA's caching allocator counts, and has settings."""

    @property
    def phantom(self) -> bool:
        """Whether a step runs on a device without arithmetic."""
        return self.forecast and self.executes


TRAITS: Mapping[World, Traits] = {
    "cpu": Traits(forecast=False, executes=True, gpus=False, allocator=False),
    "cuda": Traits(forecast=False, executes=True, gpus=True, allocator=True),
    "phantom": Traits(forecast=True, executes=True, gpus=False, allocator=True),
    "schedule": Traits(forecast=True, executes=False, gpus=False, allocator=False),
}
FORECAST = [name for name, traits in TRAITS.items() if traits.forecast]
