"""Step time: the slowest rank of each timed step, then the median over steps."""

from __future__ import annotations

from statistics import median

from harness.records.record import Measurement

UNIT = "s"


def value(m: Measurement) -> float | None:
    """Median over the timed steps of the slowest rank's wall time."""
    if m.readings is None or not m.cell.timed or not m.readings.step_s:
        return None
    return median(max(ranks) for ranks in m.readings.step_s)
