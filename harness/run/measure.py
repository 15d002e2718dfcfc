"""Runs one cell in separate processes and makes one record of it, however the run ends. Imports no torch."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from harness.cells.cell import Cell
from harness.cells.prediction import Simulated
from harness.devices.machine import require_devices
from harness.gate.verdict import in_doubt
from harness.processes import client
from harness.processes.client import Listener
from harness.processes.launch import launched
from harness.records.provenance import provenance
from harness.records.record import Measurement, Outcome, read, settled, write
from harness.records.sources import fingerprint, judging_fingerprint
from harness.run.outcomes import classify, measurement, readings_of
from harness.run.ranks import Ran, execute, prepare, require_fit
from harness.run.together import measure_together

RETRIED = {Outcome.KILLED, Outcome.FOREIGN_PROCESS}
"""Outcomes that do not depend on the cell: the next run measures it again."""


def measure(
    cell: Cell,
    cache: Path,
    listener: Listener = client.ignore,
    truth: dict[str, Any] | None = None,
    sources: Path | None = None,
    *,
    doubts: bool = False,
) -> Measurement:
    """Run `cell`. An error in the cell becomes the outcome of its record.

    `cache` is the folder of truths. `truth` is what `truths` gave for `cell`; without it, it is computed here, with
    `doubts` or without. A cell in doubt runs once more with them: it passes then, or the first failure stands.
    `sources` is a folder with another `alst_impl` for the ranks. Raises `ValueError` if the cell's model has no
    truth, or if this machine lacks what the cell needs.
    """
    begin = time.monotonic()
    if cell.traits.forecast:
        return _simulate(cell, listener, begin, sources)
    devices = require_devices(cell, None) if cell.traits.gpus else []
    if cell.gate and truth is None:
        prepared = prepare([cell], cache, listener, doubts=doubts)
        if prepared.how != "finished":
            return measurement(cell, Ran(ending=prepared), time.monotonic() - begin)
        ((truth,),) = prepared.results
    ran = execute(cell, truth, listener, devices, sources=sources)
    measured = measurement(cell, ran, time.monotonic() - begin)
    if in_doubt(measured) and not doubts:
        again = measure(cell, cache, listener, sources=sources, doubts=True)
        return again if again.outcome is Outcome.OK else measured
    return measured


def measure_to(
    path: Path,
    cell: Cell,
    cache: Path,
    listener: Listener = client.ignore,
    *,
    force: bool,
    allow_dirty: bool = False,
) -> tuple[Measurement, bool]:
    """The record at `path`, and whether it was measured now because there was no final one.

    Raises `ValueError`, before anything runs or is written, if this machine, its packages or its checkout are
    not fit for `cell`. Under torchrun it is collective.
    """
    launch = launched(os.environ)
    if cell.traits.forecast:
        launch = None
    decides = launch is None or launch.rank == 0
    kept = final(path, cell) if decides and not force else None
    if launch is not None:
        devices = require_fit(cell, launch, allow_dirty=allow_dirty)
        return measure_together(launch, path, cell, cache, kept, listener, devices)
    if kept is not None:
        return kept, False
    require_fit(cell, None, allow_dirty=allow_dirty)
    measured = measure(cell, cache, listener)
    write(path, measured)
    return measured, True


def final(path: Path, cell: Cell) -> Measurement | None:
    """The record of `cell` at `path`; None if there is none, or if it has to be measured again."""
    if not path.exists():
        return None
    existing = read(path)
    again = existing.outcome in RETRIED or existing.cell != cell or stale(existing)
    return None if again else existing


def stale(measurement: Measurement) -> bool:
    """Whether other code made a forecast, or a record that holds a gradient comparison alone.

    A measured record is never stale.
    """
    if measurement.simulated is not None:
        return measurement.simulated.code != fingerprint()
    return measurement.cell.steps == 0 and measurement.provenance.code != judging_fingerprint()


def _simulate(cell: Cell, listener: Listener, begin: float, sources: Path | None) -> Measurement:
    payload = {"cell": cell.model_dump(mode="json")}
    more: dict[str, Any] = {} if sources is None else {"sources": str(sources)}
    entry = "harness.worlds.schedule:execute"
    if cell.traits.phantom:
        entry = "harness.predict.fits:execute"
        more["accelerator"] = "phantom"
    ending = client.submit(entry, payload, 1, cell.timeout_s, listener, **more)
    if ending.error == "ValueError" and ending.during in ("start-up", None):
        raise ValueError(f"{cell.label}: {ending.message}")
    outcome, detail = classify(ending)
    simulated, readings = None, None
    if ending.how == "finished":
        (found,) = ending.results
        simulated = Simulated(**found["simulated"])
        readings = found["readings"] and readings_of([found["readings"]], [])
    return settled(
        Measurement(
            cell=cell,
            outcome=outcome,
            detail=detail,
            readings=readings,
            simulated=simulated,
            provenance=provenance(time.monotonic() - begin),
        )
    )
