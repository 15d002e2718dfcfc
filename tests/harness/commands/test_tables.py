"""Tables on a terminal, or in a file."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console
from rich.table import Table
from samples import cuda_cell, measurement, simulated, twin_of

from harness.cells.experiment import load_experiment
from harness.commands.run import _summary
from harness.commands.tables import show

ROOT = Path(__file__).parents[3]


def shown(table: Table, width: int) -> str:
    """What a terminal of `width` characters shows of `table`."""
    console = Console(file=io.StringIO(), width=width)
    show(console, table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_no_number_is_cut() -> None:
    """However narrow the terminal: columns of words wrap, and lines become longer than it where that is not enough."""
    table = Table(box=None)
    table.add_column("a name of several words")
    table.add_column("published length", justify="right", no_wrap=True)
    table.add_row("one, two, three", "1,048,576 tokens")
    for width in (80, 30, 5):
        text = shown(table, width)
        assert "published length" in text
        assert "1,048,576 tokens" in text
        assert "…" not in text
    assert max(map(len, shown(table, 30).splitlines())) <= 30


def test_the_table_of_a_run_has_units() -> None:
    """Square brackets of a heading are words, not markup."""
    text = shown(
        _summary(load_experiment(ROOT / "experiments" / "smoke.yaml"), [measurement()]), 80
    )
    assert "step [s]" in text
    assert "peak [MiB]" in text


def test_the_table_of_a_run_takes_forecasts() -> None:
    """They have readings without a loss."""
    forecast = simulated(twin_of(cuda_cell()))
    text = shown(_summary(load_experiment(ROOT / "experiments" / "smoke.yaml"), [forecast]), 80)
    assert " ok " in text
