"""Loss and gradient norm with and without sequence parallelism on the same data, and their differences."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from itertools import chain, cycle, repeat
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from harness.cells.cell import Cell
from harness.cells.units import length_text
from harness.present import drawing
from harness.present.figures.base import methods_of
from harness.records.record import Measurement
from harness.records.table import Results, tidy, wide

DIFFERENCE = "difference\nto unsharded"
LABELS = ("loss [nats/token]", DIFFERENCE, "gradient norm", DIFFERENCE, "1 - cosine\nof gradients")
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
    whole = group[(group["sp"] == 1) & (group["method"] == "baseline")]
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


def _draw_cosines(axes: Axes, pairing: Pairing, colours: dict[str, str]) -> None:
    """1 - cosine between the whole gradient of a run and that of the stock model with the weights of the run."""
    runs = {"baseline": [pairing.whole], **pairing.sharded}
    for name, measurements in runs.items():
        for run in measurements:
            cosines = run.readings.cosine if run.readings else []
            # A gap of zero has no place on a logarithmic axis: it stands at the resolution of fp64.
            gaps = [max(1 - cosine, RESOLUTION) for cosine in cosines]
            axes.plot(range(1, len(gaps) + 1), gaps, color=colours[name], linewidth=1)
    axes.set_yscale("log")
    if not any(run.readings and run.readings.cosine for m in runs.values() for run in m):
        drawing.say(axes, "not compared")


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
    upper.plot(steps, truth, color=colours["baseline"], linewidth=8, alpha=0.3)
    # Lines that coincide stay visible: each next one is thinner.
    for (name, runs), width in zip(
        pairing.sharded.items(), chain((3.2, 1.4, 0.8), repeat(0.5)), strict=False
    ):
        for run, style in zip(runs, cycle(("-", "--", ":", "-.")), strict=False):
            values = read(run)[: len(truth)]
            common = steps[: len(values)]
            gap = [ours - theirs for ours, theirs in zip(values, truth, strict=False)]
            look: dict[str, Any] = {"color": colours[name], "linestyle": style, "linewidth": width}
            upper.plot(common, values, **look)
            lower.plot(common, gap, **look)
    lower.axhline(0, color=drawing.FAINT, linewidth=0.8)
    lower.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw(results: Results) -> Figure:
    """A column per model: losses and gradient norms of all runs on the same data, and their differences."""
    pairs = list(pairings(results))
    cells = wide(tidy(results))
    cells["series"] = [_name(row) for _, row in cells.iterrows()]
    colours = drawing.palette(["baseline", *cells["series"]])
    columns = max(len(pairs), 1)
    figure = Figure(figsize=(max(3.3 * columns + 0.8, 5.6), 10.2), layout="constrained")
    ratios = [2, 1.2, 2, 1.2, 1.4]
    grid = figure.subplots(5, columns, sharex="col", squeeze=False, height_ratios=ratios)
    if not pairs:
        drawing.say(grid[0][0], "no length was run both ways")
    for (model, pairing), *axes in zip(pairs, *grid, strict=False):
        _draw_pair(axes[0], axes[1], pairing, _losses, colours)
        _draw_pair(axes[2], axes[3], pairing, _norms, colours)
        axes[0].set_title(f"{model}, {length_text(pairing.whole.cell.train.seqlen)} tokens")
        _draw_cosines(axes[4], pairing, colours)
        axes[4].set_xlabel("step")
    for row, label in enumerate(LABELS):
        grid[row][0].set_ylabel(label)
    note = (
        "Wide grey line: stock model, unsharded. Differences: each run less that line. Last row: the whole gradient of a "
        "run against that of the stock model in fp64, with the weights of the run at that step and the same samples."
    )
    title = "Loss with and without sequence parallelism"
    cells = cells.assign(gate="passed")  # the losses are the comparison here
    return drawing.finish(figure, results, title, colours, cells, note)
