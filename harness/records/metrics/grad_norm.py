"""Gradient norm of the last step."""

from __future__ import annotations

from harness.records.record import Measurement

UNIT = "1"


def value(m: Measurement) -> float | None:
    """Global L2 norm of the gradient in the last step, before clipping."""
    if m.readings is None or not m.readings.grad_norm:
        return None
    return m.readings.grad_norm[-1]
