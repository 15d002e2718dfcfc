"""Longest sequences of a paper, and their ratios to the longest of the unsplit model: published and predicted."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from harness.cells.cell import Cell
from harness.cells.experiment import Quantity
from harness.cells.units import length_text, options_text, percent_text
from harness.judge.claims import Derived, Evidence, evidence
from harness.present import drawing
from harness.records.table import NOT_SIMULATED, Results

PANELS: dict[Quantity, str] = {
    "longest_tokens": "longest sequence [tokens]",
    "longest_ratio": "times the longest unsplit sequence",
}


def _name(cell: Cell) -> str:
    """Model and method, and whether layers are recomputed."""
    train = cell.train
    kept = [] if train.checkpoint else ["nothing recomputed"]
    of_method = [train.method.name, *options_text(train.method.options), *kept]
    return f"{train.model}: {', '.join(of_method)}"


def _number(quantity: Quantity | Derived, value: float) -> str:
    return length_text(value) if quantity == "longest_tokens" else f"{value:.3g}x"


def _draw(axes: Axes, results: Results, rows: list[str], found: list[Evidence]) -> None:
    """Both numbers of one quantity in each row, the prediction's error beside it."""
    colours = drawing.palette([cell.train.method.name for cell in results.cells.values()])
    for e in found:
        cell = results.cells[e.key]
        y, colour = rows.index(_name(cell)), colours[cell.train.method.name]
        text = _number(e.quantity, e.published)
        drawing.point(axes, e.published, y - 0.15, drawing.INK, "published", text)
        if e.predicted and e.error is not None:
            text = f"{_number(e.quantity, e.predicted)}, {percent_text(e.error)}"
            drawing.point(axes, e.predicted, y + 0.2, colour, "predicted", text)
    axes.set_xlim(left=0)


def draw(results: Results) -> Figure:
    """A row per model and method, a panel for lengths and one for ratios."""
    found = [e for e in evidence([results]) if e.quantity in PANELS]
    rows = list(dict.fromkeys(_name(results.cells[e.key]) for e in found))
    figure = Figure(figsize=(11, 1.9 + 0.5 * max(len(rows), 2)), layout="constrained")
    panels = figure.subplots(1, len(PANELS), sharey=True)
    for axes, (quantity, label) in zip(panels, PANELS.items(), strict=True):
        _draw(axes, results, rows, [e for e in found if e.quantity == quantity])
        if quantity == "longest_tokens" and found:
            low, high = axes.dataLim.intervalx
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xlim(low / 1.5, high)
        axes.set_xlabel(label)
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda value, _, quantity=quantity: _number(quantity, value))
        )
        axes.set_yticks(range(len(rows)), rows)
        axes.set_ylim(max(len(rows), 1) - 0.5, -0.5)
        if not found:
            drawing.say(axes, NOT_SIMULATED)
    methods = list(dict.fromkeys(results.cells[e.key].train.method.name for e in found))
    colours = drawing.palette([cell.train.method.name for cell in results.cells.values()])
    handles = [drawing.handle("published", drawing.INK, "published")]
    handles += [drawing.handle(f"predicted, {m}", colours[m], "predicted") for m in methods]
    return drawing.frame(figure, results, "Longest sequences on one GPU", handles, NOTE)


NOTE = "Beside each prediction: its error against the published number. A row without a length was published as a ratio alone."
