"""What the commands are put through: wrong input by level, faults, and strangers. Tests run it, and a page counts it."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from alst_impl.config import Frozen
from alst_impl.plugin import explain
from harness.cells import paths
from harness.cells.yamls import read_yaml

FOLDER = paths.EXPERIMENTS / "fire"
Table = TypeVar("Table")


class Case(Frozen):
    """One wrong input: what differs from the level's valid one, and the words of the line that refuses it."""

    says: list[str]
    """The value, the rule and the way out."""
    run: str | None = None
    """Arguments of `alst`; None for the level's."""
    file: str | None = None
    """The file's path; None for the level's."""
    set: dict[str, Any] = {}
    """Keys of the level's document, joined by dots -> values."""
    drop: list[str] = []
    """Keys that are left out."""
    text: str | None = None
    """The file, in place of the document."""
    times: int = 1
    """How many times `text` stands in the file."""
    hex: str | None = None
    """The file, in place of the document, by its bytes."""
    link: str | None = None
    """Where the file, a symbolic link, points."""
    folder: bool = False
    """Whether a folder has the file's name."""
    env: dict[str, str | None] = {}
    """Environment variables; None removes one."""
    shell: str | None = None
    """What runs, for input that only a process can have; `alst` in it is the command."""
    code: int = 2
    """The documented exit code."""


class Level(Frozen):
    """Inputs of one kind."""

    about: str
    """What is wrong there."""
    run: str = ""
    """Arguments of `alst` that read the document."""
    file: str | None = None
    """The document's path."""
    valid: dict[str, Any] | str | None = None
    """A document that is accepted, or where it lies in a checkout."""
    cases: dict[str, Case]
    """By what is wrong; for commands without a document, by their arguments."""


class Proof(Frozen):
    """What must hold whatever happens, and the tests that show it."""

    after: str
    """What holds afterwards."""
    tests: list[str]
    """Below `tests/`, as pytest names them."""


def inputs() -> dict[str, Level]:
    """Wrong inputs by level."""
    return _read("inputs.yaml", dict[str, Level])


def faults() -> dict[str, Proof]:
    """What a run survives."""
    return _read("faults.yaml", dict[str, Proof])


def strangers() -> dict[str, Proof]:
    """What other users, files and records of others cannot do."""
    return _read("strangers.yaml", dict[str, Proof])


def _read(name: str, kind: type[Table]) -> Table:
    path = paths.located(FOLDER / name)
    try:
        return TypeAdapter(kind).validate_python(read_yaml(path))
    except ValidationError as error:
        raise ValueError(explain(error, str(path), [])) from None
