"""A table ready to print, and what all tables share."""

from __future__ import annotations

import csv
import html
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from harness.cells.units import ratio_text
from harness.records.inert import inert

MISSING = "–"

NUMBER = re.compile(r"[-+]?\d")


UNITS = {
    "K": 2**10,
    "M": 2**20,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "ms": 1e-3,
}
"""Units of numbers in tables, which sort by their value; any other unit counts as 1."""


@dataclass(frozen=True)
class Grid:
    """Headings and rows of text."""

    headings: list[str]
    rows: list[list[str]]
    records: list[Path | None] = field(default_factory=list)
    """The record that each row is of, if any."""

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers; the first, which names the row, never does."""
        columns = list(zip(*self.rows, strict=True)) or [()] * len(self.headings)
        return [bool(i) and _is_numeric(column) for i, column in enumerate(columns)]

    def markdown(self) -> str:
        """A Markdown table. Columns of numbers are right-aligned."""
        align = ["---:" if numeric else "---" for numeric in self.numeric]
        lines = [_escaped(self.headings), align, *map(_escaped, self.rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def csv(self) -> str:
        """The same as CSV, with the record of each row where there are records."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        named = any(self.records)
        records = [[record or ""] for record in self.records] if named else [[] for _ in self.rows]
        writer.writerow([*self.headings, *["record"] * named])
        rows = ([*row, *record] for row, record in zip(self.rows, records, strict=True))
        writer.writerows(map(inert, row) for row in rows)
        return stream.getvalue()


def sort_value(text: str) -> float | None:
    """The number that `text` begins with, in the base of its unit; None for other text."""
    found = re.match(r"([-+]?[\d,]*\.?\d+(?:e[-+]?\d+)?)\s?([A-Za-z]*)", text)
    if not found:
        return None
    return float(found[1].replace(",", "")) * UNITS.get(found[2], 1)


def _is_numeric(column: Sequence[str]) -> bool:
    """Whether every value that is not missing begins with a number."""
    values = [value for value in column if value not in (MISSING, "")]
    return bool(values) and all(NUMBER.match(value) for value in values)


def _escaped(cells: Sequence[str]) -> list[str]:
    """Text that Markdown shows as it is: records hold `|` and `<`."""
    return [html.escape(" ".join(cell.split()), quote=False).replace("|", "\\|") for cell in cells]


def rows_of(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of `table`, by column."""
    return [{str(k): v for k, v in row.items()} for row in table.to_dict("records")]


def ratio_or_missing(value: float) -> str:
    """A ratio; a dash where there is none."""
    return MISSING if math.isnan(value) else ratio_text(value)
