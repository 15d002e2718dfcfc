"""A simulated cell, executed: its prediction, what is alive at its peak, its longest sequence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from harness import pipelines, predict
from harness.cell import Cell
from harness.hardware import load_hardware
from harness.prediction import Holding, Simulated, Timeline
from harness.processes import Rank
from harness.sources import fingerprint
from harness.tracker import Allocation
from harness.worlds.parts import simulate_part
from harness.worlds.sim import Instant, Moment, Trace

HOLDINGS = 40
"""Rows kept of what is alive at the peak."""
STRETCHES = 400
"""Points kept of a timeline."""


def execute(rank: Rank, payload: dict[str, Any]) -> dict[str, Any]:
    """Simulate `payload["cell"]`; one process plays one rank of all."""
    cell = Cell(**payload["cell"])
    assert cell.simulation is not None
    rank.progress("simulating a step")
    simulated = _part(cell) if cell.simulation.part != "step" else _step(cell, rank)
    return simulated.model_dump(mode="json")


def setting(cell: Cell) -> predict.Setting:
    """The run of `cell` on its machine."""
    assert cell.simulation is not None
    return predict.Setting(
        train=cell.train,
        hardware=load_hardware(cell.hardware),
        host_memory_bytes=cell.simulation.host_memory_bytes,
        offload_parameters=cell.simulation.offload_parameters,
        kernel=cell.simulation.kernel,
        optimizer_on_device=cell.simulation.optimizer_on_device,
        stack=cell.simulation.stack,
        resident=cell.simulation.resident,
    )


def _step(cell: Cell, rank: Rank) -> Simulated:
    assert cell.simulation is not None
    of = setting(cell)
    prediction, trace = predict.explained(of)
    beyond = predict.longer(of)
    at_beyond = predict.predict(beyond, slope=False)
    search = None
    if cell.simulation.search:
        rank.progress("searching for the longest sequence")
        known = {of.train.seqlen: prediction, beyond.train.seqlen: at_beyond}
        search = predict.search(of, known)
    prediction = predict.with_slope(of, prediction, at_beyond)
    return _simulated(cell, trace).model_copy(update={"prediction": prediction, "search": search})


def _part(cell: Cell) -> Simulated:
    assert cell.simulation is not None
    part = cell.simulation.part
    assert part != "step"
    if part == "schedule":
        return _schedule(cell, cell.simulation.tp)
    return _simulated(cell, simulate_part(cell.train, part))


def _schedule(cell: Cell, tp: int) -> Simulated:
    prediction = pipelines.prediction(pipelines.staged(cell.train, tp, cell.hardware))
    return Simulated(
        code=fingerprint(),
        prediction=prediction,
        peak_bytes=prediction.allocated_bytes,
        checkpoint_bytes=0,
        holdings=[],
        search=None,
        timeline=None,
    )


def _simulated(cell: Cell, trace: Trace) -> Simulated:
    assert cell.simulation is not None
    peak: Instant = trace.phases[trace.peak]
    return Simulated(
        code=fingerprint(),
        prediction=None,
        peak_bytes=peak.allocated_bytes,
        checkpoint_bytes=max(instant.host_bytes for instant in trace.phases.values()),
        phase_peak_bytes={name: i.allocated_bytes for name, i in trace.phases.items()},
        phase_scratch_bytes={name: i.scratch_bytes for name, i in trace.phases.items()},
        reserved_bytes=trace.reserved_bytes,
        holdings=holdings(trace.live[trace.peak]),
        search=None,
        timeline=thinned(trace.moments) if cell.simulation.timeline else None,
    )


def holdings(live: Iterable[Allocation]) -> list[Holding]:
    """Allocations of one instant, added up by operator and line."""
    found: dict[tuple[str, str, str | None], list[int]] = {}
    for a in live:
        found.setdefault((a.category, a.operator, a.location), []).append(a.nbytes)
    rows = [
        Holding(category=c, operator=o, location=at, nbytes=sum(sizes), count=len(sizes))
        for (c, o, at), sizes in found.items()
    ]
    return sorted(rows, key=lambda row: -row.nbytes)[:HOLDINGS]


def thinned(moments: Sequence[Moment]) -> Timeline:
    """At most about `STRETCHES` stretches of equal numbers of events, none across phases."""
    size = max(len(moments) // STRETCHES, 1)
    stretches = [
        phase[start : start + size]
        for _, group in groupby(moments, key=lambda m: m.phase)
        for phase in [list(group)]
        for start in range(0, len(phase), size)
    ]
    return Timeline(
        phases=[stretch[0].phase for stretch in stretches],
        device_bytes=[max(m.device_bytes for m in stretch) for stretch in stretches],
        host_bytes=[max(m.host_bytes for m in stretch) for stretch in stretches],
    )
