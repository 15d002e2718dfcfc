"""The devices of a run, its callbacks and its counters. The caller passes them in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

COUNTERS = {
    "local_seqlen": "tokens of one sample that the rank's decoder processed, after padding",
    "tiles": "tiles computed in forward passes (MLP, norm and loss)",
    "exchanges": "sequence <-> heads all-to-alls issued",
    "rotations": "sends of keys and values, or of their gradients, to the next rank of a ring",
    "offloaded_bytes": "bytes of checkpointed layer inputs copied to the host",
    "gathers": "runs of modules that mix tokens otherwise than by attention, on the tokens of all ranks",
    "slices": "passes of sequence slices through a pipeline stage, or of chunks through the model",
}
"""What a run counts as proof that the long-sequence code ran."""
Evidence = dict[str, int]
"""Counts of one rank by the names in `COUNTERS`."""


def no_evidence() -> Evidence:
    """All counters at 0. Adding to a counter of another name is a `KeyError`."""
    return dict.fromkeys(COUNTERS, 0)


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
    evidence: Evidence = field(default_factory=no_evidence)
    """Filled in as the step runs."""
