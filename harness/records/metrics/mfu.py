"""Model FLOPs utilisation: what training needs, over what the devices could do in that time."""

from __future__ import annotations

from alst_impl.methods.base import load_method
from alst_impl.models import published
from harness.cells.hardware import load_hardware
from harness.formulas.flops import model_causal, shape_of
from harness.records.metrics import step_s
from harness.records.record import Measurement

UNIT = "1"


def value(m: Measurement) -> float | None:
    """Causal model FLOPs of a step (no recomputation, no masked score) per second of `step_s`, over the
    peak bf16 FLOP/s of all ranks; None on hardware without that number.
    """
    seconds, peak = step_s.value(m), load_hardware(m.cell.hardware).bf16_flops
    if seconds is None or peak is None or m.readings is None or m.readings.num_parameters is None:
        return None
    t = m.cell.train
    shape = shape_of(published(t.model, t.overrides), m.readings.num_parameters)
    dp = load_method(t.method).axes(t.world_size)["dp"]
    samples = t.batch_size * t.accumulation * dp
    return samples * model_causal(shape, t.seqlen) / (seconds * t.world_size * peak)
