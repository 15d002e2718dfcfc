"""A metric against sequence length: a panel per model and number of ranks."""

from __future__ import annotations

from functools import partial

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.present import drawing
from harness.records.table import NOT_MEASURED, Results, measured_part, series_in_order, tidy, wide


def draw_panel(
    axes: Axes, cells: pd.DataFrame, metric: str, colours: dict[str, str], lengths: list[int]
) -> None:
    """`metric` against length in one panel, a line per series, with its failures."""
    for name, points in cells.groupby("series", sort=False):
        colour = colours[str(name)]
        if metric == "step_s":
            drawing.spread(axes, points, "step_min_s", "step_max_s", colour)
        kind = drawing.kind_of(points["world"].iloc[0])
        drawing.line(axes, points, metric, colour, kind)
    drawing.failures(axes, cells, colours)
    drawing.length_axis(axes, lengths)
    if cells[metric].isna().all():
        drawing.say(axes, NOT_MEASURED)


def draw_grid(results: Results, metric: str, title: str, note: str = "") -> Figure:
    """`metric` against length: a row of panels per model, a column per number of ranks.

    The place of a pair of model and ranks that the sweep does not have is empty.
    """
    results = measured_part(results)
    cells = wide(tidy(results))
    models, sizes = list(dict.fromkeys(cells["model"])), sorted(set(cells["world_size"]))
    colours = drawing.palette(series_in_order(results))
    lengths = sorted(set(cells["seqlen"]))
    panels = drawing.panels(models, sizes)
    for (model, size), axes in panels.axes.items():
        inside = cells[(cells["model"] == model) & (cells["world_size"] == size)]
        axes.set_visible(not inside.empty)
        draw_panel(axes, inside, metric, colours, lengths)
        axes.set_title(f"{model}, {size} rank{'s' if size > 1 else ''}")
    axis = drawing.seconds_axis if metric == "step_s" else drawing.bytes_axis
    axis(next(iter(panels.axes.values())), cells[metric])
    drawing.label_edges(panels, "sequence length [tokens]")
    return drawing.finish(panels.figure, results, title, colours, cells, note)


FIGURES = {
    "peak_memory": partial(draw_grid, metric="peak_bytes", title="Peak live tensors per rank"),
    "step_time": partial(
        draw_grid,
        metric="step_s",
        title="Time of one training step",
        note="Line: median over steps of the slowest rank. Bars and shade: fastest to slowest step.",
    ),
}
