"""All methods side by side: the longest sequence and what a token costs, by number of GPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from alst_impl.layout import AXES
from alst_impl.ops.attention.cores.base import load_core
from harness.cells.cell import Cell
from harness.cells.prediction import Simulated
from harness.cells.units import LIMITS, bytes_text, length_text
from harness.present import drawing
from harness.present.figures.base import simulated
from harness.records.table import NOT_SIMULATED, Results

Rows = dict[str, tuple[Cell, Simulated]]
"""By method and pattern: its cell and what was read."""


def _name(cell: Cell) -> str:
    """Method, and what its attention leaves out."""
    pattern = load_core(cell.train.attention).pattern
    return (
        cell.train.method.name if pattern is None else f"{cell.train.method.name}, {pattern.name}"
    )


def _by_gpus(results: Results) -> dict[int, Rows]:
    """By number of GPUs: the cells that searched for the longest sequence."""
    found: dict[int, Rows] = {}
    for cell, s in simulated(results):
        if s.search and s.prediction:
            found.setdefault(cell.train.world_size, {})[_name(cell)] = cell, s
    return dict(sorted(found.items()))


def _length(cell: Cell, s: Simulated) -> tuple[float, str]:
    """The longest sequence, and in words: what stops a longer one, and how many ranks share it."""
    assert s.search is not None
    options = cell.train.method.options
    degrees = [f"{axis} {options[axis]}" for axis in AXES if options.get(axis, 1) > 1]
    tokens, limit = s.search.longest_tokens, LIMITS[s.search.limit]
    return max(tokens, 1), ", ".join([length_text(tokens), limit, *degrees])


def _cost(_: Cell, s: Simulated) -> tuple[float, str]:
    """Bytes of one more token of a rank."""
    assert s.prediction is not None
    # Where a token costs nothing, rounding of two lengths may even give less than that.
    slope = max(s.prediction.bytes_per_local_token or 0, 0)
    return max(slope, 1), bytes_text(slope)


def _any_fits(_: Cell, s: Simulated) -> bool:
    """Whether any length fits."""
    return s.search is not None and s.search.longest_tokens > 0


def _fits(_: Cell, s: Simulated) -> bool:
    """Whether the step fits whose bytes are counted."""
    return s.fits


class Panel(NamedTuple):
    """What a column shows."""

    reading: Callable[[Cell, Simulated], tuple[float, str]]
    """A number, and the words beside it."""
    fits: Callable[[Cell, Simulated], bool]
    text: Callable[[float], str]
    """Words of the axis."""
    base: int
    """Of the logarithm."""
    label: str


PANELS = (
    Panel(_length, _any_fits, length_text, 10, "longest sequence [tokens]"),
    Panel(_cost, _fits, bytes_text, 2, "allocated at the peak, per token of a rank"),
)


def draw(results: Results) -> Figure:
    """A row of panels per number of GPUs, a column for lengths and one for bytes per token."""
    by_gpus = _by_gpus(results)
    order = list(dict.fromkeys(map(_name, results.cells.values())))
    colours = drawing.palette(order)
    heights = [0.26 * len(rows) + 0.4 for rows in by_gpus.values()] or [1.2]
    figure = Figure(figsize=(10, 1.4 + sum(heights)), layout="constrained")
    grid = figure.subplots(
        len(heights),
        2,
        sharex="col",
        sharey="row",
        squeeze=False,
        width_ratios=(2, 1),
        height_ratios=heights,
    )
    if not by_gpus:
        drawing.say(grid[0][0], NOT_SIMULATED)
    for (gpus, rows), pair in zip(by_gpus.items(), grid, strict=False):
        methods = [method for method in order if method in rows]
        for axes, panel in zip(pair, PANELS, strict=True):
            _draw_rows(axes, rows, methods, colours, panel)
        pair[0].set_title(f"{gpus} GPU{'s' if gpus > 1 else ''}", loc="left")
        pair[0].set_yticks(range(len(methods)), methods)
        pair[0].set_ylim(len(methods) - 0.5, -0.5)
    for axes, panel in zip(grid[-1], PANELS, strict=True):
        _finish_axis(axes, panel)
    models = sorted({cell.train.model for rows in by_gpus.values() for cell, _ in rows.values()})
    title = ": ".join(["Longest sequence by method", *models])
    handles = [drawing.handle("predicted", drawing.INK, "predicted")]
    return drawing.frame(figure, results, title, handles, NOTE)


def _draw_rows(
    axes: Axes, rows: Rows, methods: Sequence[str], colours: dict[str, str], panel: Panel
) -> None:
    for place, method in enumerate(methods):
        value, words = panel.reading(*rows[method])
        fits = panel.fits(*rows[method])
        drawing.point(axes, value, place, colours[method], "predicted", fits=fits)
        drawing.words(axes, value, place, words, drawing.INK)


def _finish_axis(axes: Axes, panel: Panel) -> None:
    """Logarithmic, in the words of the panel."""
    axes.set_xscale("log", base=panel.base)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: panel.text(value)))
    axes.set_xlabel(panel.label)


NOTE = (
    "Beside each length: what stops a longer one, and how many ranks share a sample by ring (cp) and by heads "
    "(sp). Methods without either have a sample on each GPU; on one GPU ring and usp are alst. Cost: bytes that "
    "two per cent more tokens add, per token. On a phantom device: PyTorch's own CUDA build and allocator."
)
