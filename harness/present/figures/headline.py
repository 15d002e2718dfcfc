"""Peak memory and step time of every method, for the model and ranks with the longest sequence."""

from __future__ import annotations

import math

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from harness.cells.units import length_text, metric_text
from harness.present import drawing
from harness.present.figures.grids import draw_panel
from harness.records.table import (
    NOT_MEASURED,
    Results,
    measured_part,
    series_in_order,
    tidy,
    units,
    wide,
)

PANELS = {
    "peak_bytes": "Peak live tensors per rank",
    "step_s": "Time of one step, median and spread",
}


def longest_series(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells that share model and number of ranks with the cell of the longest sequence."""
    first = cells.sort_values(["seqlen", "sp"], ascending=False).iloc[0]
    same_model = cells["model"] == first["model"]
    longest: pd.DataFrame = cells[same_model & (cells["world_size"] == first["world_size"])]
    return longest


def draw(results: Results) -> Figure:
    """Peak bytes and step time side by side: against length, or by method where there is one length."""
    results = measured_part(results)
    cells = longest_series(wide(tidy(results)))
    shown = set(cells["series"])
    colours = drawing.palette(name for name in series_in_order(results) if name in shown)
    lengths = sorted(set(cells["seqlen"]))
    model, size = cells["model"].iloc[0], cells["world_size"].iloc[0]
    title = f"{model} on {size} ranks"
    if len(lengths) == 1:
        figure = _draw_rows(cells, colours)
        title = f"{title}, {length_text(lengths[0])} tokens"
    else:
        figure = _draw_lines(cells, colours, lengths)
    return drawing.finish(figure, results, title, colours, cells)


def _draw_lines(cells: pd.DataFrame, colours: dict[str, str], lengths: list[int]) -> Figure:
    figure = Figure(figsize=(9, 4.1), layout="constrained")
    for axes, (metric, title) in zip(figure.subplots(1, 2), PANELS.items(), strict=True):
        draw_panel(axes, cells, metric, colours, lengths)
        axis = drawing.seconds_axis if metric == "step_s" else drawing.bytes_axis
        axis(axes, cells[metric])
        axes.set_title(title)
        axes.set_xlabel("sequence length [tokens]")
    return figure


def _draw_rows(cells: pd.DataFrame, colours: dict[str, str]) -> Figure:
    """A row per series, in the order of `colours`."""
    figure = Figure(figsize=(9, 1.5 + 0.3 * len(colours)), layout="constrained")
    for axes, (metric, title) in zip(
        figure.subplots(1, 2, sharey=True), PANELS.items(), strict=True
    ):
        _draw_row_panel(axes, cells, metric, colours)
        axes.set_title(title)
        axes.set_yticks(range(len(colours)), list(colours))
        axes.set_ylim(len(colours) - 0.5, -0.5)
    return figure


def _draw_row_panel(axes: Axes, cells: pd.DataFrame, metric: str, colours: dict[str, str]) -> None:
    unit = units()[metric]
    read = cells.dropna(subset=[metric])
    for _, cell in read.iterrows():
        place, colour = list(colours).index(cell["series"]), colours[cell["series"]]
        kind, text = drawing.kind_of(cell["world"]), metric_text(cell[metric], unit)
        if metric == "step_s":
            spread = cell["step_min_s"], cell["step_max_s"]
            axes.hlines(place, *spread, color=colour, linewidth=4, alpha=0.4)
        drawing.point(axes, cell[metric], place, colour, kind, text, ink=drawing.INK)
    wrong = read[drawing.untrusted(read)]
    places = [list(colours).index(name) for name in wrong["series"]]
    axes.plot(wrong[metric], places, **drawing.WRONG)
    if read.empty:
        drawing.say(axes, NOT_MEASURED)
        return
    highest = float(read[metric].max())
    axes.set_xlim(0, 1.25 * highest)
    if unit == "B":
        axes.xaxis.set_major_locator(MultipleLocator(2 ** math.floor(math.log2(highest / 3))))
    axes.xaxis.set_major_formatter(lambda value, _: metric_text(value, unit))
