"""A matrix of cells: factors and their levels, crossed so that all pairs of levels meet in some cell.

The rows are a covering array, made by a library once and kept beside the experiment as CSV, refusals
included: no cell enters or leaves the matrix without a change that can be reviewed. Imports no torch.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alst_impl.config import Frozen

REFUSED = "refused"
"""Last column of the file: why the library refuses the row; empty for a row that runs."""

Levels = dict[str, str]
"""Factor -> level."""


class Rule(Frozen):
    """Levels that the library refuses when they meet, or one that it always refuses."""

    when: dict[str, list[str]]
    """Factor -> levels; the rule holds where every factor has one of its levels."""
    because: str
    """Part of what the refusal says."""

    def holds(self, levels: Levels) -> bool:
        """Whether `levels` are refused by this rule."""
        return all(levels[factor] in refused for factor, refused in self.when.items())


class Matrix(Frozen):
    """Factors of cells and how densely they are crossed."""

    factors: dict[str, dict[str, dict[str, Any]]]
    """Factor -> level -> settings of a cell. The first level is what refused rows have elsewhere."""
    triples: list[list[str]]
    """Groups of factors of which every three levels meet in some row; of all factors every two do."""
    part: list[str] = []
    """Factors of the part that tests run: every two of their levels meet in it, where the rows of the
    whole have them meet."""
    refused: list[Rule] = []
    """What the library refuses; no row that runs has such levels."""

    def settings(self, levels: Levels) -> dict[str, Any]:
        """Settings of a row, merged over factors; `dp` becomes the number of ranks."""
        merged: dict[str, Any] = {}
        for factor, level in levels.items():
            merged = merge(merged, self.factors[factor][level])
        if "dp" in merged:
            merged["world_size"] = merged.pop("dp") * math.prod(
                merged["method"].get(axis, 1) for axis in ("pp", "cp", "sp")
            )
        return merged

    def rule(self, levels: Levels) -> Rule | None:
        """The rule by which `levels` are refused, if there is one."""
        return next((rule for rule in self.refused if rule.holds(levels)), None)

    def rows(self) -> list[Levels]:
        """Rows that run: a covering array. Deterministic; needs the library of the extra `dev`."""
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
        """Every combination that a rule names, alone: all other factors at their first level."""
        first = {factor: next(iter(levels)) for factor, levels in self.factors.items()}
        for rule in self.refused:
            for levels in itertools.product(*rule.when.values()):
                yield {**first, **dict(zip(rule.when, levels, strict=True))}

    def missing(self, rows: list[Levels]) -> set[tuple[tuple[str, str], ...]]:
        """Pairs, and triples of `triples`, that no row has although no rule forbids them."""
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
        """The fewest rows, found greedily, that show every pair of `part`'s levels that `rows` show."""
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
    """The library's words for: these levels do not meet."""
    conditions = [{"operator": "in", "left": f, "values": levels} for f, levels in when.items()]
    return {"operator": "not", "condition": {"operator": "and", "conditions": conditions}}


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `under`, mappings inside merged alike. Copies; changes neither."""
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


class Row(Frozen):
    """One line of the file."""

    levels: Levels
    refused: str | None
    """What the library says, where it refuses."""

    @property
    def label(self) -> str:
        """Level by level, for people."""
        return " ".join(f"{factor}={level}" for factor, level in self.levels.items())


def text_of(rows: list[Row]) -> str:
    """The file of `rows`."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*rows[0].levels, REFUSED])
    writer.writerows([*row.levels.values(), row.refused or ""] for row in rows)
    return stream.getvalue()


def read(path: Path, matrix: Matrix) -> list[Row]:
    """The rows in `path`. Raises `ValueError` for a file that is not of `matrix`."""
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
