"""One cell in a process tree of its own; whatever happens becomes a record. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from harness import client
from harness.cell import Cell
from harness.client import Listener
from harness.gate import broken_promises, explain_failure
from harness.prediction import Simulated
from harness.processes import Ending
from harness.provenance import provenance
from harness.record import Finding, Measurement, Outcome, Readings, read, write
from harness.sources import fingerprint, judging_fingerprint

RETRIED = {Outcome.KILLED}
"""Outcomes that say nothing about the cell: the next run measures it again."""

CRASHES = {"SIGSEGV": Outcome.ILLEGAL_ACCESS, "SIGBUS": Outcome.ILLEGAL_ACCESS}
DEFECTS = ("SIGABRT", "SIGILL", "SIGFPE")
"""Signals a program sends itself; every other one comes from outside."""

HOST_OOM = ("can't allocate memory", "cannot allocate memory", "std::bad_alloc")
COMM_TIMEOUT = ("timed out waiting", "timeout waiting", "wait timeout", "timed out after")


TRUTHS_AT_ONCE = 16
"""Truths that one process computes: it pays for its imports once."""


def measure(
    cell: Cell,
    cache: Path,
    listener: Listener = client._ignore,
    truth: dict[str, Any] | None = None,
    sources: Path | None = None,
) -> Measurement:
    """Run `cell`, with truths kept in the folder `cache`. Never raises for what a cell does.

    `truth` is what `truths` gave for it; without it, it is prepared here. `sources` is a folder with
    another `alst_impl`, which the ranks run.
    """
    begin = time.monotonic()
    if cell.world == "sim":
        return _simulate(cell, listener, begin)
    ending, results = _execute(cell, cache, listener, truth, sources)
    readings = _readings(results) if ending.how == "finished" else None
    outcome, detail = classify(ending)
    if readings is not None and readings.gate is not None:
        readings, problem = _judge(cell, readings)
        if problem:
            outcome, detail = Outcome.WRONG_GRADIENT, problem
    return Measurement(
        cell=cell,
        outcome=outcome,
        detail=detail,
        readings=readings,
        provenance=provenance(time.monotonic() - begin),
    )


def measure_to(
    path: Path, cell: Cell, cache: Path, force: bool, listener: Listener = client._ignore
) -> tuple[Measurement, bool]:
    """The record at `path`, and whether it was measured now because there was no final one."""
    existing = None if force else final(path, cell)
    if existing is not None:
        return existing, False
    measurement = measure(cell, cache, listener)
    write(path, measurement)
    return measurement, True


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
    ending = client.submit("harness.probes:execute", payload, cell.num_processes, cell.timeout_s)
    if ending.how != "finished":
        raise RuntimeError(f"probes: {ending.error or ending.how}: {ending.message}")
    return [Finding(**finding) for finding in ending.results[0]]


def stale(measurement: Measurement) -> bool:
    """Whether a record is of other code than there is now: a simulation, or a comparison and no more.

    What was measured stays as it is.
    """
    if measurement.simulated is not None:
        return measurement.simulated.code != fingerprint()
    return measurement.cell.steps == 0 and measurement.provenance.code != judging_fingerprint()


def _simulate(cell: Cell, listener: Listener, begin: float) -> Measurement:
    payload = {"cell": cell.model_dump(mode="json")}
    ending = client.submit("harness.forecast:execute", payload, 1, cell.timeout_s, listener)
    outcome, detail = classify(ending)
    simulated = Simulated(**ending.results[0]) if ending.how == "finished" else None
    return Measurement(
        cell=cell,
        outcome=outcome,
        detail=detail,
        readings=None,
        simulated=simulated,
        provenance=provenance(time.monotonic() - begin),
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
    trains = [cell.train.model_dump(mode="json") for cell in cells]
    wanted = {"trains": trains, "cache": str(cache.resolve())}
    timeout_s = max(cell.timeout_s for cell in cells)
    return client.submit("harness.gradients:prepare_truths", wanted, 1, timeout_s, listener)


def _execute(
    cell: Cell,
    cache: Path,
    listener: Listener,
    truth: dict[str, Any] | None,
    sources: Path | None,
) -> tuple[Ending, list[dict[str, Any]]]:
    """The truth, if the cell wants one, then the cell."""
    payload: dict[str, Any] = {"cell": cell.model_dump(mode="json"), "truth": truth}
    if cell.gate and truth is None:
        ending = _prepare([cell], cache, listener)
        if ending.how != "finished":
            return ending, []
        ((payload["truth"],),) = ending.results
    ending = client.submit(
        "harness.worlds.base:execute",
        payload,
        cell.num_processes,
        cell.timeout_s,
        listener,
        sources,
    )
    return ending, ending.results


def _readings(ranks: list[dict[str, Any]]) -> Readings:
    """The readings of all ranks, with ranks innermost."""
    return Readings(
        step_s=[list(step) for step in zip(*(rank["step_s"] for rank in ranks), strict=True)],
        loss=ranks[0]["loss"],
        grad_norm=ranks[0]["grad_norm"],
        memory=[rank["memory"] for rank in ranks if rank["memory"] is not None],
        evidence=[rank["evidence"] for rank in ranks],
        cosine=ranks[0]["cosine"],
        gate=ranks[0]["gate"],
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
    text = f"{ending.error} {ending.message} {ending.trace}".lower()
    if ending.error == "MemoryError" or any(sign in text for sign in HOST_OOM):
        return Outcome.HOST_OOM, line
    if ending.error == "NanLoss":
        return Outcome.NAN_LOSS, line
    if any(sign in text for sign in COMM_TIMEOUT):
        return Outcome.COMM_TIMEOUT, line
    return Outcome.SETUP_ERROR, line


def _signal_outcome(ending: Ending) -> Outcome:
    name = ending.error or ""
    if name == "SIGKILL" and ending.out_of_memory:
        return Outcome.HOST_OOM
    if name in DEFECTS:
        bad_alloc = any(sign in (ending.message or "").lower() for sign in HOST_OOM)
        return Outcome.HOST_OOM if bad_alloc else Outcome.SETUP_ERROR
    return CRASHES.get(name, Outcome.KILLED)
