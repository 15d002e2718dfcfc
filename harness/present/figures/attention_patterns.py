"""Which keys each query sees under the attention of each cell, and what a step takes."""

from __future__ import annotations

from textwrap import wrap

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter
from numpy.typing import NDArray

from alst_impl.layout import Layout
from alst_impl.ops.attention.cores.base import Core, load_core
from harness.cells.units import length_text, seconds_text
from harness.judge.claims import OURS
from harness.present import drawing
from harness.records.metrics import value_of
from harness.records.record import Measurement
from harness.records.table import NOT_MEASURED, Results, gates, series

TILES = 128
"""Tiles of a panel in each direction."""
QUERIES = 4_096
"""Most queries that are looked at, evenly spread over the sequence."""


def draw(results: Results) -> Figure:
    """A panel per attention at its longest length: the share of each tile's pairs that are seen, of one document."""
    cells = sorted(results.cells.items(), key=lambda pair: pair[1].train.seqlen)
    shown = list({str(cell.train.attention): key for key, cell in cells}.values())
    compared = gates(results, series(results.cells))
    panels = drawing.panels(shown or [""], width=3.2, height=3.2)
    colour = drawing.palette([OURS])[OURS]
    colours = LinearSegmentedColormap.from_list("seen", ["#ffffff", colour])
    for key, axes in panels.axes.items():
        if not shown:
            drawing.say(axes, NOT_MEASURED)
            continue
        train, m = results.cells[key].train, results.measurements.get(key)
        seqlen, core = train.seqlen, load_core(train.attention)
        axes.imshow(
            tiles(core, seqlen) ** 0.5,  # one key in four of a dilated window is seen, too
            extent=(0, seqlen, seqlen, 0),
            cmap=colours,
            vmin=0,
            vmax=1,
            interpolation="nearest",
        )
        axes.grid(visible=False)
        axes.set_title(_title(core), loc="left", fontsize=8.5)
        axes.set_xlabel(
            f"{_share(core, seqlen):.1%} of the pairs, {_time(m, compared[key])}", fontsize=8.5
        )
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: length_text(int(value))))
            axis.set_major_locator(FixedLocator([0, seqlen // 2, seqlen]))
    panels.figure.supylabel("queries; keys to the right", fontsize=9)
    return drawing.frame(panels.figure, results, "Keys that a query sees", [], NOTE)


NOTE = (
    "Darker: more of a tile's pairs are seen. Pairs: (query, key), of those of full causal attention. Time of a step: "
    "median, measured; full attention runs in PyTorch's fused kernel, patterns in tiles of plain PyTorch on a CPU."
)


def tiles(core: Core, seqlen: int) -> NDArray[np.float64]:
    """The share of the pairs of each tile that are seen, [queries, keys]; a tile has at least one token."""
    count = min(TILES, seqlen)
    edges = np.linspace(0, seqlen, count + 1)
    seen, looked = np.zeros((count, count)), np.zeros(count)
    for query in range(0, seqlen, -(-seqlen // QUERIES)):
        row = min(int(query * count / seqlen), count - 1)
        runs = [(0, query + 1)] if core.pattern is None else core.pattern.runs(query, query + 1)
        ends = np.array(runs, dtype=float)
        # How much of each run lies before each edge; the rest is a difference.
        before = np.clip(edges, ends[:, :1], ends[:, 1:]).sum(0)
        seen[row] += np.diff(before)
        looked[row] += 1
    return seen / np.maximum(looked, 1)[:, None] / np.diff(edges)


def _share(core: Core, seqlen: int) -> float:
    return core.visible_pairs(Layout(seqlen)) / (seqlen * (seqlen + 1) / 2)


def _title(core: Core) -> str:
    if core.pattern is None:
        return "all keys before it"
    options = ", ".join(f"{key}={value}" for key, value in core.pattern.model_dump().items())
    return "\n".join([core.pattern.name, *wrap(options, 42)])


def _time(m: Measurement | None, gate: str) -> str:
    """Time of a step whose gradients were right, at its length or another."""
    seconds = None if m is None else value_of("step_s", m)
    if seconds is None:
        return NOT_MEASURED
    return f"{seconds_text(seconds)} a step" if gate.startswith("passed") else f"gradients {gate}"
