"""Methods beside `alst`, run in turn: ratios of memory and of time, with their spread."""

from __future__ import annotations

from matplotlib.figure import Figure

from harness.cells.units import length_text, ratio_text
from harness.judge.claims import OURS
from harness.present import drawing
from harness.present.figures.base import methods_of
from harness.records.table import NOT_MEASURED, Results, repeated_duels


def draw(results: Results) -> Figure:
    """A row per length and set of options; a bar spans the repetitions, the mark is their median."""
    methods = [method for method in methods_of(results.cells.values()) if method != OURS]
    rows = repeated_duels(results, OURS)
    names = list(dict.fromkeys(rows["series_ours"]))
    colours = drawing.palette(names)
    figure = Figure(figsize=(9, 1.6 + 0.42 * max(len(rows), 2)), layout="constrained")
    for axes, column, title in zip(
        figure.subplots(1, 2, sharey=True),
        ("peak", "time"),
        (f"peak live bytes, {OURS} = 1", f"time of a step, {OURS} = 1"),
        strict=True,
    ):
        for place, (_, row) in enumerate(rows.iterrows()):
            colour = colours[row["series_ours"]]
            axes.hlines(
                place,
                row[f"{column}_low"],
                row[f"{column}_high"],
                color=colour,
                linewidth=4,
                alpha=0.4,
            )
            drawing.point(axes, row[column], place, colour, "measured")
            text = ratio_text(row[column])
            drawing.words(axes, row[f"{column}_high"], place, text, drawing.INK)
        axes.axvline(1, color=drawing.FAINT, linewidth=1)
        axes.set_xlim(left=0)
        axes.set_xlabel(title)
        axes.set_yticks(
            range(len(rows)),
            [
                f"{length_text(n)}, {k} run{'s' if k > 1 else ''}"
                for n, k in zip(rows["seqlen"], rows["repetitions"], strict=True)
            ],
        )
        axes.set_ylim(max(len(rows), 1) - 0.5, -0.5)
        if rows.empty:
            drawing.say(axes, NOT_MEASURED)
    handles = [drawing.handle(name, colours[name], "measured") for name in names]
    return drawing.frame(figure, results, f"{', '.join(methods)} beside {OURS}", handles, NOTE)


NOTE = (
    "Each run takes every method once, one after the other. A ratio is of one run: the median step of a method over "
    "that of alst. Mark: median over runs. Bar: least to largest."
)
