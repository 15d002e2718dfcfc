"""How far any parameter's gradient norm is from the truth."""

from __future__ import annotations

from harness.records.record import Measurement

UNIT = "1"


def value(m: Measurement) -> float | None:
    """Largest |ratio - 1| over all parameters with a true gradient that is not zero."""
    if m.readings is None or m.readings.gate is None:
        return None
    ratios = [p.ratio for p in m.readings.gate.parameters if p.ratio is not None]
    return max(abs(ratio - 1) for ratio in ratios) if ratios else None
