"""One cell in a process tree of its own; whatever happens becomes a record. Imports no torch."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from alst_impl.config import Frozen
from alst_impl.engines.base import load_engine
from alst_impl.methods.base import load_method
from harness.cells.cell import Cell
from harness.cells.prediction import Simulated
from harness.devices.machine import (
    rank_environment,
    require_attention,
    require_clean,
    require_cuda_build,
    require_devices,
)
from harness.devices.nvml import driver_version
from harness.devices.sampler import Sampler
from harness.gate.verdict import broken_promises, explain_failure
from harness.processes import client
from harness.processes.client import Listener
from harness.processes.jobs import Ending
from harness.processes.launch import Launch, Meeting, combined, job_fields, launched
from harness.records.provenance import provenance
from harness.records.readings import Device, DeviceReadings
from harness.records.record import Finding, Measurement, Outcome, Readings, read, settled, write
from harness.records.sources import fingerprint, judging_fingerprint

RETRIED = {Outcome.KILLED, Outcome.FOREIGN_PROCESS}
"""Outcomes that say nothing about the cell: the next run measures it again."""

CRASHES = {"SIGSEGV": Outcome.ILLEGAL_ACCESS, "SIGBUS": Outcome.ILLEGAL_ACCESS}
DEFECTS = ("SIGABRT", "SIGILL", "SIGFPE")
"""Signals a program sends itself; every other one comes from outside."""

HOST_OOM = ("can't allocate memory", "cannot allocate memory", "std::bad_alloc")
PINNED = ("pin_memory", "_new_piece", "cudahostalloc")
"""In the trace of an allocation in pinned host memory, whose failure CUDA words as its own."""
GPU_OOM = (
    "cuda out of memory",
    "cuda error: out of memory",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "cuda failure 'out of memory'",
    "cuda failure 2 'out of memory'",
)
ILLEGAL_ACCESS = (
    "illegal memory access",
    "misaligned address",
    "device-side assert",
    "unspecified launch failure",
    "an illegal instruction was encountered",
)
COMM_TIMEOUT = (
    "timed out waiting",
    "timeout waiting",
    "wait timeout",
    "timed out after",
    "watchdog caught collective operation timeout",
)


UNWATCHED = "the process that reads the devices' memory ended before the run did"
"""What the ranks counted is whole, but whether they were alone on their devices is not known."""
TRUTHS_AT_ONCE = 16
"""Truths that one process computes: it pays for its imports once."""


def measure(
    cell: Cell,
    cache: Path,
    listener: Listener = client._ignore,
    truth: dict[str, Any] | None = None,
    sources: Path | None = None,
) -> Measurement:
    """Run `cell`, with truths kept in the folder `cache`. Never raises for what a cell does; raises
    `ValueError` for one that nothing can be compared with, or that a phantom device lacks packages for.

    `truth` is what `truths` gave for it; without it, it is prepared here. `sources` is a folder with
    another `alst_impl`, which the ranks run.
    """
    begin = time.monotonic()
    if cell.traits.forecast:
        return _simulate(cell, listener, begin, sources)
    devices = require_devices(cell, None) if cell.traits.gpus else []
    ran = _execute(cell, cache, listener, truth, devices, sources)
    return measurement(cell, ran, time.monotonic() - begin)


class Ran(Frozen):
    """What running a cell gave, on one machine or on several."""

    ending: Ending
    """Of all ranks together."""
    devices: list[DeviceReadings] = []
    """What their devices read meanwhile."""
    driver: str | None = None
    """Of these devices."""
    nodes: int = 1
    """Machines."""


def measurement(cell: Cell, ran: Ran, wall_s: float) -> Measurement:
    """The record of a cell that ran."""
    ending = ran.ending
    readings = _readings(ending.results, ran.devices) if ending.how == "finished" else None
    outcome, detail = classify(ending)
    strangers = [name for each in ran.devices for name in each.strangers]
    if readings is not None and readings.gate is not None:
        readings, problem = _judge(cell, readings)
        if problem:
            outcome, detail = Outcome.WRONG_GRADIENT, problem
    if strangers:
        # Neither numbers nor a failure say anything of the cell alone.
        outcome, detail, readings = Outcome.FOREIGN_PROCESS, "; ".join(strangers), None
    names = list(dict.fromkeys(each.device.name for each in ran.devices))
    return Measurement(
        cell=cell,
        outcome=outcome,
        detail=detail,
        readings=readings,
        provenance=provenance(wall_s, ", ".join(names) or None, ran.driver, ran.nodes),
    )


def measure_to(
    path: Path,
    cell: Cell,
    cache: Path,
    force: bool,
    listener: Listener = client._ignore,
    *,
    allow_dirty: bool = False,
) -> tuple[Measurement, bool]:
    """The record at `path`, and whether it was measured now because there was no final one.

    Raises `ValueError`, before anything runs or is written, for a cell that this machine, what is installed
    on it or its checkout is not fit for. Under torchrun it is collective.
    """
    launch = launched(os.environ)
    if launch is not None and not cell.traits.forecast:
        return _measure_together(launch, path, cell, cache, force, listener, allow_dirty)
    existing = None if force else final(path, cell)
    if existing is not None:
        return existing, False
    _require(cell, None, allow_dirty)
    measured = measure(cell, cache, listener)
    write(path, measured)
    return measured, True


def _require(cell: Cell, launch: Launch | None, allow_dirty: bool) -> list[Device]:
    """Refuse a cell that cannot be measured here; the devices that its ranks run on."""
    if cell.traits.forecast:
        return []
    load_engine(cell.train.engine).require()
    load_method(cell.train.method).require()
    if not cell.traits.gpus:
        return []
    devices = require_devices(cell, launch)
    require_attention(cell.train.attention)
    if not allow_dirty:
        require_clean(cell.label)
    require_cuda_build(cell.label)
    return devices


def _measure_together(
    launch: Launch,
    path: Path,
    cell: Cell,
    cache: Path,
    force: bool,
    listener: Listener,
    allow_dirty: bool,
) -> tuple[Measurement, bool]:
    """`measure_to` by all processes of a launch: the first decides, judges and writes. Collective."""
    launch.check(cell)
    devices = _require(cell, launch, allow_dirty)
    begin, first = time.monotonic(), launch.rank == 0
    meeting = Meeting(launch, cell)
    if first:
        existing = None if force else final(path, cell)
        meeting.say("kept", "" if existing is None else existing.model_dump_json())
    kept = meeting.hear("kept")
    if kept:
        return Measurement.model_validate_json(kept), False
    mine = _execute_one(launch, cell, cache, listener, devices)
    meeting.say(f"ran {launch.rank}", mine.model_dump_json())
    if first:
        all_ran = [Ran.model_validate_json(text) for text in meeting.hear_all("ran")]
        ran = Ran(
            ending=combined([each.ending for each in all_ran]),
            devices=[reading for each in all_ran for reading in each.devices],
            driver=mine.driver,
            nodes=launch.num_nodes,
        )
        measured = measurement(cell, ran, time.monotonic() - begin)
        write(path, measured)
        meeting.say("record", measured.model_dump_json())
    return Measurement.model_validate_json(meeting.hear("record")), True


def _execute_one(
    launch: Launch, cell: Cell, cache: Path, listener: Listener, devices: Sequence[Device]
) -> Ran:
    """The rank of `launch`; the first of them has the truth, the first of a machine watches its devices."""
    truth = None
    if cell.gate and launch.rank == 0:
        try:
            prepared = _prepare([cell], cache, listener)
        except ValueError as error:  # others of the launch wait for what we say
            return Ran(ending=Ending(how="error", error="ValueError", message=str(error)))
        if prepared.how != "finished":
            return Ran(ending=prepared)
        ((truth,),) = prepared.results
    watched = devices if launch.local_rank == 0 else []
    return _submit(cell, truth, listener, watched, launch)


def final(path: Path, cell: Cell) -> Measurement | None:
    """The record of `cell` at `path`, if there is one and nothing asks for another."""
    if not path.exists():
        return None
    existing = read(path)
    again = existing.outcome in RETRIED or existing.cell != cell or stale(existing)
    return None if again else existing


def probed(cell: Cell) -> list[Finding]:
    """What the probes of `cell` see. Raises `RuntimeError` where they could not be run."""
    payload = {"cell": cell.model_dump(mode="json")}
    ending = client.submit(
        "harness.judge.probes:execute", payload, cell.num_processes, cell.timeout_s
    )
    if ending.how != "finished":
        raise RuntimeError(f"probes: {ending.error or ending.how}: {ending.message}")
    return [Finding(**finding) for finding in ending.results[0]]


def stale(measurement: Measurement) -> bool:
    """Whether a record is of other code than there is now: a prediction, or a comparison and no more.

    What was measured stays as it is.
    """
    if measurement.simulated is not None:
        return measurement.simulated.code != fingerprint()
    return measurement.cell.steps == 0 and measurement.provenance.code != judging_fingerprint()


def _simulate(
    cell: Cell, listener: Listener, begin: float, sources: Path | None = None
) -> Measurement:
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
        readings = found["readings"] and _readings([found["readings"]], [])
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


def truths(
    cells: Sequence[Cell], cache: Path, listener: Listener = client._ignore
) -> Iterator[list[dict[str, Any] | None]]:
    """What each of `cells` is held against, in order, some at a time; None where it failed."""
    for first in range(0, len(cells), TRUTHS_AT_ONCE):
        some = cells[first : first + TRUTHS_AT_ONCE]
        ending = _prepare(some, cache, listener)
        yield ending.results[0] if ending.how == "finished" else [None] * len(some)


def _prepare(cells: Sequence[Cell], cache: Path, listener: Listener) -> Ending:
    """Of preparing truths. Raises `ValueError` where there is none: a step that draws random numbers."""
    trains = [cell.train.model_dump(mode="json") for cell in cells]
    wanted = {"trains": trains, "cache": str(cache.resolve())}
    timeout_s = max(cell.timeout_s for cell in cells)
    ending = client.submit("harness.gate.gradients:prepare_truths", wanted, 1, timeout_s, listener)
    if ending.error == "Refused":
        raise ValueError(f"{cells[0].label if len(cells) == 1 else 'the gate'}: {ending.message}")
    return ending


def _execute(
    cell: Cell,
    cache: Path,
    listener: Listener,
    truth: dict[str, Any] | None,
    devices: Sequence[Device],
    sources: Path | None,
) -> Ran:
    """The truth, if the cell wants one, then the cell."""
    if cell.gate and truth is None:
        ending = _prepare([cell], cache, listener)
        if ending.how != "finished":
            return Ran(ending=ending)
        ((truth,),) = ending.results
    return _submit(cell, truth, listener, devices, None, sources)


def _submit(
    cell: Cell,
    truth: dict[str, Any] | None,
    listener: Listener,
    devices: Sequence[Device],
    launch: Launch | None,
    sources: Path | None = None,
) -> Ran:
    """The ranks of `cell` that are forked here, and what `devices` read meanwhile."""
    payload = {"cell": cell.model_dump(mode="json"), "truth": truth}
    more = job_fields(launch)
    if sources is not None:
        more["sources"] = str(sources)
    if cell.traits.gpus:
        theirs = more.get("environment", {}) | rank_environment(
            bool(cell.expandable_segments), os.environ
        )
        more |= {"accelerator": "cuda", "environment": theirs}
    leader = 0 if launch is None else launch.rank
    with Sampler(devices) as sampler:

        def heard(event: dict[str, Any]) -> None:
            sampler.hear(event, leader)
            listener(event)

        entry, patience_s = "harness.worlds.base:execute", cell.timeout_s
        ending = client.submit(entry, payload, cell.num_processes, patience_s, heard, **more)
    if sampler.ended_early and ending.how == "finished":
        ending = Ending(how="error", error="RuntimeError", message=UNWATCHED)
    driver = driver_version() if devices else None
    return Ran(ending=ending, devices=sampler.readings, driver=driver)


def _readings(ranks: list[dict[str, Any]], devices: list[DeviceReadings]) -> Readings:
    """The readings of all ranks, with ranks innermost."""
    return Readings(
        step_s=[list(step) for step in zip(*(rank["step_s"] for rank in ranks), strict=True)],
        loss=ranks[0]["loss"],
        grad_norm=ranks[0]["grad_norm"],
        memory=[rank["memory"] for rank in ranks if rank["memory"] is not None],
        evidence=[rank["evidence"] for rank in ranks],
        cosine=ranks[0]["cosine"],
        gate=ranks[0]["gate"],
        num_parameters=ranks[0]["num_parameters"],
        devices=devices,
    )


def _judge(cell: Cell, readings: Readings) -> tuple[Readings, str | None]:
    """The gate's verdict with the method's promises taken in, and why it failed."""
    gate = readings.gate
    assert gate is not None
    if not gate.passed:
        return readings, explain_failure(gate, cell.train)
    broken = broken_promises(cell.train, readings.evidence)
    if not broken:
        return readings, None
    gate = gate.model_copy(update={"passed": False})
    return readings.model_copy(update={"gate": gate}), broken[0]


def classify(ending: Ending) -> tuple[Outcome, str | None]:
    """The outcome of an ending, and one line on it."""
    if ending.how == "finished":
        return Outcome.OK, None
    where = f"rank {ending.rank} during {ending.during}" if ending.rank is not None else "the run"
    said = f": {ending.message}" if ending.message else ""
    if ending.how == "timeout":
        return Outcome.TIMEOUT, f"{where} did not end in time"
    if ending.how == "lost":
        if ending.error:
            return Outcome.SETUP_ERROR, f"the fork server does not start: {ending.error}{said}"
        return Outcome.KILLED, ending.message
    line = f"{where}: {ending.error}{said}"
    if ending.how == "signal":
        outcome = _signal_outcome(ending)
        # What a rank wrote before it was killed has nothing to do with its death.
        return outcome, f"{where}: {ending.error}" if outcome is Outcome.KILLED else line
    if ending.error == "MemoryError":
        return Outcome.HOST_OOM, line
    if ending.error == "NanLoss":
        return Outcome.NAN_LOSS, line
    text = f"{ending.error} {ending.message} {ending.trace}".lower()
    return _told(text) or Outcome.SETUP_ERROR, line


def _told(text: str) -> Outcome | None:
    """The outcome that an error's words, in lower case, tell of; an illegal access outlives its cause."""
    if any(sign in text for sign in ILLEGAL_ACCESS):
        return Outcome.ILLEGAL_ACCESS
    if any(sign in text for sign in GPU_OOM):
        # PyTorch's own allocator says which memory; a bare CUDA error may be of either.
        pinned = "cuda out of memory" not in text and any(sign in text for sign in PINNED)
        return Outcome.HOST_OOM if pinned else Outcome.GPU_OOM
    if any(sign in text for sign in HOST_OOM):
        return Outcome.HOST_OOM
    if any(sign in text for sign in COMM_TIMEOUT):
        return Outcome.COMM_TIMEOUT
    return None


def _signal_outcome(ending: Ending) -> Outcome:
    name = ending.error or ""
    if name == "SIGKILL" and ending.out_of_memory:
        return Outcome.HOST_OOM
    if name in DEFECTS:
        return _told((ending.message or "").lower()) or Outcome.SETUP_ERROR
    return CRASHES.get(name, Outcome.KILLED)
