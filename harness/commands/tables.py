"""Tables on a terminal, or in a file."""

from __future__ import annotations

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

WIDE = 10_000
"""Characters that no table needs."""


def show(console: Console, table: Table) -> None:
    """Print `table`, wider than the console if need be: columns that do not wrap are never cut."""
    options = console.options.update(width=WIDE)
    for column in table.columns:
        if column.no_wrap:
            cells = (column.header, *column.cells)
            column.min_width = max(
                Measurement.get(console, options, each).maximum for each in cells
            )
    console.width = max(console.width, console.measure(table, options=options).minimum)
    console.print(table)
