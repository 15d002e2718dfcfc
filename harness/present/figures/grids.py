"""A metric by sequence length, or by method where there is one length: a panel per model and number of ranks."""

from __future__ import annotations

import math
from functools import partial

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from harness.cells.units import length_text, metric_text
from harness.present import drawing
from harness.records.table import (
    NOT_MEASURED,
    Results,
    measured_part,
    series_in_order,
    tidy,
    units,
    wide,
)


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


def draw_rows(axes: Axes, cells: pd.DataFrame, metric: str, colours: dict[str, str]) -> None:
    """`metric` of cells of one length in one panel: a row per series, in the order of `colours`."""
    unit, rows = units()[metric], list(colours)
    read = cells.dropna(subset=[metric])
    for _, cell in read.iterrows():
        place, colour, end = rows.index(cell["series"]), colours[cell["series"]], cell[metric]
        kind, text = drawing.kind_of(cell["world"]), metric_text(cell[metric], unit)
        if metric == "step_s":
            end = cell["step_max_s"]
            axes.hlines(place, cell["step_min_s"], end, color=colour, linewidth=4, alpha=0.4)
        drawing.point(axes, cell[metric], place, colour, kind)
        drawing.words(axes, end, place, text, drawing.INK)
    wrong = read[drawing.untrusted(read)]
    axes.plot(wrong[metric], [rows.index(name) for name in wrong["series"]], **drawing.WRONG)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    if read.empty:
        drawing.say(axes, NOT_MEASURED)
        return
    highest = float(read[metric].max())
    axes.set_xlim(0, 1.1 * highest)
    if unit == "B":
        axes.xaxis.set_major_locator(MultipleLocator(2 ** math.floor(math.log2(highest / 3))))
    axes.xaxis.set_major_formatter(lambda value, _: metric_text(value, unit))


def draw_grid(results: Results, metric: str, title: str, note: str = "") -> Figure:
    """A panel for each pair of model and ranks that the sweep has."""
    results = measured_part(results)
    cells = wide(tidy(results))
    colours = drawing.palette(series_in_order(results))
    lengths = sorted(set(cells["seqlen"]))
    pairs = list(dict.fromkeys(zip(cells["model"], cells["world_size"], strict=True)))
    by_method = len(lengths) == 1
    height = 0.9 + 0.28 * len(colours) if by_method else 2.7
    panels = drawing.panels(
        pairs, across=1 if by_method else 3, width=7.5 if by_method else 3.3, height=height
    )
    for (model, size), axes in panels.axes.items():
        inside = cells[(cells["model"] == model) & (cells["world_size"] == size)]
        axes.set_title(f"{model}, {size} rank{'s' if size > 1 else ''}")
        if by_method:
            draw_rows(axes, inside, metric, colours)
        else:
            draw_panel(axes, inside, metric, colours, lengths)
    if by_method:
        title, colours = f"{title}, {length_text(lengths[0])} tokens", {}
    else:
        axis = drawing.seconds_axis if metric == "step_s" else drawing.bytes_axis
        axis(next(iter(panels.axes.values())), cells[metric])
        drawing.label_lowest(panels, "sequence length [tokens]")
    return drawing.finish(panels.figure, results, title, colours, cells, note)


FIGURES = {
    "peak_memory": partial(draw_grid, metric="peak_bytes", title="Peak live tensors per rank"),
    "step_time": partial(
        draw_grid,
        metric="step_s",
        title="Time of one training step",
        note="Mark: median over steps of the slowest rank. Bar or shade: fastest to slowest step.",
    ),
}
