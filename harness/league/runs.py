"""Runs a task of the league and makes its record, however it ends."""

from __future__ import annotations

import datetime as dt
import hashlib
from functools import cache
from importlib.metadata import version as installed
from pathlib import Path

from harness.cells import league
from harness.cells.league import OURS, Task
from harness.league import gate, memory
from harness.league.packages import missing, scripts, version
from harness.records import league as records
from harness.records.league import Record
from harness.records.sources import library_fingerprint


def run(task: Task, truths: Path) -> Record:
    """The record of `task`. `truths` is the folder of truths of the gate.

    A longest sequence starts from records of lengths, fresh or committed, and finds its own where there is none.
    """
    absent = missing(task.peer)
    if absent is not None:
        return _record(task, "not installed", absent)
    if task.what == "gate":
        verdict, reason, gradient = gate.judged(task, truths)
        return _record(task, verdict, reason).model_copy(update={"gradient": gradient})
    if task.what == "bytes":
        verdict, reason, step = memory.step_at(task, task.seqlen)
        return _record(task, verdict, reason).model_copy(update={"step": step})
    known, failed = _known(task)
    verdict, reason, step, above = memory.longest(task, known, failed)
    return _record(task, verdict, reason).model_copy(update={"step": step, "above": above})


def final(task: Task) -> Record | None:
    """The record of `task` that another run would give again, fresh or committed; None if there is none."""
    for held in (records.fresh(), records.committed()):
        found = held.get(task.key)
        if found and found.verdict in records.FINAL and found.code == code(task.peer):
            return found
    return None


def _known(task: Task) -> tuple[list[records.Step], int | None]:
    """Steps of the same place that fit, and the shortest length that does not."""
    fits, failed = [], None
    for other in league.tasks().values():
        if other.what != "bytes" or _place(other) != _place(task):
            continue
        found = final(other)
        if found and found.verdict == "fits" and found.step:
            fits.append(found.step)
        elif found and found.verdict == "does not fit":
            failed = min(other.seqlen, failed or other.seqlen)
    return fits, failed


def _place(task: Task) -> tuple[str, str, int, str]:
    return task.peer, task.model, task.gpus, task.states


def _record(task: Task, verdict: records.Verdict, reason: str) -> Record:
    return Record(
        task=task,
        verdict=verdict,
        reason=reason,
        version=version(task.peer) or "",
        torch=installed("torch").partition("+")[0],
        utc=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        code=code(task.peer),
    )


@cache
def code(peer: str) -> str:
    """Fingerprint of what decides a record: the peer's folder and version, and for our own methods this project."""
    digest = hashlib.sha256((version(peer) or "").encode())
    for path in scripts(peer):
        digest.update(path.name.encode() + path.read_bytes())
    if peer in OURS:
        digest.update(library_fingerprint().encode())
    return digest.hexdigest()[:16]
