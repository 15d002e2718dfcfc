"""Table 1: the longest sequence as features are added; published and predicted."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from harness.cells.units import percent_text, tokens_text
from harness.judge.claims import evidence
from harness.present import drawing
from harness.present.figures.base import RELEASED_NOTE, features, methods_of
from harness.records.table import NOT_SIMULATED, Results


def draw(results: Results) -> Figure:
    """A row per set of features; beside each prediction stand its error and its limit."""
    lengths = [e for e in evidence([results]) if e.quantity == "longest_tokens"]
    rows = list(dict.fromkeys(features(results.cells[e.key]) for e in lengths))
    methods = methods_of(results.cells[e.key] for e in lengths)
    colours = drawing.palette(methods)
    figure = Figure(figsize=(8.6, 0.85 * max(len(rows), 1) + 1.8), layout="constrained")
    axes = figure.subplots()
    if not rows:
        drawing.say(axes, NOT_SIMULATED)
    for e in {e.place: e for e in lengths}.values():
        y = rows.index(features(results.cells[e.key]))
        drawing.point(axes, e.published, y, drawing.INK, "published", tokens_text(e.published), -1)
    for e in lengths:
        if e.predicted and e.error is not None:
            row = rows.index(features(results.cells[e.key]))
            place = row + 0.2 + 0.22 * methods.index(e.method)
            text = f"{tokens_text(e.predicted)}, {percent_text(e.error)}, {e.limit}"
            drawing.point(axes, e.predicted, place, colours[e.method], "predicted", text)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.2, -0.5)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tokens_text(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_xlim()
    axes.set_xlim(low / 2, high * 6)  # room for the words
    axes.set_xlabel("longest sequence [tokens]")
    handles = [drawing.handle("published", drawing.INK, "published")]
    handles += [drawing.handle(f"predicted, {m}", colours[m], "predicted") for m in methods]
    return drawing.frame(
        figure, results, "Features of ALST on 8 GPUs: longest sequence", handles, NOTE
    )


NOTE = (
    "Beside each prediction: its length, its error against the published length, what stops a longer one. "
    + RELEASED_NOTE
)
