"""Throughput of all ranks together, from the median step."""

from __future__ import annotations

from alst_impl.methods.base import load_method
from harness.records.metrics import step_s
from harness.records.record import Measurement

UNIT = "tokens/s"


def value(m: Measurement) -> float | None:
    """Tokens of one optimizer step, over the data-parallel ranks, divided by `step_s`."""
    seconds = step_s.value(m)
    if seconds is None:
        return None
    t = m.cell.train
    dp = load_method(t.method).axes(t.world_size)["dp"]
    return t.seqlen * t.batch_size * t.accumulation * dp / seconds
