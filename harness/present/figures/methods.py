"""All methods side by side: the longest sequence and what a token costs, by number of GPUs."""

from __future__ import annotations

from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from alst_impl.layout import AXES
from harness.cells.cell import Cell
from harness.cells.prediction import Simulated
from harness.cells.units import bytes_text, tokens_text
from harness.present import drawing
from harness.present.figures.base import simulated
from harness.records.table import NOT_SIMULATED, Results

LIMITS = {
    "gpu_memory": "GPU memory",
    "host_memory": "host memory",
    "index_range": "32-bit index",
    "heads": "number of heads",
    "none": "nothing",
}
"""What stops a method, in the words of the figure."""

Rows = dict[str, tuple[Cell, Simulated]]
"""By method: its cell and what was read."""


def _by_gpus(results: Results) -> dict[int, Rows]:
    """By number of GPUs: the cells that searched for the longest sequence."""
    found: dict[int, Rows] = {}
    for cell, s in simulated(results):
        if s.search and s.prediction:
            found.setdefault(cell.train.world_size, {})[cell.train.method.name] = cell, s
    return dict(sorted(found.items()))


def _length(cell: Cell, s: Simulated) -> tuple[float, str]:
    """The longest sequence, and in words: what stops a longer one, and how many ranks share it."""
    assert s.search is not None
    options = cell.train.method.options
    degrees = [f"{axis} {options[axis]}" for axis in AXES if options.get(axis, 1) > 1]
    tokens, limit = s.search.longest_tokens, LIMITS[s.search.limit]
    return max(tokens, 1), ", ".join([tokens_text(tokens), limit, *degrees])


def _cost(_: Cell, s: Simulated) -> tuple[float, str]:
    """Bytes of one more token of a rank."""
    assert s.prediction is not None
    slope = s.prediction.bytes_per_local_token or 1
    return slope, bytes_text(slope)


def _any_fits(_: Cell, s: Simulated) -> bool:
    """Whether any length fits."""
    return s.search is not None and s.search.longest_tokens > 0


def _fits(_: Cell, s: Simulated) -> bool:
    """Whether the step fits whose bytes are counted."""
    return s.fits


PANELS = (
    (_length, _any_fits, tokens_text, 10, "longest sequence [tokens]", 30),
    (_cost, _fits, bytes_text, 2, "allocated at the peak, per token of a rank", 6),
)
"""What a column shows, whether that fits, the words of its axis, its base and label, and its room for words, as a factor."""


def draw(results: Results) -> Figure:
    """A row of panels per number of GPUs, a column for lengths and one for bytes per token."""
    by_gpus = _by_gpus(results)
    methods = list(dict.fromkeys(c.train.method.name for c in results.cells.values()))
    methods = [m for m in methods if any(m in rows for rows in by_gpus.values())]
    colours = drawing.palette(methods)
    height = 1.2 + (0.26 * max(len(methods), 3) + 0.4) * max(len(by_gpus), 1)
    figure = Figure(figsize=(10, height), layout="constrained")
    grid = figure.subplots(
        max(len(by_gpus), 1), 2, sharex="col", sharey=True, squeeze=False, width_ratios=(2, 1)
    )
    if not by_gpus:
        drawing.say(grid[0][0], NOT_SIMULATED)
    for (gpus, rows), pair in zip(by_gpus.items(), grid, strict=False):
        for axes, (reading, fits, *_) in zip(pair, PANELS, strict=True):
            for place, method in enumerate(methods):
                if method in rows:
                    value, words = reading(*rows[method])
                    colour = colours[method]
                    drawing.point(
                        axes,
                        value,
                        place,
                        colour,
                        "predicted",
                        words,
                        ink=drawing.INK,
                        fits=fits(*rows[method]),
                    )
        pair[0].set_title(f"{gpus} GPU{'s' if gpus > 1 else ''}", loc="left")
    for axes, (*_, text, base, label, room) in zip(grid[-1], PANELS, strict=True):
        _finish_axis(axes, text, base, room if by_gpus else 1)
        axes.set_xlabel(label)
    grid[0][0].set_yticks(range(len(methods)), methods)
    grid[0][0].set_ylim(max(len(methods), 1) - 0.5, -0.5)
    models = sorted({cell.train.model for rows in by_gpus.values() for cell, _ in rows.values()})
    title = ": ".join(["Longest sequence by method", *models])
    handles = [drawing.handle("predicted", drawing.INK, "predicted")]
    return drawing.frame(figure, results, title, handles, NOTE)


def _finish_axis(axes: Axes, text: Callable[[float], str], base: int, room: int) -> None:
    """Logarithmic, with `room` for the words to the right of points."""
    axes.set_xscale("log", base=base)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    low, high = axes.get_xlim()
    axes.set_xlim(low / 1.5, high * room)


NOTE = (
    "Beside each length: what stops a longer one, and how many ranks share a sample by ring (cp) and by heads "
    "(sp). Methods without either have a sample on each GPU; on one GPU ring and usp are alst. Cost: bytes that "
    "two per cent more tokens add, per token. On a phantom device: PyTorch's own CUDA build and allocator."
)
