"""A table ready to print, and what all tables share."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from harness.cells.units import ratio_text

MISSING = "–"

NUMBER = re.compile(r"[-+]?\d")


@dataclass(frozen=True)
class Grid:
    """Headings and rows of text."""

    headings: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """A Markdown table. Columns of numbers are right-aligned, the first column never is."""
        columns = list(zip(*self.rows, strict=True)) or [()] * len(self.headings)
        align = ["---:" if i and _is_numeric(column) else "---" for i, column in enumerate(columns)]
        lines = [_escaped(self.headings), align, *map(_escaped, self.rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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
