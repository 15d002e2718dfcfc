"""What one more token costs by method and option: bytes at the peak, work, and traffic with the host."""

from __future__ import annotations

from matplotlib.figure import Figure

from harness.cells.cell import Cell
from harness.cells.prediction import Prediction
from harness.cells.units import length_text, number_text, options_text
from harness.present import drawing
from harness.present.figures.base import simulated
from harness.records.table import NOT_SIMULATED, Results

Numbers = tuple[float, float, float | None, float | None]
"""KiB per token of a rank; GiB on the host of a node; FLOPs over the FLOPs that training needs; MiB per token
between GPU and host."""


def _label(cell: Cell) -> str:
    """Method, and the options that are not at their defaults."""
    method = cell.train.method
    options = {k: v for k, v in method.options.items() if (k, v) != ("sp", 1)}
    return ", ".join([method.name, *options_text(options)])


def _numbers(cell: Cell, p: Prediction) -> Numbers:
    slope = (p.bytes_per_local_token or 0.0) / 1024
    host = p.host_bytes / 2**30
    if p.cost is None:
        return slope, host, None, None
    ranks = cell.train.world_size
    moved = (p.cost.host_in_bytes + p.cost.host_out_bytes) * ranks / cell.train.seqlen
    return slope, host, p.cost.flops * ranks / p.flops.model_causal, moved / 2**20


def draw(results: Results) -> Figure:
    """One row per cell that asks for no search; a panel for each of its numbers."""
    rows = [
        (_label(cell), cell.train, _numbers(cell, s.prediction), s.fits)
        for cell, s in simulated(results)
        if s.prediction and s.prediction.bytes_per_local_token and s.search is None
    ]
    rows.sort(key=lambda row: -row[2][0])
    methods = list(dict.fromkeys(train.method.name for _, train, _, _ in rows))
    colours = drawing.palette(methods)
    figure = Figure(figsize=(14, 0.9 + 0.36 * max(len(rows), 3)), layout="constrained")
    if not rows:
        drawing.say(figure.subplots(), NOT_SIMULATED)
        return drawing.frame(figure, results, "What a token costs", [], NOTE)
    panels = figure.subplots(1, len(PANELS), sharey=True)
    for column, (axes, name) in enumerate(zip(panels, PANELS, strict=True)):
        for place, (_, train, numbers, fits) in enumerate(rows):
            value = numbers[column]
            if value is None:
                continue
            colour = colours[train.method.name]
            axes.plot([0, value], [place, place], color=colour, linewidth=1, alpha=0.5)
            drawing.point(axes, value, place, colour, "predicted", number_text(value), fits=fits)
        axes.set_yticks(range(len(rows)), [label for label, _, _, _ in rows])
        axes.set_xlabel(name)
        axes.set_xlim(left=0)
    handles = [drawing.handle(name, colours[name], "predicted") for name in methods]
    where = {f"{length_text(t.seqlen)} tokens on {t.world_size} GPU" for _, t, _, _ in rows}
    model = "".join(sorted({t.model for _, t, _, _ in rows}))
    title = f"What a token costs: {model}, {'; '.join(sorted(where))}"
    return drawing.frame(figure, results, title, handles, NOTE)


PANELS = (
    "KiB per token of a rank,\nallocated at the peak",
    "GiB of host memory on a node,\noptimizer states included",
    "FLOPs, over those of training\nwith nothing computed twice",
    "MiB per token\nbetween GPU and host",
)
NOTE = (
    "On a phantom device: PyTorch's own CUDA build and allocator. KiB per token: bytes that two per cent more tokens add, "
    "per token. layerwise without a number of groups runs one query head at a time. deepspeed_alst: ALST as released."
)
