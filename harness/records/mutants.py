"""Mutants: edits of one place of the code, which the tests of its module must notice. A committed sample of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from alst_impl.config import Frozen
from alst_impl.plugin import explain
from harness.cells import paths
from harness.cells.yamls import read_yaml

TABLE = paths.EXPERIMENTS / "fire" / "mutants.yaml"
PATH = paths.REFERENCE / "cpu" / "mutants.json"
"""The committed sample."""


class Equivalent(Frozen):
    """A mutant that no test can notice, because it computes the same."""

    line: str
    """The line that it edits."""
    becomes: str
    """The line that it makes of it."""
    reason: str
    """Why both compute the same."""


class Judged(Frozen):
    """What judges the mutants of a module."""

    tests: list[str]
    """Files below `tests/`, or tests in them."""
    equivalent: list[Equivalent] = []


class Mutant(Frozen):
    """An edit of one place of a module."""

    module: str
    """Path in a checkout."""
    operator: str
    """The tool's name of the kind of edit."""
    occurrence: int
    """Which of the places of that kind it is, from 0."""
    line: int
    """Where the place is, from 1."""
    diff: str
    """The edit."""

    def edits(self) -> tuple[str, str]:
        """The lines that it removes and adds, each as one line without indentation."""
        found = [line for line in self.diff.splitlines() if not line.startswith(("---", "+++"))]
        old, new = ([ln[1:].strip() for ln in found if ln.startswith(mark)] for mark in "-+")
        return " ".join(filter(None, old)), " ".join(filter(None, new))


class Trial(Frozen):
    """What became of a mutant."""

    mutant: Mutant
    source: str
    """Hash of the module without the mutant."""
    tests: list[str]
    """Which tests judged it."""
    outcome: Literal["killed", "timed out", "survived"]
    """A test failed, or did not end; or all tests passed."""
    seconds: float


class Campaign(Frozen):
    """A sample of the mutants of every module, and what became of each."""

    tool: str
    """Name and version of what made the mutants."""
    seed: int
    per_module: int
    """Most mutants of a module."""
    commit: str | None
    """Of the checkout; None outside of one."""
    trials: list[Trial] = []


class Count(Frozen):
    """How many mutants ended how."""

    made: int
    killed: int
    timed_out: int
    equivalent: int
    """Survivors that compute the same as the code."""
    survived: int
    """The other survivors: gaps of the tests."""


def judged(path: Path = TABLE) -> dict[str, Judged]:
    """What judges each module. Raises `ValueError` for a malformed table."""
    path = paths.located(path)
    try:
        return TypeAdapter(dict[str, Judged]).validate_python(read_yaml(path))
    except ValidationError as error:
        raise ValueError(explain(error, str(path), [])) from None


def read(path: Path = PATH) -> Campaign | None:
    """The campaign at `path`; None if there is none. Raises `ValueError` for what is no campaign."""
    if not path.exists():
        return None
    try:
        return Campaign.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ValueError(explain(error, f"{path} is no record of mutants", [])) from None


def reason(mutant: Mutant, table: dict[str, Judged]) -> str | None:
    """Why `mutant` computes the same as the code; None if it is not known to."""
    known = table[mutant.module].equivalent if mutant.module in table else []
    edits = mutant.edits()
    return next((each.reason for each in known if (each.line, each.becomes) == edits), None)


def gaps(trials: Iterable[Trial], table: dict[str, Judged]) -> list[Trial]:
    """Survivors that are not known to compute the same."""
    return [t for t in trials if t.outcome == "survived" and reason(t.mutant, table) is None]


def count(trials: list[Trial], table: dict[str, Judged]) -> Count:
    """How many of `trials` ended how."""
    outcomes = [trial.outcome for trial in trials]
    survived = len(gaps(trials, table))
    return Count(
        made=len(trials),
        killed=outcomes.count("killed"),
        timed_out=outcomes.count("timed out"),
        equivalent=outcomes.count("survived") - survived,
        survived=survived,
    )
