"""Published numbers: rows of the CSV files in `experiments/published/`. Imports no torch."""

from __future__ import annotations

import csv
from functools import cache
from typing import Any

from alst_impl.config import Frozen
from harness import paths


class Published(Frozen):
    """One number and where it stands."""

    value: float
    source: str
    """Document and place in it."""


@cache
def _rows(table: str) -> list[dict[str, str]]:
    path = paths.published(table)
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.csv")))
        raise ValueError(f"no published table '{table}'; use one of {known}")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def look_up(table: str, row: dict[str, Any], column: str) -> Published:
    """The number in `column` of the one row of `table` that has all values of `row`.

    Raises `ValueError` where there is no such row, several, or no number.
    """
    rows = _rows(table)
    unknown = sorted({*row, column} - set(rows[0]))
    if unknown:
        raise ValueError(
            f"table '{table}' has no column '{unknown[0]}'; it has {', '.join(rows[0])}"
        )
    found = [r for r in rows if all(r[name] == str(value) for name, value in row.items())]
    if len(found) != 1:
        raise ValueError(f"table '{table}' has {len(found)} rows with {row}; a claim needs one")
    text = found[0][column]
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"table '{table}', row {row}: '{text}' in {column} is no number") from None
    source = found[0]
    return Published(value=value, source=f"{source['source']}, {source['source_locator']}")
