"""Peak of tensors offloaded to the host, the largest over ranks."""

from __future__ import annotations

from harness.records.record import Measurement

UNIT = "B"


def value(m: Measurement) -> float | None:
    """Largest sum of live storages that hold offloaded data over one tracked step."""
    if m.readings is None or not m.readings.memory:
        return None
    return max(rank.host_peak_bytes for rank in m.readings.memory)
