"""Figures 8 to 10: the longest sequence by number of GPUs, a panel per model."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from harness.cells.units import length_text
from harness.judge.claims import evidence
from harness.present import drawing
from harness.present.figures.base import RELEASED_NOTE, features, methods_of, simulated
from harness.records.table import NOT_SIMULATED, Results

SIGNS = {"gpu_memory": "", "host_memory": "h", "index_range": "i", "heads": "s", "none": ""}
"""What stands at a prediction that GPU memory does not stop."""


def _predictions(results: Results, model: str, method: str) -> list[tuple[int, int, str]]:
    """(GPUs, longest tokens, sign of the limit), ascending. Settings without ALST are left out."""
    found = [
        (cell.train.world_size, s.search.longest_tokens, SIGNS[s.search.limit])
        for cell, s in simulated(results)
        if cell.train.model == model
        and cell.train.method.name == method
        and s.search
        and features(cell) != "baseline"
    ]
    return sorted(found)


def _draw_model(axes: Axes, results: Results, model: str, colours: dict[str, str]) -> None:
    for place, (method, colour) in enumerate(colours.items()):
        points = [p for p in _predictions(results, model, method) if p[1]]
        sizes, longest = [n for n, _, _ in points], [tokens for _, tokens, _ in points]
        axes.plot(sizes, longest, **drawing.mark("predicted", colour))
        for n, tokens, sign in points:
            axes.annotate(
                sign,
                (n, tokens),
                xytext=(0, 7) if place else (-11, -3),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                fontweight="bold",
                color=colour,
            )
    stars = {
        results.cells[e.key].train.world_size: e.published
        for e in evidence([results])
        if e.quantity == "longest_tokens"
        and results.cells[e.key].train.model == model
        and features(results.cells[e.key]) != "baseline"
    }
    star = drawing.mark("published", drawing.INK)
    axes.plot(list(stars), list(stars.values()), zorder=4, **star)
    sizes = sorted({n for method in colours for n, _, _ in _predictions(results, model, method)})
    unpublished = [n for n in sizes if n not in stars]
    axes.set_title(model)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [f"{n}*" if n in unpublished else str(n) for n in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: length_text(value)))
    axes.set_xlabel("GPUs")


def draw(results: Results) -> Figure:
    """Published lengths as stars, predictions as diamonds; a letter says what stops a prediction."""
    searched = [cell for cell, s in simulated(results) if s.search]
    models = list(dict.fromkeys(cell.train.model for cell in searched))
    colours = drawing.palette(methods_of(searched))
    figure = Figure(figsize=(max(3.1 * len(models), 6.2), 4.1), layout="constrained")
    grid = figure.subplots(1, max(len(models), 1), sharey=True, squeeze=False)[0]
    if not models:
        drawing.say(grid[0], NOT_SIMULATED)
    for axes, model in zip(grid, models, strict=False):
        _draw_model(axes, results, model, colours)
    grid[0].set_ylabel("longest sequence [tokens]")
    handles = [drawing.handle("published", drawing.INK, "published")]
    handles += [drawing.handle(f"predicted, {m}", c, "predicted") for m, c in colours.items()]
    return drawing.frame(figure, results, "Longest sequence by number of GPUs", handles, NOTE)


NOTE = (
    "GPU memory stops a prediction, unless a letter says otherwise: h is host memory of the node (1.9 TB), i the range of a "
    "32-bit kernel index, s the number of heads. *: no length is published. The recipe of 70B on 8 GPUs keeps checkpoints on the GPU. "
    + RELEASED_NOTE
)
