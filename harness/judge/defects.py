"""Planted defects: edits of `alst_impl` or of what judges it, and the cell of the correctness matrix that catches each.

Imports no torch.
"""

from __future__ import annotations

import csv
import io
import shutil
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import ValidationError, model_validator

from alst_impl.config import Frozen
from alst_impl.plugin import explain
from harness.cells import paths
from harness.cells.paths import SOURCES
from harness.cells.yamls import read_yaml


class Edit(Frozen):
    """One replacement in a file."""

    old: str
    """Text that occurs exactly once in the file."""
    new: str


class Defect(Frozen):
    """Edits of one file."""

    package: Literal["alst_impl", "harness"] = "alst_impl"
    """Where the file is. What the harness gets wrong, tests catch: a cell judges `alst_impl` alone."""
    file: str
    """Path below the package."""
    edits: list[Edit]
    cell: dict[str, Any] | None = None
    """Settings of a cell that catches it, if none of the matrix can."""
    tests: list[str] = []
    """Tests below `tests/`, in the folder of the package, that catch it, if no gradient does."""

    @model_validator(mode="after")
    def _harness_is_left_to_tests(self) -> Self:
        if self.package == "harness" and not self.tests:
            raise ValueError("a defect of the harness has no cell that catches it; name tests")
        return self


class Catch(Frozen):
    """The cell that caught a defect."""

    defect: str
    cell: str
    """Levels of its row in the matrix; the key of a cell of the defect's own."""
    outcome: str
    """Outcome of the cell's run."""
    detail: str
    """Detail of the cell's record."""


def read_defects(path: Path) -> dict[str, Defect]:
    """Every defect by name, at least one. Raises `ValueError` for a missing or malformed file."""
    path = paths.located(path)
    raw = read_yaml(path) if path.is_file() else None
    if not raw:
        raise ValueError(f"{path}: no defect to plant; run it in a checkout that has the file")
    try:
        return {name: Defect(**value) for name, value in raw.items()}
    except ValidationError as error:
        raise ValueError(explain(error, str(path), sorted(Defect.model_fields))) from None


def plant(defect: Defect, folder: Path) -> Path:
    """Copy `alst_impl` to `folder`, and the harness if the defect is there, and plant the defect.

    Returns `folder`. Raises `ValueError` if the text to edit is gone.
    """
    for package in SOURCES:
        if package.name in {"alst_impl", defect.package}:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(package, folder / package.name, ignore=ignored)
    if defect.package == "harness":  # which finds its tables beside it
        (folder / paths.EXPERIMENTS).symlink_to(paths.HOME.resolve() / paths.EXPERIMENTS)
    path = folder / defect.package / defect.file
    source = path.read_text()
    for edit in defect.edits:
        if source.count(edit.old) != 1:
            raise ValueError(
                f"{defect.file} holds {source.count(edit.old)} times {edit.old.strip()!r}, "
                "must hold it once; mend experiments/planted/defects.yaml"
            )
        source = source.replace(edit.old, edit.new)
    path.write_text(source)
    return folder


def text_of(catches: list[Catch]) -> str:
    """`catches` as the text of a CSV file."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(Catch.model_fields), lineterminator="\n")
    writer.writeheader()
    writer.writerows(catch.model_dump() for catch in catches)
    return stream.getvalue()


def read_catches(path: Path) -> list[Catch]:
    """Read what `text_of` wrote; an empty list if the file does not exist."""
    path = paths.located(path)
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [Catch(**line) for line in csv.DictReader(file)]
