"""Where a step runs and who watches it: handed in by the caller, never asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Evidence:
    """What long-sequence machinery really did, counted while it ran."""

    local_seqlen: int = 0
    """Tokens of one sample that this rank's decoder saw, after padding."""
    tiles: int = 0
    """Tiles computed in forward passes (MLP, norm and loss)."""
    exchanges: int = 0
    """Sequence <-> heads all-to-alls issued."""
    rotations: int = 0
    """Times that keys and values, or their gradients, went on to the next rank of a ring."""
    offloaded_bytes: int = 0
    """Checkpointed layer inputs copied to the host."""
    slices: int = 0
    """Forward passes of slices of a sequence through the layers of a pipeline's stage."""


def _ignore(*_: Any) -> None:
    pass


@dataclass(frozen=True)
class Placement:
    """The devices of a run. `device` computes, `host` holds what is offloaded."""

    device: torch.device
    host: torch.device = field(default_factory=lambda: torch.device("cpu"))
    on_host: Callable[[Tensor], None] = _ignore
    """Told each tensor that is allocated to hold offloaded data, before it is filled."""
    on_phase: Callable[[str], None] = _ignore
    """Told `forward`, `backward` and `update` when each begins."""
    on_layer: Callable[[], None] = _ignore
    """Told when a pass through a decoder layer begins, in forward and again in backward, by methods that
    run layers without calling their attention modules."""
    evidence: Evidence = field(default_factory=Evidence)
    """Filled in as the step runs."""
