"""What figures share: drawing one by name, and the grid of panels over models and ranks."""

from __future__ import annotations

import importlib

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alst_impl.plugin import names
from harness import drawing
from harness.table import NOT_MEASURED, Results, tidy, wide


def draw(name: str, results: Results) -> Figure:
    """The figure in file `name`, drawn from `results`. Raises `ValueError` for an unknown name."""
    if name not in names("harness.figures"):
        known = ", ".join(names("harness.figures"))
        raise ValueError(f"unknown figure '{name}'; use one of {known}")
    with mpl.rc_context(drawing.STYLE):
        figure: Figure = importlib.import_module(f"harness.figures.{name}").draw(results)
        figure.draw_without_rendering()
    return figure


def draw_panel(
    axes: Axes, cells: pd.DataFrame, metric: str, colours: dict[str, str], lengths: list[int]
) -> None:
    """`metric` against length in one panel, a line per series, with its failures."""
    for name, points in cells.groupby("series", sort=False):
        colour = colours[str(name)]
        if metric == "step_s":
            drawing.spread(axes, points, "step_min_s", "step_max_s", colour)
        drawing.line(axes, points, metric, colour, "measured")
    drawing.failures(axes, cells, colours)
    drawing.length_axis(axes, lengths)
    if cells[metric].isna().all():
        axes.text(0.5, 0.5, NOT_MEASURED, transform=axes.transAxes, ha="center", va="center")


def draw_grid(results: Results, metric: str, title: str, note: str = "") -> Figure:
    """`metric` against length: a row of panels per model, a column per number of ranks.

    A pair of model and ranks that the sweep does not have leaves its place empty.
    """
    cells = wide(tidy(results))
    models, sizes = list(dict.fromkeys(cells["model"])), sorted(set(cells["world_size"]))
    colours = drawing.palette(cells["series"])
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
