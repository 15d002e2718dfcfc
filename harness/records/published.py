"""Published numbers: rows of the CSV files in `experiments/published/`. Imports no torch."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path
from typing import Any

from alst_impl.config import Frozen
from harness.cells import paths


class Published(Frozen):
    """One published number and its source."""

    value: float
    source: str
    """Document, and the place in it."""


def rows(table: str) -> list[dict[str, str]]:
    """The rows of `table`. Raises `ValueError` for an unknown one."""
    path = paths.located(paths.published(table))
    if not path.is_file():
        folder = paths.located(path.parent)
        known = ", ".join(sorted(p.stem for p in folder.glob("*.csv")))
        raise ValueError(f"no published table '{table}'; use one of {known}")
    return _read(path.absolute())


@cache
def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class Record(Frozen):
    """The longest published sequence of a system."""

    system: str
    hardware: str
    num_gpus: int
    tokens: int
    source: str


def records() -> list[Record]:
    """Published lengths with exact dense attention and Llama-8B shapes."""
    return [
        Record(
            system=row["system"],
            hardware=row["hardware"],
            num_gpus=int(row["num_gpus"]),
            tokens=int(row["tokens"]),
            source=f"{row['source']}, {row['source_locator']}",
        )
        for row in rows("records")
    ]


def look_up(table: str, row: dict[str, Any], column: str) -> Published:
    """The number in `column` of the row of `table` that has all values of `row`.

    Raises `ValueError` unless exactly one such row exists and holds a number.
    """
    every = rows(table)
    unknown = sorted({*row, column} - set(every[0]))
    if unknown:
        raise ValueError(
            f"table '{table}' has no column '{unknown[0]}'; it has {', '.join(every[0])}"
        )
    found = [r for r in every if all(r[name] == str(value) for name, value in row.items())]
    if len(found) != 1:
        raise ValueError(f"table '{table}' has {len(found)} rows with {row}; a claim needs one")
    text = found[0][column]
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"table '{table}', row {row}: '{text}' in {column} is no number") from None
    where = [found[0].get(name) for name in ("source", "source_locator")]
    return Published(value=value, source=", ".join(filter(None, where)) or table)
