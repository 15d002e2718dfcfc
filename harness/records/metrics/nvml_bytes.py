"""Peak of device memory as NVML reads it, the largest over devices."""

from __future__ import annotations

from harness.records.record import Measurement

UNIT = "B"


def value(m: Measurement) -> float | None:
    """Most memory in use on a device at any reading of the run: allocator, context, communicators."""
    if m.readings is None:
        return None
    found = [section.used_bytes for each in m.readings.devices for section in each.sections]
    return max((each for each in found if each is not None), default=None)
