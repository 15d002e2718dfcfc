"""Loss and gradient norm with and without sequence parallelism on the same data, and their differences."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, cycle, repeat
from typing import NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from harness.cells.cell import Cell
from harness.cells.units import length_text
from harness.present import drawing
from harness.present.drawing import STOCK
from harness.present.figures.base import methods_of
from harness.records.record import Measurement
from harness.records.table import Results, tidy, wide

DIFFERENCE = "difference\nto unsharded"
ROWS = (
    ("loss [nats/token]", 2),
    (DIFFERENCE, 1.2),
    ("gradient norm", 2),
    (DIFFERENCE, 1.2),
    ("1 - cosine\nof gradients", 1.4),
)
"""Label and height of each row of panels. The last is there where gradients were compared."""
RESOLUTION = 2.0**-52


class Pairing(NamedTuple):
    """One unsharded run and the sharded runs that saw the same tokens from the same weights."""

    whole: Measurement
    sharded: dict[str, list[Measurement]]
    """By series."""


def same_training(cell: Cell, dp: int) -> str:
    """Equal for cells whose losses must be equal: same model, samples of a step and update."""
    t = cell.train
    how = {"method", "engine", "world_size", "batch_size", "attention", "checkpoint"}
    what = t.model_dump(mode="json", exclude=how)
    text = json.dumps({**what, "samples": dp * t.batch_size}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def pairings(results: Results) -> Iterator[tuple[str, Pairing]]:
    """For each model, the longest length that was run both ways."""
    cells = wide(tidy(results))
    cells["training"] = [
        same_training(results.cells[key], dp)
        for key, dp in zip(cells["key"], cells["dp"], strict=True)
    ]
    cells = cells[cells["loss"].notna()].sort_values("seqlen", ascending=False)
    for model in dict.fromkeys(results.cells[k].train.model for k in results.cells):
        for _, group in cells[cells["model"] == model].groupby("training", sort=False):
            pairing = _pair(results, group)
            if pairing:
                yield str(model), pairing
                break


def _pair(results: Results, group: pd.DataFrame) -> Pairing | None:
    whole = group[(group["sp"] == 1) & (group["method"] == STOCK)]
    order = methods_of(results.cells.values())
    sharded = group[group["sp"] > 1].sort_values(
        ["method", "sp"],
        key=lambda column: column.map(order.index) if column.name == "method" else column,
    )
    if whole.empty or sharded.empty:
        return None
    by_series: dict[str, list[Measurement]] = {}
    for _, row in sharded.iterrows():
        by_series.setdefault(_name(row), []).append(results.measurements[row["key"]])
    return Pairing(results.measurements[whole.iloc[0]["key"]], by_series)


def _name(row: pd.Series) -> str:
    """Method and degree: the runs of this figure differ in nothing else but the batch size, so that their samples agree."""
    return f"{row['method']} sp={row['sp']}" if row["sp"] > 1 else str(row["method"])


def _has_cosines(pairing: Pairing) -> bool:
    runs = chain([pairing.whole], *pairing.sharded.values())
    return any(run.readings and run.readings.cosine for run in runs)


def _draw_cosines(axes: Axes, pairing: Pairing, colours: dict[str, str]) -> None:
    """1 - cosine between the whole gradient of a run and that of the stock model with the weights of the run."""
    runs = {STOCK: [pairing.whole], **pairing.sharded}
    for name, measurements in runs.items():
        for run in measurements:
            cosines = run.readings.cosine if run.readings else []
            # A gap of zero has no place on a logarithmic axis: it stands at the resolution of fp64.
            gaps = [max(1 - cosine, RESOLUTION) for cosine in cosines]
            look = drawing.mark("measured", colours[name]) | {"linewidth": 1, "markersize": 4.5}
            axes.plot(range(1, len(gaps) + 1), gaps, markevery=_every(gaps), **look)
    axes.set_yscale("log")


def _every(values: Sequence[float]) -> int:
    """A mark at one of so many steps, so that marks stay apart."""
    return max(len(values) // 12, 1)


def _losses(m: Measurement) -> list[float]:
    return m.readings.loss if m.readings else []


def _norms(m: Measurement) -> list[float]:
    return m.readings.grad_norm if m.readings else []


def _draw_pair(
    upper: Axes,
    lower: Axes,
    pairing: Pairing,
    read: Callable[[Measurement], list[float]],
    colours: dict[str, str],
) -> None:
    """`upper`: what `read` gives of every run, by step. `lower`: the same less the unsharded run."""
    truth = read(pairing.whole)
    steps = range(1, len(truth) + 1)
    upper.plot(steps, truth, color=colours[STOCK], linewidth=8, alpha=0.3)
    # Lines that coincide stay visible: each next one is thinner.
    for (name, runs), width in zip(
        pairing.sharded.items(), chain((3.2, 1.4, 0.8), repeat(0.5)), strict=False
    ):
        for run, style in zip(runs, cycle(("-", "--", ":", "-.")), strict=False):
            values = read(run)[: len(truth)]
            common = steps[: len(values)]
            gap = [ours - theirs for ours, theirs in zip(values, truth, strict=False)]
            look = drawing.mark("measured", colours[name])
            look |= {"linestyle": style, "linewidth": width, "markersize": 4.5}
            upper.plot(common, values, markevery=_every(values), **look)
            lower.plot(common, gap, markevery=_every(gap), **look)
    lower.axhline(0, color=drawing.FAINT, linewidth=0.8)
    lower.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw(results: Results) -> Figure:
    """A column per model: losses and gradient norms of all runs on the same data, and their differences."""
    pairs = list(pairings(results))
    colours = drawing.palette(
        [STOCK, *chain.from_iterable(pairing.sharded for _, pairing in pairs)]
    )
    compared = any(_has_cosines(pairing) for _, pairing in pairs)
    rows = ROWS if compared else ROWS[:-1]
    columns = max(len(pairs), 1)
    heights = [height for _, height in rows]
    figure = Figure(
        figsize=(max(3.3 * columns + 0.8, 6.4), 1.28 * sum(heights)), layout="constrained"
    )
    grid = figure.subplots(len(rows), columns, sharex="col", squeeze=False, height_ratios=heights)
    if not pairs:
        drawing.say(grid[0][0], "no length was run both ways")
    for (model, pairing), *axes in zip(pairs, *grid, strict=False):
        _draw_pair(axes[0], axes[1], pairing, _losses, colours)
        _draw_pair(axes[2], axes[3], pairing, _norms, colours)
        axes[0].set_title(f"{model}, {length_text(pairing.whole.cell.train.seqlen)} tokens")
        if compared:
            _draw_cosines(axes[4], pairing, colours)
        axes[-1].set_xlabel("step")
    for row, (label, _) in enumerate(rows):
        grid[row][0].set_ylabel(label)
    wide = Line2D([], [], color=drawing.GREY, linewidth=8, alpha=0.3, label="stock, unsharded")
    handles = [drawing.handle(name, colours[name], "measured") for name in colours if name != STOCK]
    title = "Loss with and without sequence parallelism"
    return drawing.frame(figure, results, title, [wide, *handles], NOTE + compared * COSINES)


NOTE = "Wide grey line: stock model, unsharded. Differences: each run less that line."
COSINES = (
    " Last row: the whole gradient of a run against that of the stock model in fp64, with the weights of the run at "
    "that step and the same samples."
)
