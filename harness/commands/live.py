"""Progress on the terminal: a live line for the running cell, a lasting line for each finished one."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from harness.cells.cell import Cell
from harness.records.record import Measurement, Outcome


class CellLine:
    """The live line of one cell: its number, its activity, the time it has taken."""

    def __init__(self, console: Console, cell: Cell, number: int, total: int) -> None:
        self.console, self.title = console, f"[{number}/{total}] {cell.label}"
        self.begin = time.monotonic()
        # Without a terminal only the line of the finished cell is printed.
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task(self.title)

    def __enter__(self) -> CellLine:
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.progress.stop()

    def hear(self, event: dict[str, Any]) -> None:
        """Show the activity of rank 0."""
        if event["event"] == "progress" and event["rank"] == 0:
            self.progress.update(self.task, description=f"{self.title}: {event['doing']}")

    def done(self, measurement: Measurement, *, fresh: bool) -> None:
        """Print the line that remains."""
        took = f"{time.monotonic() - self.begin:.1f} s" if fresh else "kept"
        style = "green" if measurement.outcome is Outcome.OK else "red"
        detail = f" ({measurement.detail})" if measurement.detail else ""
        self.console.print(f"{self.title}: ", style="bold", end="", markup=False, highlight=False)
        self.console.print(f"{measurement.outcome}", style=style, end="")
        self.console.print(f" {took}{detail}", markup=False, highlight=False, soft_wrap=True)
