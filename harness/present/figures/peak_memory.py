"""Peak bytes of one rank against sequence length, a panel per model and number of ranks."""

from __future__ import annotations

from matplotlib.figure import Figure

from harness.present.figures.base import draw_grid
from harness.records.table import Results


def draw(results: Results) -> Figure:
    """Tracked peak of live tensors on the compute device, the largest over ranks."""
    return draw_grid(results, "peak_bytes", "Peak live tensors per rank")
