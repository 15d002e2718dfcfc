"""Tables 2 to 4: the longest sequence with and without ALST on 1, 8 and 32 GPUs."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from harness.cells.units import percent_text, tokens_text
from harness.judge.claims import Evidence, evidence
from harness.present import drawing
from harness.present.figures.base import RELEASED_NOTE, features
from harness.records.table import NOT_SIMULATED, Results

TABLES = "alst_baseline_vs_alst"


def _series(results: Results, e: Evidence) -> str:
    """`baseline` where no feature of ALST is on, else the method."""
    return "baseline" if features(results.cells[e.key]) == "baseline" else e.method


def draw(results: Results) -> Figure:
    """A group per number of GPUs, in it the baseline, the published ALST and ours."""
    tables = {key for key, claim in results.claims if claim.table == TABLES}
    lengths = [e for e in evidence([results]) if e.quantity == "longest_tokens" and e.key in tables]
    sizes = sorted({results.cells[e.key].train.world_size for e in lengths})
    shown = list(dict.fromkeys(_series(results, e) for e in lengths))
    colours = drawing.palette(shown)
    figure = Figure(figsize=(8.6, 4.6), layout="constrained")
    axes = figure.subplots()
    if not lengths:
        drawing.say(axes, NOT_SIMULATED)
    for e in lengths:
        name = _series(results, e)
        x = sizes.index(results.cells[e.key].train.world_size) + 0.3 * (shown.index(name) - 1)
        if not e.is_ours:
            drawing.point(axes, x - 0.04, e.published, colours[name], "published")
        if e.predicted and e.error is not None:
            text = f"{tokens_text(e.predicted)}\n{percent_text(e.error)}\n{e.limit}"
            drawing.point(axes, x + 0.02, e.predicted, colours[name], "predicted", text)
    axes.set_xticks(range(len(sizes)), [f"{n} GPU{'s' if n > 1 else ''}" for n in sizes])
    axes.set_xlim(-0.5, max(len(sizes), 1) - 0.3)
    axes.grid(visible=False, axis="x")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tokens_text(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.margins(y=0.1)
    axes.set_ylabel("longest sequence [tokens]")
    handles = [drawing.handle("published", drawing.INK, "published")]
    handles += [drawing.handle(f"predicted, {n}", colours[n], "predicted") for n in shown]
    title = "Longest sequence of Llama-8B with and without ALST"
    return drawing.frame(figure, results, title, handles, NOTE)


NOTE = (
    "Beside each prediction: its length, its error against the published length, what stops a longer one. "
    + RELEASED_NOTE
)
