"""A matrix of cells: factors and levels, combined so that every pair of levels occurs in some cell.

The rows are a covering array. A library generates it once, and a CSV file beside the experiment
stores it together with the refused rows, so every change of the matrix shows in review. Imports no
torch.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import model_validator

from alst_impl.config import Frozen

REFUSED = "refused"
"""Last column of the CSV: the error that refuses the row; empty for a row that runs."""

Levels = dict[str, str]
"""Factor -> level."""


class Rule(Frozen):
    """A combination of levels, or a single level, that `alst_impl` refuses."""

    when: dict[str, list[str]]
    """Factor -> levels. The rule applies if every factor has one of its listed levels."""
    because: str
    """Part of the error message."""

    def holds(self, levels: Levels) -> bool:
        """Whether `levels` are refused by this rule."""
        return all(levels[factor] in refused for factor, refused in self.when.items())


class Matrix(Frozen):
    """Factors of cells, and the strength of their covering array."""

    factors: dict[str, dict[str, dict[str, Any]]]
    """Factor -> level -> settings of a cell. In a refused row, factors that the rule does not name
    have their first level."""
    models: str | None = None
    """Folder of model configurations: a factor `model` with a level for each of its JSON files."""
    every: bool = False
    """Run every combination of levels instead of a covering array. What is refused, is found when it is run."""
    triples: list[list[str]] = []
    """Groups of factors that are covered with strength 3: every combination of levels of three
    factors in a group occurs in a row. All factors are covered with strength 2."""
    part: list[str] = []
    """Factors of the subset that tests run. The subset has every pair of their levels that the full matrix has."""
    refused: list[Rule] = []
    """Combinations that `alst_impl` refuses. No row that runs contains one."""

    @model_validator(mode="after")
    def models_are_a_factor(self) -> Matrix:
        if self.models is None or "model" in self.factors:
            return self
        files = sorted(Path(self.models).glob("*.json"))
        if not files:
            raise ValueError(f"matrix: no model configurations (*.json) in folder {self.models}")
        models = {file.stem: {"model": str(file)} for file in files}
        return self.model_copy(update={"factors": {"model": models, **self.factors}})

    def settings(self, levels: Levels) -> dict[str, Any]:
        """Cell settings of a row, merged over factors. `world_size` is `dp` times the method's other degrees."""
        merged: dict[str, Any] = {}
        for factor, level in levels.items():
            merged = merge(merged, self.factors[factor][level])
        if "dp" in merged:
            merged["world_size"] = merged.pop("dp") * math.prod(
                merged["method"].get(axis, 1) for axis in ("pp", "cp", "sp")
            )
        return merged

    def rule(self, levels: Levels) -> Rule | None:
        """The first rule that refuses `levels`, or None."""
        return next((rule for rule in self.refused if rule.holds(levels)), None)

    def rows(self) -> list[Levels]:
        """Generate the rows that run: a covering array. Deterministic; needs covertable (extra `dev`)."""
        if self.every:
            combinations = itertools.product(*self.factors.values())
            return [dict(zip(self.factors, levels, strict=True)) for levels in combinations]
        try:
            from covertable import make
        except ImportError:
            raise ValueError(
                "covertable, which makes the rows, is not installed; pip install -e '.[dev]'"
            ) from None

        made: list[Levels] = make(
            {factor: list(levels) for factor, levels in self.factors.items()},
            strength=2,
            sub_models=[{"fields": group, "strength": 3} for group in self.triples],
            constraints=[_never(rule.when) for rule in self.refused],
        )
        return [{factor: row[factor] for factor in self.factors} for row in made]

    def refusals(self) -> Iterator[Levels]:
        """Every combination that a rule refuses, with all other factors at their first level."""
        first = {factor: next(iter(levels)) for factor, levels in self.factors.items()}
        for rule in self.refused:
            for levels in itertools.product(*rule.when.values()):
                yield {**first, **dict(zip(rule.when, levels, strict=True))}

    def missing(self, rows: list[Levels]) -> set[tuple[tuple[str, str], ...]]:
        """Pairs, and triples within `triples`, that neither occur in a row nor are forbidden by a rule."""
        wanted = set(self._combinations())
        for row in rows:
            wanted -= set(_parts(row, list(row), 2))
            wanted -= {part for group in self.triples for part in _parts(row, group, 3)}
        return wanted

    def _combinations(self) -> Iterator[tuple[tuple[str, str], ...]]:
        groups: set[tuple[str, ...]] = set(itertools.combinations(self.factors, 2))
        for together in self.triples:
            ordered = [factor for factor in self.factors if factor in together]
            groups |= set(itertools.combinations(ordered, 3))
        for group in groups:
            for levels in itertools.product(*(self.factors[factor] for factor in group)):
                row = dict(zip(group, levels, strict=True))
                rules = (rule for rule in self.refused if rule.when.keys() <= row.keys())
                if not any(rule.holds(row) for rule in rules):
                    yield tuple(row.items())

    def covering(self, rows: list[Levels]) -> list[Levels]:
        """A small subset of `rows`, chosen greedily, that has every pair of `part`'s levels that `rows` has."""
        left = {pair for row in rows for pair in _parts(row, self.part, 2)}
        chosen = []
        while left:
            best = max(rows, key=lambda row: len(left & set(_parts(row, self.part, 2))))
            chosen.append(best)
            left -= set(_parts(best, self.part, 2))
        return chosen


def _parts(row: Levels, factors: list[str], size: int) -> Iterator[tuple[tuple[str, str], ...]]:
    for group in itertools.combinations([factor for factor in row if factor in factors], size):
        yield tuple((factor, row[factor]) for factor in group)


def _never(when: dict[str, list[str]]) -> dict[str, Any]:
    """The constraint that excludes `when`, in covertable's format."""
    conditions = [{"operator": "in", "left": f, "values": levels} for f, levels in when.items()]
    return {"operator": "not", "condition": {"operator": "and", "conditions": conditions}}


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`under` updated with `over`; nested mappings are merged recursively. Returns a copy."""
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


class Row(Frozen):
    """One line of the CSV."""

    levels: Levels
    refused: str | None
    """The error message; None for a row that runs."""

    @property
    def label(self) -> str:
        """`factor=level` pairs, for messages."""
        return " ".join(f"{factor}={level}" for factor, level in self.levels.items())


def text_of(rows: list[Row]) -> str:
    """The CSV text of `rows`."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*rows[0].levels, REFUSED])
    writer.writerows([*row.levels.values(), row.refused or ""] for row in rows)
    return stream.getvalue()


def read(path: Path, matrix: Matrix) -> list[Row]:
    """The rows of the CSV file `path`. Raises `ValueError` if it does not match `matrix`."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; write it with 'alst matrix --write'")
    with path.open(newline="") as file:
        lines = csv.DictReader(file)
        if lines.fieldnames != [*matrix.factors, REFUSED]:
            raise ValueError(
                f"{path}: the columns are not the factors of the experiment; write it with "
                "'alst matrix --write'"
            )
        rows = []
        for line in lines:
            refused = line.pop(REFUSED) or None
            for factor, level in line.items():
                if level not in matrix.factors[factor]:
                    raise ValueError(
                        f"{path}: factor '{factor}' has no level '{level}'; use one of "
                        f"{', '.join(matrix.factors[factor])}"
                    )
            rows.append(Row(levels=line, refused=refused))
    return rows
