"""What a GPU measured beside what a phantom device read of the same cell, phase by phase."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from harness.judge.twins import Twin, twins
from harness.present import drawing
from harness.records.table import NOT_MEASURED, Results

SHOWN = {
    "allocated, forward": "allocated, forward",
    "allocated, backward": "allocated, backward",
    "reserved": "reserved",
    "nvml": "NVML",
}
"""Quantity -> its panel."""


def draw(results: Results) -> Figure:
    """A row per cell: measured and predicted bytes side by side, in a panel per quantity."""
    found = twins(results)
    rows = list(dict.fromkeys(f"{t.cell.label}, {t.cell.train.engine.name}" for t in found))
    colours = drawing.palette(t.cell.train.method.name for t in found)
    height = 3.2 + 0.32 * len(rows)
    figure = Figure(figsize=(14, height), layout="constrained")
    panels = figure.subplots(1, len(SHOWN), sharey=True)
    for axes, (quantity, title) in zip(panels, SHOWN.items(), strict=True):
        axes.set_title(title)
        axes.set_xlabel("GiB")
        for twin in found:
            if twin.quantity == quantity:
                _draw_pair(axes, twin, rows, colours)
        axes.set_xlim(0, 1.05 * max((t.measured / 2**30 for t in found), default=1))
        axes.set_yticks(range(len(rows)), rows)
        axes.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    if not found:
        drawing.say(panels[1], NOT_MEASURED)
    handles = [
        drawing.handle("measured", drawing.INK, "measured"),
        drawing.handle("predicted", drawing.INK, "predicted"),
    ]
    return drawing.frame(figure, results, "Peak bytes of one GPU", handles, NOTE)


def _draw_pair(axes: Axes, twin: Twin, rows: list[str], colours: dict[str, str]) -> None:
    y = rows.index(f"{twin.cell.label}, {twin.cell.train.engine.name}")
    colour = colours[twin.cell.train.method.name]
    measured, predicted = twin.measured / 2**30, twin.predicted / 2**30
    axes.plot([measured, predicted], [y, y], color=colour, linewidth=1)
    drawing.point(axes, measured, y, colour, "measured")
    drawing.point(axes, predicted, y, colour, "predicted")
    drawing.words(axes, max(measured, predicted), y, f"{twin.error:+.1%}", colour)


NOTE = (
    "Predicted: on a phantom device, by PyTorch's own CUDA build and allocator. Allocated bytes have to be equal "
    "at equal versions of torch. Reserved bytes depend on the timing of streams, which a phantom device does not know. NVML: "
    "reserved bytes plus a modelled constant. Percentages: predicted over measured, less one."
)
