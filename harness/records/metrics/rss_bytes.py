"""Peak resident set of one process, the largest over ranks."""

from __future__ import annotations

from harness.records.record import Measurement

UNIT = "B"


def value(m: Measurement) -> float | None:
    """Largest resident set of a rank's process: tensors, interpreter and libraries."""
    if m.readings is None or not m.readings.memory:
        return None
    return max(rank.rss_bytes for rank in m.readings.memory)
