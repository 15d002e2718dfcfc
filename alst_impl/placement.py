"""The devices of a run, its callbacks and its counters. The caller passes them in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Evidence:
    """Counters of what the long-sequence code did, as proof that it ran."""

    local_seqlen: int = 0
    """Tokens of one sample that this rank's decoder processed, after padding."""
    tiles: int = 0
    """Tiles computed in forward passes (MLP, norm and loss)."""
    exchanges: int = 0
    """Sequence <-> heads all-to-alls issued."""
    rotations: int = 0
    """Sends of keys and values, or of their gradients, to the next rank of a ring."""
    offloaded_bytes: int = 0
    """Checkpointed layer inputs copied to the host."""
    slices: int = 0
    """Forward passes of sequence slices through a pipeline stage."""


def _ignore(*_: Any) -> None:
    pass


@dataclass(frozen=True)
class Placement:
    """The devices of a run: `device` computes, `host` holds offloaded tensors."""

    device: torch.device
    host: torch.device = field(default_factory=lambda: torch.device("cpu"))
    on_host: Callable[[Tensor], None] = _ignore
    """Called with each tensor that is allocated for offloaded data, before it is filled."""
    on_phase: Callable[[str], None] = _ignore
    """Called with `forward`, `backward` or `update` when that phase begins."""
    on_layer: Callable[[], None] = _ignore
    """Called when a decoder layer begins its forward, and when it begins its backward.
    Only methods that bypass the layers' attention modules call it."""
    evidence: Evidence = field(default_factory=Evidence)
    """Filled in as the step runs."""
