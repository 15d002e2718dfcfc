"""Every metric of a record: its unit, its meaning, how it is read. Imports no torch.

A new metric is a new entry of `METRICS`. Tables then have it for every record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import fmean, median
from typing import NamedTuple

from alst_impl.config import TrainConfig
from alst_impl.methods.base import step_samples
from alst_impl.models import described
from alst_impl.ops.attention.cores.base import load_core
from alst_impl.sources.base import load_source
from harness.cells.hardware import load_hardware
from harness.formulas.flops import model_causal, shape_of
from harness.records.record import CudaMemory, Measurement, ParameterGate, Readings


class Metric(NamedTuple):
    """One number of a record."""

    unit: str
    meaning: str
    """One line."""
    value: Callable[[Measurement], float | None]
    """Reads a record; None if it has no such reading."""


def _from_readings(
    choose: Callable[[Iterable[float]], float], read: Callable[[Readings], Iterable[float | None]]
) -> Callable[[Measurement], float | None]:
    """`choose` over what `read` finds in a record; None if it finds nothing."""

    def value(m: Measurement) -> float | None:
        found = [] if m.readings is None else [x for x in read(m.readings) if x is not None]
        return choose(found) if found else None

    return value


def _largest(
    read: Callable[[Readings], Iterable[float | None]],
) -> Callable[[Measurement], float | None]:
    return _from_readings(max, read)


def _last(read: Callable[[Readings], Iterable[float]]) -> Callable[[Measurement], float | None]:
    return _from_readings(lambda values: list(values)[-1], read)


def _step(choose: Callable[[Iterable[float]], float]) -> Callable[[Measurement], float | None]:
    """`choose` over the timed steps, each as long as its slowest rank."""
    of_steps = _from_readings(choose, lambda r: [max(ranks) for ranks in r.step_s])
    return lambda m: of_steps(m) if m.cell.timed else None


def _cuda(r: Readings) -> list[CudaMemory]:
    return [rank.cuda for rank in r.memory if rank.cuda is not None]


def _gate(r: Readings) -> list[ParameterGate]:
    return [] if r.gate is None else r.gate.parameters


def _unequal(t: TrainConfig) -> bool:
    """Whether steps do unequal work, in sequences or documents of lengths that the text tells."""
    source = load_source(t.data.source)
    return source.packs or len(source.seqlens(t.seqlen)) > 1


def _tokens_per_s(m: Measurement) -> float | None:
    t = m.cell.train
    seconds = _step(fmean if _unequal(t) else median)(m)
    return None if seconds is None else step_samples(t) * t.seqlen / seconds


def _mfu(m: Measurement) -> float | None:
    t, seconds = m.cell.train, value_of("step_s", m)
    peak = load_hardware(m.cell.hardware).bf16_flops
    r = m.readings
    if seconds is None or peak is None or r is None or r.num_parameters is None:
        return None
    if _unequal(t):
        return None
    shape = shape_of(described(t.model, t.overrides), r.num_parameters, r.num_expert_parameters)
    documents = t.data.lengths(t.seqlen, t.seed, 0)
    flops = model_causal(shape, documents, pattern=load_core(t.attention).pattern)
    return step_samples(t) * flops / (seconds * t.world_size * peak)


METRICS = {
    "allocated_bytes": Metric(
        "B",
        "Largest `max_memory_allocated` of a phase of the tracked step: live tensors and kernel scratch.",
        _largest(lambda r: (n for cuda in _cuda(r) for n in cuda.allocated_bytes.values())),
    ),
    "gate_cosine_error": Metric(
        "1",
        "Largest 1 - cosine over all parameters whose true gradient is not zero.",
        _largest(lambda r: (1 - p.cosine for p in _gate(r) if p.cosine is not None)),
    ),
    "gate_ratio_error": Metric(
        "1",
        "Largest |ratio - 1| over all parameters whose true gradient is not zero.",
        _largest(lambda r: (abs(p.ratio - 1) for p in _gate(r) if p.ratio is not None)),
    ),
    "grad_norm": Metric(
        "1",
        "Global L2 norm of the gradient in the last step, before clipping.",
        _last(lambda r: r.grad_norm),
    ),
    "host_peak_bytes": Metric(
        "B",
        "Largest sum of live storages that hold offloaded data, over one tracked step.",
        _largest(lambda r: (rank.host_peak_bytes for rank in r.memory)),
    ),
    "loss": Metric(
        "nats/token",
        "Global mean loss over valid tokens in the last step.",
        _last(lambda r: r.loss),
    ),
    "mfu": Metric(
        "1",
        "Causal model FLOPs per second of `step_s` (nothing recomputed, no masked score) over the peak of all ranks in bf16.",
        _mfu,
    ),
    "nvml_bytes": Metric(
        "B",
        "Largest memory in use on a device at any reading: allocator, context, communicators.",
        _largest(lambda r: (s.used_bytes for device in r.devices for s in device.sections)),
    ),
    "offloaded_bytes": Metric(
        "B",
        "Checkpointed layer inputs that one rank copied to the host in the tracked step, the largest over ranks.",
        _largest(lambda r: (rank["offloaded_bytes"] for rank in r.evidence)),
    ),
    "peak_bytes": Metric(
        "B",
        "Largest sum of live storages on the compute device over one tracked step.",
        _largest(lambda r: (rank.peak_bytes for rank in r.memory)),
    ),
    "pinned_bytes": Metric(
        "B",
        "Largest pinned host memory in use in the tracked step, each block rounded as the allocator does.",
        _largest(lambda r: (cuda.pinned_bytes for cuda in _cuda(r))),
    ),
    "reserved_bytes": Metric(
        "B",
        "Largest `max_memory_reserved` of a phase of the tracked step.",
        _largest(lambda r: (n for cuda in _cuda(r) for n in cuda.reserved_bytes.values())),
    ),
    "resting_bytes": Metric(
        "B",
        "Parameters, optimizer state and what the engine keeps, after the tracked step.",
        _largest(lambda r: (rank.resting_bytes for rank in r.memory)),
    ),
    "rss_bytes": Metric(
        "B",
        "Largest resident set of a rank's process: tensors, interpreter and libraries.",
        _largest(lambda r: (rank.rss_bytes for rank in r.memory)),
    ),
    "step_max_s": Metric("s", "The slowest timed step, by its slowest rank.", _step(max)),
    "step_min_s": Metric("s", "The fastest timed step, by its slowest rank.", _step(min)),
    "step_s": Metric(
        "s", "Median over the timed steps of the slowest rank's wall time.", _step(median)
    ),
    "tokens_per_s": Metric(
        "tokens/s",
        "Tokens of one optimizer step, over the data-parallel ranks, divided by `step_s`, or by the mean where steps have several lengths.",
        _tokens_per_s,
    ),
}
"""Name -> metric, in the order of tables."""


def value_of(name: str, m: Measurement) -> float | None:
    """The metric `name` of a record; None if the record has no such reading."""
    return METRICS[name].value(m)
