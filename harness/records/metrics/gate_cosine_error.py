"""How far any parameter's gradient direction is from the truth."""

from __future__ import annotations

from harness.records.record import Measurement

UNIT = "1"


def value(m: Measurement) -> float | None:
    """Largest 1 - cosine over all parameters with a true gradient that is not zero."""
    if m.readings is None or m.readings.gate is None:
        return None
    cosines = [p.cosine for p in m.readings.gate.parameters if p.cosine is not None]
    return max(1 - cosine for cosine in cosines) if cosines else None
