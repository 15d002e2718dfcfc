"""The record of a finished run: its outcome, its readings, the gate's verdict. Imports no torch."""

from __future__ import annotations

import os
import re
from typing import Any

from harness.cells.cell import Cell
from harness.cells.paths import SOURCES
from harness.gate.verdict import broken_promises, explain_failure
from harness.processes.jobs import Ending
from harness.records.provenance import provenance
from harness.records.readings import DeviceReadings
from harness.records.record import Measurement, Outcome, Readings
from harness.run.ranks import Ran

CRASHES = {"SIGSEGV": Outcome.ILLEGAL_ACCESS, "SIGBUS": Outcome.ILLEGAL_ACCESS}
DEFECTS = ("SIGABRT", "SIGILL", "SIGFPE")
"""Signals that a program sends itself; all others come from outside."""

ERRORS = {
    "MemoryError": Outcome.HOST_OOM,
    "NanLoss": Outcome.NAN_LOSS,
    "KeyboardInterrupt": Outcome.KILLED,
}
"""Exceptions whose class alone says how the cell ended."""
HOST_OOM = ("can't allocate memory", "cannot allocate memory", "std::bad_alloc")
PINNED = ("pin_memory", "_new_piece", "cudahostalloc")
"""Names in the trace of a failed allocation of pinned host memory, which CUDA reports as its own out-of-memory."""
GPU_OOM = (
    "cuda out of memory",
    "cuda error: out of memory",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "cuda failure 'out of memory'",
    "cuda failure 2 'out of memory'",
)
DISK = ("no space left on device", "disk quota exceeded", "file too large")
"""A full disk says nothing of the cell: once there is room, the next run measures it."""
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


def measurement(cell: Cell, ran: Ran, wall_s: float) -> Measurement:
    """The record of a cell that ran."""
    ending = ran.ending
    readings = readings_of(ending.results, ran.devices) if ending.how == "finished" else None
    outcome, detail = classify(ending)
    strangers = [name for each in ran.devices for name in each.strangers]
    if readings is not None and readings.gate is not None:
        readings, problem = _judge(cell, readings)
        if problem:
            outcome, detail = Outcome.WRONG_GRADIENT, problem
    if strangers:
        # Another process on the devices can change every reading, and can cause a failure.
        outcome, detail, readings = Outcome.FOREIGN_PROCESS, "; ".join(strangers), None
    names = list(dict.fromkeys(each.device.name for each in ran.devices))
    return Measurement(
        cell=cell,
        outcome=outcome,
        detail=detail,
        readings=readings,
        provenance=provenance(wall_s, ", ".join(names) or None, ran.driver, ran.nodes),
    )


def readings_of(ranks: list[dict[str, Any]], devices: list[DeviceReadings]) -> Readings:
    """The readings of all ranks, with ranks innermost."""
    return Readings(
        step_s=[list(step) for step in zip(*(rank["step_s"] for rank in ranks), strict=True)],
        seqlens=ranks[0]["seqlens"],
        loss=ranks[0]["loss"],
        grad_norm=ranks[0]["grad_norm"],
        memory=[rank["memory"] for rank in ranks if rank["memory"] is not None],
        evidence=[rank["evidence"] for rank in ranks],
        cosine=ranks[0]["cosine"],
        gate=ranks[0]["gate"],
        num_parameters=ranks[0]["num_parameters"],
        num_expert_parameters=ranks[0]["num_expert_parameters"],
        devices=devices,
    )


def _judge(cell: Cell, readings: Readings) -> tuple[Readings, str | None]:
    """`readings` whose gate also counts broken promises of the method, and why the gate failed."""
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
    """The outcome of an ending, and one line that explains it."""
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
        # Output of a rank before SIGKILL does not explain why it was killed.
        return outcome, f"{where}: {ending.error}" if outcome is Outcome.KILLED else line
    if ending.error in ERRORS:
        return ERRORS[ending.error], line
    if ending.error == "Unable":
        return Outcome.REFUSED, ending.message
    if _refusal(ending):
        return Outcome.REFUSED, ending.message
    text = f"{ending.error} {ending.message} {ending.trace}".lower()
    return _named(text) or Outcome.SETUP_ERROR, line


def _refusal(ending: Ending) -> bool:
    """Whether the library itself raised a `ValueError`: the trace ends at a `raise` in one of its files."""
    lines = re.findall(r'File "([^"]+)", line .*\n\s*(.*)', ending.trace or "")
    if ending.error != "ValueError" or not lines:
        return False
    file, code = map(str, lines[-1])
    return file.startswith(f"{SOURCES[0].resolve()}{os.sep}") and code.startswith("raise ")


def _named(text: str) -> Outcome | None:
    """The outcome that an error's text, in lower case, names.

    An illegal access comes first: later calls report it in messages of their own.
    """
    if any(sign in text for sign in ILLEGAL_ACCESS):
        return Outcome.ILLEGAL_ACCESS
    if any(sign in text for sign in GPU_OOM):
        # PyTorch's allocator names the memory; a bare CUDA error can mean device or host.
        pinned = "cuda out of memory" not in text and any(sign in text for sign in PINNED)
        return Outcome.HOST_OOM if pinned else Outcome.GPU_OOM
    if any(sign in text for sign in HOST_OOM):
        return Outcome.HOST_OOM
    if any(sign in text for sign in DISK):
        return Outcome.KILLED
    if any(sign in text for sign in COMM_TIMEOUT):
        return Outcome.COMM_TIMEOUT
    return None


def _signal_outcome(ending: Ending) -> Outcome:
    name = ending.error or ""
    if name == "SIGKILL" and ending.out_of_memory:
        return Outcome.HOST_OOM
    if name in DEFECTS:
        return _named((ending.message or "").lower()) or Outcome.SETUP_ERROR
    return CRASHES.get(name, Outcome.KILLED)
