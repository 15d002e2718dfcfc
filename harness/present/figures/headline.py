"""Peak memory and step time of every method, for the model and ranks with the longest sequence."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from harness.cells.units import length_text
from harness.present import drawing
from harness.present.figures.grids import draw_panel, draw_rows
from harness.records.table import Results, measured_part, series_in_order, tidy, wide

PANELS = {
    "peak_bytes": "Peak live tensors per rank",
    "step_s": "Time of one step, median and spread",
}


def longest_series(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells that share model, hardware and number of ranks with the cell of the longest sequence."""
    first = cells.sort_values(["seqlen", "sp"], ascending=False).iloc[0]
    shared = ["model", "hardware", "world_size"]
    longest: pd.DataFrame = cells[(cells[shared] == first[shared]).all(axis="columns")]
    return longest


def where(cells: pd.DataFrame) -> str:
    """Model, number of ranks and hardware of `longest_series`."""
    first = cells.iloc[0]
    size = first["world_size"]
    return f"{first['model']} on {size} rank{'s' if size > 1 else ''}, {first['hardware'].upper()}"


def draw(results: Results) -> Figure:
    """Peak bytes and step time side by side: against length, or by method where there is one length."""
    results = measured_part(results)
    cells = longest_series(wide(tidy(results)))
    shown = set(cells["series"])
    colours = drawing.palette(name for name in series_in_order(results) if name in shown)
    lengths = sorted(set(cells["seqlen"]))
    title = where(cells)
    if len(lengths) == 1:
        figure = _draw_rows(cells, colours)
        title, colours = f"{title}, {length_text(lengths[0])} tokens", {}
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
        draw_rows(axes, cells, metric, colours)
        axes.set_title(title)
    return figure
