"""Bytes live on the compute device between steps, the largest over ranks."""

from __future__ import annotations

from harness.records.record import Measurement

UNIT = "B"


def value(m: Measurement) -> float | None:
    """Parameters, optimizer state and what the engine keeps, after the tracked step."""
    if m.readings is None or not m.readings.memory:
        return None
    return max(rank.resting_bytes for rank in m.readings.memory)
