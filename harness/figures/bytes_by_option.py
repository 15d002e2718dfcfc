"""Bytes that one more token costs at the peak, by method and option."""

from __future__ import annotations

from matplotlib.figure import Figure

from harness import drawing
from harness.cell import Cell
from harness.figures.base import simulated
from harness.plain import tokens_text
from harness.table import NOT_MEASURED, Results


def _label(cell: Cell) -> str:
    """Method and what differs from its defaults."""
    options = cell.train.method.options
    named = [f"{k} {v}".removesuffix(" True").replace("_", " ") for k, v in options.items()]
    return ", ".join([cell.train.method.name, *(n for n in named if n != "sp 1")])


def draw(results: Results) -> Figure:
    """One row per cell that asks for no search: its slope of allocated bytes, in KiB."""
    rows = [
        (_label(cell), cell.train, s.prediction.bytes_per_local_token)
        for cell, s in simulated(results)
        if s.prediction and s.prediction.bytes_per_local_token and s.search is None
    ]
    rows.sort(key=lambda row: -row[2])
    methods = list(dict.fromkeys(train.method.name for _, train, _ in rows))
    colours = drawing.palette(methods)
    figure = Figure(figsize=(8.2, 0.9 + 0.36 * max(len(rows), 3)), layout="constrained")
    axes = figure.subplots()
    for place, (_, train, slope) in enumerate(rows):
        colour = colours[train.method.name]
        axes.plot([0, slope / 1024], [place, place], color=colour, linewidth=1, alpha=0.5)
        drawing.point(axes, slope / 1024, place, colour, "predicted", f"{slope / 1024:.1f}")
    axes.set_yticks(range(len(rows)), [label for label, _, _ in rows])
    axes.set_xlabel("KiB per token of a rank, allocated at the peak")
    axes.set_xlim(left=0)
    if not rows:
        drawing.say(axes, NOT_MEASURED)
    handles = [drawing.handle(name, colours[name], "predicted") for name in methods]
    where = {f"{t.model}, {tokens_text(t.seqlen)} tokens on {t.world_size} GPU" for _, t, _ in rows}
    title = f"What a token costs: {'; '.join(sorted(where))}" if rows else "What a token costs"
    return drawing.frame(figure, results, title, handles, NOTE)


NOTE = (
    "Counted on a simulated step, kernel scratch of FlashAttention-2 included; the slope over the next two "
    "per cent of length. No group count: one query head at a time. alst_recipe holds what the published stack held."
)
