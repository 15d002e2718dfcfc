"""Loss of the last step."""

from __future__ import annotations

from harness.records.record import Measurement

UNIT = "nats/token"


def value(m: Measurement) -> float | None:
    """Global mean loss over valid tokens in the last step."""
    if m.readings is None or not m.readings.loss:
        return None
    return m.readings.loss[-1]
