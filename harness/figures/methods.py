"""All methods side by side: the longest sequence and what a token costs, by number of GPUs."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from alst_impl.methods.base import AXES
from harness import drawing
from harness.cell import Cell
from harness.figures.base import simulated
from harness.plain import bytes_text, tokens_text
from harness.prediction import Simulated
from harness.table import NOT_MEASURED, Results

LIMITS = {
    "gpu_memory": "GPU memory",
    "host_memory": "host memory",
    "index_range": "32-bit index",
    "heads": "number of heads",
    "none": "nothing",
}
"""What stops a method, in the words of the figure."""

Row = tuple[Cell, Simulated]


def _rows(results: Results) -> dict[int, dict[str, Row]]:
    """By number of GPUs and method, those cells that looked for the longest sequence."""
    found: dict[int, dict[str, Row]] = {}
    for cell, s in simulated(results):
        if s.search and s.prediction:
            found.setdefault(cell.train.world_size, {})[cell.train.method.name] = cell, s
    return dict(sorted(found.items()))


def _degrees(cell: Cell) -> str:
    """The axes that share a sample, such as `cp 4, sp 8`."""
    options = cell.train.method.options
    return ", ".join(f"{axis} {options[axis]}" for axis in AXES if options.get(axis, 1) > 1)


def _draw(
    axes: Axes, rows: dict[str, Row], methods: list[str], colours: dict[str, str], *, cost: bool
) -> None:
    """A point per method: its longest sequence and limit, or bytes of one more token of a rank."""
    for place, method in enumerate(methods):
        if method not in rows:
            continue
        cell, s = rows[method]
        assert s.search is not None
        assert s.prediction is not None
        if cost:
            value = s.prediction.bytes_per_local_token or 0
            text = bytes_text(value)
        else:
            value = s.search.longest_tokens
            text = ", ".join(
                filter(None, [tokens_text(value), LIMITS[s.search.limit], _degrees(cell)])
            )
        drawing.point(axes, value, place, colours[method], "predicted", text)
    axes.set_yticks(range(len(methods)), methods)
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda v, _: bytes_text(v) if cost else tokens_text(v))
    )


def draw(results: Results) -> Figure:
    """A row of panels per number of GPUs: the longest sequence with its limit, and bytes per token."""
    by_gpus = _rows(results)
    methods = list(dict.fromkeys(m for rows in by_gpus.values() for m in rows))
    methods.sort(
        key=lambda m: max(
            s.search.longest_tokens
            for r in by_gpus.values()
            if m in r
            for _, s in [r[m]]
            if s.search
        )
    )
    colours = drawing.palette(methods)
    height = 0.9 + (0.3 * max(len(methods), 3) + 0.5) * max(len(by_gpus), 1)
    figure = Figure(figsize=(10.4, height), layout="constrained")
    grid = figure.subplots(
        max(len(by_gpus), 1), 2, sharex="col", sharey=True, squeeze=False, width_ratios=(2, 1)
    )
    if not by_gpus:
        drawing.say(grid[0][0], NOT_MEASURED)
    for (gpus, rows), pair in zip(by_gpus.items(), grid, strict=False):
        for axes, cost in zip(pair, (False, True), strict=True):
            _draw(axes, rows, methods, colours, cost=cost)
        pair[0].set_title(f"{gpus} GPU{'s' if gpus > 1 else ''}", loc="left")
    for axes, label in zip(
        grid[-1],
        ("longest sequence [tokens]", "allocated at the peak, per token of a rank"),
        strict=True,
    ):
        low, high = axes.get_xlim()
        axes.set_xlim(low / 1.5, high * (30 if axes is grid[-1][0] else 3))  # room for the words
        axes.set_xlabel(label)
    models = sorted({cell.train.model for rows in by_gpus.values() for cell, _ in rows.values()})
    title = (
        f"Longest sequence by method: {', '.join(models)}"
        if models
        else "Longest sequence by method"
    )
    return drawing.frame(
        figure, results, title, [drawing.handle("predicted", drawing.INK, "predicted")], NOTE
    )


NOTE = (
    "Beside each length: what stops a longer one, and how many ranks share a sample by ring (cp) and by heads "
    "(sp). Methods without either have a sample on each GPU. The cost is the slope over the next two per cent of "
    "length, FlashAttention-2's scratch included."
)
