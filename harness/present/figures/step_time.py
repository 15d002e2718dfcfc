"""Step time against sequence length, a panel per model and number of ranks."""

from __future__ import annotations

from matplotlib.figure import Figure

from harness.present.figures.base import draw_grid
from harness.records.table import Results


def draw(results: Results) -> Figure:
    """Median step of the slowest rank; the shade spans the fastest to the slowest step."""
    return draw_grid(
        results,
        "step_s",
        "Time of one training step",
        note="Line: median over steps of the slowest rank. Bars and shade: fastest to slowest step.",
    )
