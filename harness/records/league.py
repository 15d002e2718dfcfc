"""Records of the league: one per task, fresh ones in a folder, committed ones in one file. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from alst_impl.config import Frozen
from alst_impl.plugin import explain
from harness.cells import paths
from harness.cells.league import Task, league, tasks
from harness.records.record import write_text

FRESH = paths.RESULTS / "league"
"""Folder of the last runs, `<key>.json` and `<key>.log` each."""

Verdict = Literal[
    "fits", "does not fit", "right", "wrong", "no record", "cannot run", "not installed"
]
FINAL: frozenset[Verdict] = frozenset(
    {"fits", "does not fit", "right", "wrong", "no record", "cannot run"}
)
"""Verdicts that another run would give again."""


class Alive(Frozen):
    """Memory of one line of a program at the peak."""

    where: str
    """Function, file and line."""
    bytes: int
    tensors: int


class Step(Frozen):
    """Memory of training steps at one length. All bytes are of the device with most, except those of the host."""

    seqlen: int
    allocated_bytes: int
    """Peak of PyTorch's allocator; what was allocated when memory ran out, where it did."""
    reserved_bytes: int
    pinned_bytes: int
    """Page-locked host memory of one rank."""
    pageable_bytes: int
    """Other host memory of one rank, in blocks of 16 MiB and more."""
    attention: list[str]
    """Families of attention kernels that were launched."""
    alive: list[Alive]
    """Memory at the peak, largest first."""

    @property
    def host_bytes(self) -> int:
        """Host memory of one rank."""
        return self.pinned_bytes + self.pageable_bytes


class Gradient(Frozen):
    """Loss and gradients of a step, compared with those of the stock model in fp64."""

    loss: float | None
    """None if it is not finite."""
    truth_loss: float
    worst: str
    """The parameter that uses most of its tolerance."""
    error: float | None
    """Norm of its error over the norm of the truth; None if either is not finite."""
    ratio: float | None
    cosine: float | None
    wrong_parameters: int
    """Number of parameters beyond their tolerance."""
    parameters: int


class Record(Frozen):
    """What became of a task."""

    task: Task
    verdict: Verdict
    reason: str
    """One line; for a longest sequence, what stops the next one."""
    step: Step | None = None
    """Of a length, or of the longest one that fits."""
    above: int | None = None
    """Of a longest sequence: the shortest length that was seen not to fit."""
    gradient: Gradient | None = None
    version: str
    """Of the peer's package."""
    torch: str
    utc: str
    code: str
    """Fingerprint of the peer's folder, and of this project for its own methods."""


def committed_path() -> Path:
    """The file of committed records, one per line."""
    return paths.REFERENCE / league().hardware / "league.jsonl"


def fresh_path(task: Task) -> Path:
    """Where the last run's record of `task` is."""
    return FRESH / f"{task.key}.json"


def committed() -> dict[str, Record]:
    """Committed records of what is still asked, by key; empty without a file."""
    path = committed_path()
    if not path.is_file():
        return {}
    records = (_parsed(line, path) for line in path.read_text().splitlines())
    asked = tasks()
    return {r.task.key: r for r in records if r.task.key in asked}


def fresh() -> dict[str, Record]:
    """Records of the last runs, by key."""
    found = {key: FRESH / f"{key}.json" for key in tasks()}
    return {key: _parsed(p.read_text(), p) for key, p in found.items() if p.is_file()}


def commit(records: Iterable[Record]) -> None:
    """Write the committed records anew: those that there are, with `records` in place of theirs."""
    held = {**committed(), **{record.task.key: record for record in records}}
    lines = [held[key].model_dump_json(exclude_defaults=True) for key in tasks() if key in held]
    write_text(committed_path(), "".join(f"{line}\n" for line in lines))


def write(record: Record) -> None:
    """Write the fresh record of a task, atomically."""
    write_text(fresh_path(record.task), record.model_dump_json(indent=1) + "\n")


def _parsed(text: str, path: Path) -> Record:
    try:
        return Record.model_validate_json(text)
    except ValidationError as error:
        raise ValueError(explain(error, f"{path} is not a record", [])) from None
