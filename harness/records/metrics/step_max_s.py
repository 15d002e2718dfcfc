"""Upper end of the spread of `step_s`."""

from __future__ import annotations

from harness.records.record import Measurement

UNIT = "s"


def value(m: Measurement) -> float | None:
    """The slowest timed step, by its slowest rank."""
    if m.readings is None or not m.cell.timed or not m.readings.step_s:
        return None
    return max(max(ranks) for ranks in m.readings.step_s)
