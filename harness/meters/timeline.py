"""Allocated bytes over the course of a step, from PyTorch's own memory history."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from harness.cells.prediction import Timeline

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

STRETCHES = 400
"""Approximate number of points in a timeline."""
SIGNS = {"alloc": 1, "free_requested": -1}
"""Events of PyTorch's memory history that change allocated bytes, and the sign of the change."""


def timeline(
    events: Iterable[dict[str, Any]], resting_bytes: int, begins: Sequence[tuple[str, int]]
) -> Timeline:
    """Allocated bytes over `events`, the memory history of one device in order.

    `begins` lists the phases, each with the number of allocation changes before it. Changes before
    the first phase are left out.
    """
    changes = (SIGNS[e["action"]] * e["size"] for e in events if e["action"] in SIGNS)
    held = list(itertools.accumulate(changes, initial=resting_bytes))
    ends = [number for _, number in begins[1:]] + [len(held) - 1]
    return _thinned(
        [(name, held[start + 1 : end + 1]) for (name, start), end in zip(begins, ends, strict=True)]
    )


def _thinned(phases: Sequence[tuple[str, Sequence[int]]]) -> Timeline:
    """About `STRETCHES` stretches of equally many events, each within one phase, reduced to their maximum."""
    size = max(sum(len(held) for _, held in phases) // STRETCHES, 1)
    stretches = [
        (name, max(held[start : start + size]))
        for name, held in phases
        for start in range(0, len(held), size)
    ]
    return Timeline(
        phases=[name for name, _ in stretches], device_bytes=[held for _, held in stretches]
    )
