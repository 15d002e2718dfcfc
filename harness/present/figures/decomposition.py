"""Lengths over a decomposed run, and what a step of each length takes: published, predicted and measured."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from alst_impl.methods.base import step_samples
from alst_impl.sources.base import load_source
from alst_impl.sources.decomposition import drawn
from harness.cells.units import length_text, ratio_text
from harness.judge.claims import evidence
from harness.judge.decomposition import CURRICULUM, planned
from harness.present import drawing
from harness.records.record import Measurement, Outcome
from harness.records.table import NOT_MEASURED, NOT_SIMULATED, Results

NEIGHBOURS = 50
"""Steps before and after one over which its length is averaged."""
MARKED = 5
"""A mark for every so many steps."""

TITLES = {
    "speed": "Tokens per second of a rank",
    "cost": "Time of the run, at one length alone = 1",
    "bytes": "GiB allocated at the peak of a GPU",
}
"""Panels by length. All steps have equally many tokens."""


class Line(NamedTuple):
    """Steps of a method, or what was published of them, by their length."""

    series: str
    kind: drawing.Kind
    speeds: dict[int, float]
    """Tokens of a sequence -> tokens per second of a rank."""
    mean: float | None
    """Tokens per second of a rank over a run of all lengths; None if a length is missing."""

    def costs(self) -> dict[int, float]:
        """Tokens of a sequence -> time of the run over one at this length alone."""
        return {n: speed / self.mean for n, speed in self.speeds.items()} if self.mean else {}


def draw(results: Results) -> Figure:
    """Above, the published example's lengths over a cycle. Below: speed, what the run costs, and bytes, by length."""
    figure = Figure(figsize=(11, 7.4), layout="constrained")
    layout: list[Any] = [["run"] * 3, ["speed", "cost", "bytes"]]
    axes = figure.subplot_mosaic(layout, height_ratios=[1, 1.5])
    _draw_run(axes["run"])
    lines = [*_forecasts(results), *_measured(results)]
    colours = drawing.palette(line.series for line in lines)
    lengths = {n for line in lines for n in line.speeds} or {*planned().steps}
    _draw_lines(axes["speed"], lines, [line.speeds for line in lines], colours)
    axes["speed"].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    _draw_lines(axes["cost"], lines, [line.costs() for line in lines], colours)
    axes["cost"].axhline(1, color=drawing.FAINT, linewidth=1)
    axes["cost"].yaxis.set_major_formatter(FuncFormatter(lambda value, _: ratio_text(value)))
    _draw_bytes(axes["bytes"], results, colours)
    for name, title in TITLES.items():
        drawing.length_axis(axes[name], lengths)
        axes[name].set_title(title, loc="left")
        axes[name].set_xlabel("tokens of a sequence")
        axes[name].set_ylim(0, 1.1 * axes[name].get_ylim()[1])
    handles = [
        drawing.handle(f"{line.kind}, {line.series}", _ink(line, colours), line.kind)
        for line in lines
    ]
    title = "Sequences as long as their documents: short ones first, and what they save"
    return drawing.frame(figure, results, title, handles, NOTE)


def _draw_run(axes: Axes) -> None:
    """Marks of steps, and the mean length around each step."""
    plan = planned()
    lengths = [*plan.steps]
    run = [lengths[bucket] for bucket in drawn(tuple(plan.steps.values()), CURRICULUM, 0, 0)]
    steps = range(len(run))
    look: dict[str, Any] = {"markersize": 6, "markeredgewidth": 0.8}
    axes.plot(steps[::MARKED], run[::MARKED], "|", color=drawing.FAINT, **look)
    around = [fmean(run[max(at - NEIGHBOURS, 0) : at + NEIGHBOURS + 1]) for at in steps]
    axes.plot(steps, around, color=drawing.INK, linewidth=1.4)
    axes.set_yscale("log", base=2)
    axes.set_yticks(lengths, [length_text(n) for n in lengths])
    axes.set_xlim(0, len(run))
    axes.set_xlabel("step of the first cycle of the authors' example, drawn here")
    axes.set_ylabel("tokens of a sequence")
    axes.set_title(
        f"A mark for every {MARKED}th step; the line is the mean of {2 * NEIGHBOURS} around a step",
        loc="left",
    )


def _forecasts(results: Results) -> list[Line]:
    """Predictions by method, each after what was published of it."""
    plan, found = planned(), dict[tuple[str, drawing.Kind], dict[int, float]]()
    for e in evidence([results]):
        cell = results.cells[e.key]
        if e.quantity == "tokens_per_second":
            both: list[tuple[drawing.Kind, float | None]] = [
                ("published", e.published),
                ("predicted", e.predicted),
            ]
            for kind, speed in both:
                of_kind = found.setdefault((cell.train.method.name, kind), {})
                if speed is not None:
                    of_kind[cell.train.seqlen] = speed / cell.train.world_size
    lines = []
    for (method, kind), speeds in found.items():
        seconds = plan.mean({length: 1 / speed for length, speed in speeds.items()})
        lines.append(Line(method, kind, speeds, 1 / seconds if seconds else None))
    return lines


def _measured(results: Results) -> list[Line]:
    """Decomposed runs, and those in full length beside them."""
    decomposed, whole = dict[str, Line](), dict[str, Line]()
    for key, cell in results.cells.items():
        method, steps = cell.train.method.name, _steps(results.measurements.get(key))
        if not steps:
            continue
        tokens = step_samples(cell.train) * cell.train.seqlen / cell.train.world_size
        of_length: dict[int, list[float]] = {}
        for length, seconds in sorted(steps):
            of_length.setdefault(length, []).append(seconds)
        speeds = {length: tokens / median(own) for length, own in of_length.items()}
        if len(load_source(cell.train.data.source).seqlens(cell.train.seqlen)) > 1:
            mean = tokens / fmean(seconds for _, seconds in steps)
            decomposed[method] = Line(method, "measured", speeds, mean)
        else:
            whole[method] = Line(f"{method} in full length", "measured", speeds, None)
    beside = [
        line._replace(mean=decomposed[method].mean)
        for method, line in whole.items()
        if method in decomposed
    ]
    return [*decomposed.values(), *beside]


def _steps(m: Measurement | None) -> list[tuple[int, float]]:
    """Tokens of a sequence and seconds of each timed step of the slowest rank; old records do not say the former."""
    if m is None or m.readings is None or m.outcome is not Outcome.OK or not m.cell.timed:
        return []
    if not m.readings.seqlens:
        return []
    return list(zip(m.readings.seqlens, map(max, m.readings.step_s), strict=True))


def _ink(line: Line, colours: dict[str, str]) -> str:
    return drawing.INK if line.kind == "published" else colours[line.series]


def _draw_lines(
    axes: Axes,
    lines: Sequence[Line],
    values: Sequence[dict[int, float]],
    colours: dict[str, str],
) -> None:
    if not any(values):
        drawing.say(axes, NOT_MEASURED)
    for line, of_length in zip(lines, values, strict=True):
        look = drawing.mark(line.kind, _ink(line, colours))
        axes.plot([*of_length], [*of_length.values()], zorder=3, **look)


def _draw_bytes(axes: Axes, results: Results, colours: dict[str, str]) -> None:
    """Allocated bytes of forecasts."""
    shown = False
    for key, cell in results.cells.items():
        m = results.measurements.get(key)
        if not cell.traits.phantom or m is None or m.simulated is None:
            continue
        colour, shown = colours.get(cell.train.method.name, drawing.INK), True
        gib = m.simulated.peak_bytes / 2**30
        drawing.point(axes, cell.train.seqlen, gib, colour, "predicted")
    if not shown:
        drawing.say(axes, NOT_SIMULATED)


NOTE = (
    "All steps have equally many tokens. Published: read off the figures of the authors' repository, 1B on 8 H100. Predicted: bytes on "
    "a phantom device, time modelled. The run takes each length as often as the authors' plan, or as the measured run, did. "
    "Measured: median step of each length, of the slowest rank."
)
