"""What figures share: how one is drawn by its name, and a grid of panels by model and ranks."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from alst_impl.methods.base import load_method
from alst_impl.plugin import names
from harness.cells.cell import Cell
from harness.cells.prediction import Simulated
from harness.present import drawing
from harness.present.drawing import STOCK
from harness.records.table import (
    NOT_MEASURED,
    NOT_SIMULATED,
    Results,
    measured_part,
    series_in_order,
    tidy,
    wide,
)


def draw(name: str, results: Results) -> Figure:
    """The figure in file `name`, drawn from `results`. Raises `ValueError` for an unknown name."""
    if name not in names("harness.present.figures"):
        known = ", ".join(names("harness.present.figures"))
        raise ValueError(f"unknown figure '{name}'; use one of {known}")
    with mpl.rc_context(drawing.STYLE):
        figure: Figure = importlib.import_module(f"harness.present.figures.{name}").draw(results)
        figure.draw_without_rendering()
    return figure


Part = Literal["step", "mlp", "loss"]


def simulated(results: Results, part: Part = "step") -> Iterator[tuple[Cell, Simulated]]:
    """Cells of phantom devices that run `part`, with their readings."""
    for key, cell in results.cells.items():
        m = results.measurements.get(key)
        if cell.traits.phantom and _part(cell) == part and m and m.simulated:
            yield cell, m.simulated


def _part(cell: Cell) -> str:
    assert cell.simulation is not None
    return cell.simulation.part


def methods_of(cells: Iterable[Cell]) -> list[str]:
    """The methods of `cells`, in their order."""
    return list(dict.fromkeys(cell.train.method.name for cell in cells))


RELEASED_NOTE = "deepspeed_alst: ALST as its authors released it. alst: our own implementation."
"""What two methods are, beside published numbers."""


def features(cell: Cell) -> str:
    """Which parts of ALST a cell turns on, in words."""
    method: Any = load_method(cell.train.method)
    parts = {
        "tiled loss": getattr(method, "liger", False) or getattr(method, "tile_loss", False),
        "Ulysses": getattr(method, "sp", 1) > 1,
        "tiled MLP": getattr(method, "tile_mlp", False),
        "offload": getattr(method, "offload", False),
    }
    return "\n+ ".join(name for name, on in parts.items() if on) or "baseline"


class Timeline(NamedTuple):
    """A line of `draw_timelines`: its label, the method whose colour it has, and its readings."""

    label: str
    method: str
    readings: Simulated


def part_timelines(results: Results, part: Part, feature: str) -> list[Timeline]:
    """The cells of `part`. A cell with `feature` has the colour of its method, a cell without that of the stock model."""
    lines = []
    for cell, s in simulated(results, part):
        name = cell.train.method.name
        on = feature in features(cell)
        lines.append(Timeline(f"{feature}, {name}" if on else "whole", name if on else STOCK, s))
    return lines


def colours_of(lines: Iterable[Timeline]) -> dict[str, str]:
    """A colour for each label."""
    palette = drawing.palette(line.method for line in lines)
    return {line.label: palette[line.method] for line in lines}


def draw_timelines(axes: Axes, lines: Sequence[Timeline]) -> list[Line2D]:
    """Live bytes on the device over the course of a step, each stretched to the same width."""
    colours = colours_of(lines)
    handles = []
    for name, _, s in lines:
        if s.timeline is None:
            continue
        held = [nbytes / 2**30 for nbytes in s.timeline.device_bytes]
        at = [i / max(len(held) - 1, 1) for i in range(len(held))]
        axes.fill_between(at, held, color=colours[name], alpha=0.12, linewidth=0)
        handles += axes.plot(at, held, color=colours[name], linewidth=1.5, label=name)
        if not s.fits:
            highest_at = held.index(max(held))
            axes.plot(at[highest_at], held[highest_at], **drawing.DOES_NOT_FIT)
    axes.set_ylabel("live tensors [GiB]")
    axes.set_xlabel("course of forward and backward [events]")
    axes.set_xticks([])
    highest = max((max(s.timeline.device_bytes) for *_, s in lines if s.timeline), default=2**30)
    axes.set_ylim(0, 1.15 * highest / 2**30)
    if not handles:
        drawing.say(axes, NOT_SIMULATED)
    return handles


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
