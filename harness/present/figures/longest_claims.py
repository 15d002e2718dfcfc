"""Tables 1 to 4: the longest sequence as features are added, and with and without ALST; published and predicted."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from harness.cells.cell import Cell
from harness.cells.units import LIMITS, length_text, percent_text
from harness.judge.claims import Evidence, evidence
from harness.present import drawing
from harness.present.figures.base import RELEASED_NOTE, features, methods_of
from harness.records.table import NOT_SIMULATED, Results


def draw_claims(results: Results, table: str, title: str, row: Callable[[Cell], str]) -> Figure:
    """A row per setting of `table`; beside each prediction stand its error and its limit."""
    keys = {key for key, claim in results.claims if claim.table == table}
    lengths = [e for e in evidence([results]) if e.quantity == "longest_tokens" and e.key in keys]
    rows = list(dict.fromkeys(row(results.cells[e.key]) for e in lengths))
    methods = methods_of(results.cells[e.key] for e in lengths)
    colours = drawing.palette(methods)
    figure = Figure(figsize=(8.6, 0.85 * max(len(rows), 1) + 1.8), layout="constrained")
    axes = figure.subplots()
    if not rows:
        drawing.say(axes, NOT_SIMULATED)
    for e in {e.place: e for e in lengths}.values():
        y = rows.index(row(results.cells[e.key]))
        drawing.point(axes, e.published, y, drawing.INK, "published", length_text(e.published), -1)
    for e in lengths:
        place = rows.index(row(results.cells[e.key])) + 0.2 + 0.22 * methods.index(e.method)
        _draw_prediction(axes, e, place, colours[e.method])
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.2, -0.5)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: length_text(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("longest sequence [tokens]")
    handles = [drawing.handle("published", drawing.INK, "published")]
    handles += [drawing.handle(f"predicted, {m}", colours[m], "predicted") for m in methods]
    return drawing.frame(figure, results, title, handles, NOTE)


def _draw_prediction(axes: Axes, e: Evidence, place: float, colour: str) -> None:
    if e.predicted and e.error is not None and e.limit is not None:
        text = f"{length_text(e.predicted)}, {percent_text(e.error)}, {LIMITS[e.limit]}"
        drawing.point(axes, e.predicted, place, colour, "predicted", text)


def _size(cell: Cell) -> str:
    gpus = cell.train.world_size
    feature = "baseline" if features(cell) == "baseline" else "ALST"
    return f"{gpus} GPU{'s' if gpus > 1 else ''}, {feature}"


NOTE = (
    "Beside each prediction: its length, its error against the published length, what stops a longer one. "
    + RELEASED_NOTE
)
FIGURES = {
    "feature_ablation": partial(
        draw_claims,
        table="alst_feature_ablation",
        title="Features of ALST on 8 GPUs: longest sequence",
        row=features,
    ),
    "baseline_vs_alst": partial(
        draw_claims,
        table="alst_baseline_vs_alst",
        title="Longest sequence of Llama-8B with and without ALST",
        row=_size,
    ),
}
