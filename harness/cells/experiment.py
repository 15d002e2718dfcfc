"""An experiment: a YAML file that expands to cells, and the published numbers that they are compared with."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from alst_impl.config import Frozen
from alst_impl.plugin import explain
from harness.cells import grid, paths
from harness.cells.cell import Cell, make_cell
from harness.cells.grid import Matrix, Row, merge
from harness.cells.yamls import read_yaml

Quantity = Literal[
    "longest_tokens",
    "longest_ratio",
    "step_seconds",
    "speedup",
    "tokens_per_second",
    "device_bytes",
    "allocated_bytes",
]
"""Published quantities: longest sequence, its ratio to another run's, time of a step, time of another system over it,
tokens of all ranks per second, device memory as NVML reads it, allocated memory as PyTorch's profiler reads it."""


MOST_CELLS = 100_000
"""Cells of all grids of an experiment together."""


class Claim(Frozen):
    """The published numbers that a cell is compared with."""

    id: str
    """Short and unique. A suffix with the quantity is added for each number."""
    table: str
    """A file of `experiments/published/`, without `.csv`."""
    row: dict[str, Any]
    """Column -> value. Selects exactly one row of the table."""
    columns: dict[Quantity, str]
    """Quantity -> the column with its published value."""
    over: str | None = None
    """Id of the claim whose longest sequence is the denominator of `longest_ratio`."""
    used_for_fit: list[Quantity] = []
    """Quantities that model constants were fitted on. They are not evidence."""
    ruled_out: dict[Quantity, str] = {}
    """Quantity that we miss -> the causes that were examined and excluded."""


class Sweep(Frozen):
    """A grid of cells: every combination of `axes` on top of the experiment's base and `base`."""

    base: dict[str, Any] = {}
    """Fields of `Cell` and `TrainConfig` shared by the grid."""
    axes: dict[str, list[Any]] = {}
    """Field -> values. Under a name that starts with `_`, a value is a mapping that sets several
    fields at once. The field `claim` is a `Claim`."""


class Experiment(Frozen):
    """One question and the cells that answer it."""

    name: str
    """The file's name."""
    question: str
    """What the experiment answers, in one sentence."""
    source: str
    """Where the question comes from."""
    base: dict[str, Any] = {}
    """Fields shared by all cells."""
    sweeps: list[Sweep] = []
    """Grids; a cell that two grids share is run once."""
    matrix: Matrix | None = None
    """Factors. Their covering array is the CSV file beside the YAML."""
    rows: list[Row] = []
    """Rows of the covering array, read from the CSV. The YAML must not set them."""
    figures: list[str] = []
    """Files in `harness/present/figures/` drawn from this experiment's table."""

    def cells(self) -> dict[str, Cell]:
        """All cells by key, checked. Raises `ValueError` naming the value, the rule and the way out."""
        cells = [make_cell(settings) for settings, _ in self._points()]
        cells += [cell for _, cell in self.matrix_cells()]
        return {cell.key: cell for cell in cells}

    def matrix_cells(self) -> list[tuple[Row, Cell]]:
        """The rows of the matrix that run, with their cells. Raises `ValueError` as `cells` does."""
        return [(row, self._matrix_cell(row)) for row in self.rows if row.refused is None]

    def all_rows(self) -> list[Row]:
        """Every combination of levels, those that cannot be cells with their error message."""
        assert self.matrix is not None
        found = []
        for levels in self.matrix.rows():
            try:
                make_cell(merge(self.base, self.matrix.settings(levels)))
            except ValueError as error:
                found.append(Row(levels=levels, refused=str(error)))
            else:
                found.append(Row(levels=levels, refused=None))
        return found

    def refusals(self) -> list[Row]:
        """The refused rows of the matrix, each with its current error message.

        Raises `ValueError` for a row that is accepted, or refused for another reason than its rule gives.
        """
        assert self.matrix is not None
        if self.matrix.every:
            return [row for row in self.rows if row.refused is not None]
        found = []
        for levels in self.matrix.refusals():
            row, rule = Row(levels=levels, refused=None), self.matrix.rule(levels)
            assert rule is not None
            try:
                make_cell(merge(self.base, self.matrix.settings(levels)))
            except ValueError as error:
                row = Row(levels=levels, refused=str(error))
            if rule.because not in (row.refused or ""):
                said = row.refused or "it can run"
                raise ValueError(f"refused {rule.when} ({rule.because}): {said}")
            found.append(row)
        return found

    def _matrix_cell(self, row: Row) -> Cell:
        assert self.matrix is not None
        try:
            return make_cell(merge(self.base, self.matrix.settings(row.levels)))
        except ValueError as error:
            raise ValueError(f"{row.label}: {error}") from None

    def claims(self) -> list[tuple[str, Claim]]:
        """(cell key, claim) pairs in the order of the file."""
        points = ((make_cell(settings).key, claim) for settings, claim in self._points())
        found = [(key, claim) for key, claim in points if claim is not None]
        ids = [claim.id for _, claim in found]
        twice = sorted({name for name in ids if ids.count(name) > 1})
        if twice:
            raise ValueError(f"claim '{twice[0]}' is made by two cells; give each an id of its own")
        for _, claim in found:
            if ("longest_ratio" in claim.columns) != (claim.over in ids):
                raise ValueError(
                    f"claim '{claim.id}': 'over' is {claim.over!r}; a longest_ratio needs the id of another claim of its "
                    "experiment there, and other claims have no 'over'"
                )
        return found

    def _points(self) -> Iterator[tuple[dict[str, Any], Claim | None]]:
        """Settings and claim of every point of every grid."""
        counts = [math.prod(map(len, sweep.axes.values())) for sweep in self.sweeps]
        if sum(counts) > MOST_CELLS:
            raise ValueError(f"{sum(counts):,} cells; sweep over at most {MOST_CELLS:,}")
        for sweep in self.sweeps:
            for values in itertools.product(*sweep.axes.values()):
                settings = {**self.base, **sweep.base}
                for field, value in zip(sweep.axes, values, strict=True):
                    group = field.startswith("_")
                    if group and not isinstance(value, dict):
                        raise ValueError(
                            f"axis '{field}': {value!r} is no mapping of fields; write {{field: value}}"
                        )
                    settings.update(value if group else {field: value})
                claim = settings.pop("claim", None)
                yield settings, None if claim is None else _claim(claim)


def _claim(raw: Any) -> Claim:
    try:
        return Claim.model_validate(raw)
    except ValidationError as error:
        raise ValueError(explain(error, "claim", sorted(Claim.model_fields))) from None


def load_experiment(path: Path) -> Experiment:
    """Read and check `path`. Raises `ValueError` naming file, key and value."""
    path = paths.located(path)
    experiment = read_experiment(path)
    try:
        if experiment.matrix and experiment.matrix.every:
            experiment = experiment.model_copy(update={"rows": experiment.all_rows()})
        elif experiment.matrix:
            rows = grid.read(path.with_suffix(".csv"), experiment.matrix)
            experiment = experiment.model_copy(update={"rows": rows})
        cells = experiment.cells()
        experiment.claims()
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
    if not cells:
        raise ValueError(f"{path}: no cells; give 'sweeps' a grid, or a matrix a row that runs")
    return experiment


def read_experiment(path: Path) -> Experiment:
    """Parse `path` without reading matrix rows and without checking cells. Raises `ValueError` as
    `load_experiment` does.
    """
    path = paths.located(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such experiment; use one of {_known()}")
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: must be a mapping with 'question', 'source' and 'sweeps'")
    try:
        return Experiment(name=path.stem, **raw)
    except ValidationError as error:
        raise ValueError(explain(error, str(path), sorted(Experiment.model_fields))) from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def _known() -> str:
    return ", ".join(str(paths.EXPERIMENTS / path.name) for path in paths.experiments())
