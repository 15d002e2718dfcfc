"""The longest series of an experiment: peak memory and step time, every method."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from harness.present import drawing
from harness.present.figures.grids import draw_panel
from harness.records.table import Results, measured_part, tidy, wide


def longest_series(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells of the model and number of ranks that has the longest sequence."""
    first = cells.sort_values(["seqlen", "sp"], ascending=False).iloc[0]
    same_model = cells["model"] == first["model"]
    longest: pd.DataFrame = cells[same_model & (cells["world_size"] == first["world_size"])]
    return longest


def draw(results: Results) -> Figure:
    """Peak bytes and step time against length, side by side."""
    cells = longest_series(wide(tidy(measured_part(results))))
    colours = drawing.palette(cells["series"])
    lengths = sorted(set(cells["seqlen"]))
    figure = Figure(figsize=(9, 4.1), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_panel(left, cells, "peak_bytes", colours, lengths)
    drawing.bytes_axis(left, cells["peak_bytes"])
    left.set_title("Peak live tensors per rank")
    draw_panel(right, cells, "step_s", colours, lengths)
    drawing.seconds_axis(right, cells["step_s"])
    right.set_title("Time of one step, median and spread")
    for axes in (left, right):
        axes.set_xlabel("sequence length [tokens]")
    model, size = cells["model"].iloc[0], cells["world_size"].iloc[0]
    return drawing.finish(figure, results, f"{model} on {size} ranks", colours, cells)
