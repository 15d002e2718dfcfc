"""Layer inputs copied to the host in one step, the largest over ranks."""

from __future__ import annotations

from harness.records.record import Measurement

UNIT = "B"


def value(m: Measurement) -> float | None:
    """Checkpointed layer inputs that one rank copied to the host in the tracked step."""
    if m.readings is None or not m.readings.evidence:
        return None
    return max(rank.offloaded_bytes for rank in m.readings.evidence)
