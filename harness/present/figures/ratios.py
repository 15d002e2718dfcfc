"""`layerwise` beside `alst`, run in turn: how much less memory, and how much time, with spread."""

from __future__ import annotations

from matplotlib.figure import Figure

from harness.cells.units import length_text, ratio_text
from harness.present import drawing
from harness.records.table import NOT_MEASURED, Results, repeated_duels

OURS, PEER = "layerwise", "alst"


def draw(results: Results) -> Figure:
    """A row per length and set of options; a bar spans the repetitions, the mark is their median."""
    rows = repeated_duels(results, OURS, PEER)
    names = list(dict.fromkeys(rows["series_ours"]))
    colours = drawing.palette(names)
    figure = Figure(figsize=(9, 1.6 + 0.42 * max(len(rows), 2)), layout="constrained")
    for axes, column, title in zip(
        figure.subplots(1, 2, sharey=True),
        ("peak", "time"),
        (f"peak live bytes, {PEER} = 1", f"time of a step, {PEER} = 1"),
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
            drawing.point(axes, row[column], place, colour, "measured", ratio_text(row[column]))
        axes.axvline(1, color=drawing.FAINT, linewidth=1)
        axes.margins(x=0.2)
        axes.set_xlim(left=0)
        axes.set_xlabel(title)
        axes.set_yticks(
            range(len(rows)),
            [
                f"{length_text(n)}, {k}x"
                for n, k in zip(rows["seqlen"], rows["repetitions"], strict=True)
            ],
        )
        axes.set_ylim(max(len(rows), 1) - 0.5, -0.5)
        if rows.empty:
            drawing.say(axes, NOT_MEASURED)
    handles = [drawing.handle(name, colours[name], "measured") for name in names]
    return drawing.frame(figure, results, f"{OURS} beside {PEER}", handles, NOTE)


NOTE = (
    "Each repetition runs every method once, one after the other, and is compared with itself: median of its "
    "steps over median of the other's. Mark: median over repetitions; bar: least to largest."
)
