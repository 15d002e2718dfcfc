"""The schedule of a pipeline with and without slices; its bytes and speed, published and predicted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from alst_impl.ops.pipeline.schedule import bubble, makespan
from harness.cells.cell import Cell
from harness.cells.units import length_text, percent_text
from harness.formulas import pipelines
from harness.judge.claims import Evidence, evidence
from harness.present import drawing
from harness.records.table import NOT_SIMULATED, Results

FORWARD = ("#cfe0f3", "#a9c8e8", "#82afdb", "#5b94cc")
BACKWARD = ("#f6d7c3", "#efbb98", "#e79f6f", "#dd8146")
"""By slice."""
NOTE = (
    "Schedules: 7B at 32K as in the throughput table, durations are modelled, white is waiting. "
    "Degrees of parallelism are published for 30B and inferred for the others. Beside a prediction: its error. "
    "fitted: a constant was fitted on the published number, so it is no evidence."
)
SCHEDULES = ("1F1B", "Seq1F1B")


def draw(results: Results) -> Figure:
    """Both schedules in time above; below, peak bytes by model and length, and throughput."""
    figure = Figure(figsize=(14, 8.6), layout="constrained")
    layout: list[Any] = [["1F1B"] * 5, ["Seq1F1B"] * 5, ["bytes"] * 3 + ["speed"] * 2]
    axes = figure.subplot_mosaic(layout, height_ratios=[1, 1, 2.6])
    found = [e for e in evidence([results]) if _slices(results.cells[e.key]) is not None]
    colours = drawing.palette(SCHEDULES)
    _draw_schedules(axes, results, found)
    _draw_numbers(
        axes["bytes"], results, [e for e in found if e.quantity == "device_bytes"], colours, _size
    )
    axes["bytes"].set_ylabel("peak memory of a GPU [GiB]")
    _draw_numbers(
        axes["speed"],
        results,
        [e for e in found if e.quantity == "tokens_per_second"],
        colours,
        _length,
    )
    axes["speed"].set_ylabel("tokens/s of all GPUs, 7B")
    axes["speed"].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    handles = [
        drawing.handle("published", drawing.INK, "published"),
        *(drawing.handle(f"predicted, {name}", colours[name], "predicted") for name in SCHEDULES),
    ]
    title = "Slices in a pipeline: less waiting, fewer live activations"
    return drawing.frame(figure, results, title, handles, NOTE)


def _slices(cell: Cell) -> int | None:
    """The slices of a cell whose schedule is played; None for any other cell."""
    if cell.traits.executes:
        return None
    return int(cell.train.method.options.get("slices", 4))


def _schedule(cell: Cell) -> str:
    return SCHEDULES[0] if _slices(cell) == 1 else SCHEDULES[1]


def _draw_schedules(axes: dict[str, Axes], results: Results, found: list[Evidence]) -> None:
    """The first cell of each schedule that stands for a published throughput, on one scale of time."""
    latest = 0.0
    for name in SCHEDULES:
        cells = [results.cells[e.key] for e in found if e.quantity == "tokens_per_second"]
        chosen = next((cell for cell in cells if _schedule(cell) == name), None)
        if chosen is None:
            drawing.say(axes[name], NOT_SIMULATED)
            continue
        latest = max(latest, _draw_schedule(axes[name], name, chosen))
    for name in SCHEDULES:
        axes[name].set_xlim(0, latest or 1.0)
        axes[name].grid(visible=False)


def _draw_schedule(axes: Axes, name: str, cell: Cell) -> float:
    """A row of units for each stage; returns the end of the last unit."""
    assert cell.simulation is not None
    s = pipelines.staged(cell.train, cell.simulation.tp, cell.hardware)
    played = pipelines.played(s)
    for stage, spans in enumerate(played):
        for unit, start, stop in spans:
            shade = (BACKWARD if unit.backward else FORWARD)[unit.part % len(FORWARD)]
            box: Any = {"facecolor": shade, "edgecolor": "white", "linewidth": 0.4}
            axes.broken_barh([(start, stop - start)], (stage - 0.46, 0.92), **box)
    axes.set_yticks(range(s.pp), [f"stage {stage}" for stage in range(s.pp)])
    axes.set_ylim(s.pp - 0.4, -0.6)
    axes.set_xlabel("seconds of a step (blue: forward, orange: backward; darker: later slices)")
    waits = f"{100 * bubble(played):.0f} % of the time waited"
    axes.set_title(f"{name}, {s.micro_batches} micro-batches: {waits}", loc="left")
    return makespan(played)


def _size(cell: Cell) -> str:
    hidden = cell.train.overrides.get("hidden_size", 2560)
    return f"{SIZES[hidden]}\n{length_text(cell.train.seqlen)}"


SIZES = {2560: "2.7B", 4096: "7B", 5120: "13B", 6144: "30B"}
"""Names of the published models by hidden size."""


def _length(cell: Cell) -> str:
    return f"{length_text(cell.train.seqlen)}\nx {cell.train.accumulation}"


def _draw_numbers(
    axes: Axes,
    results: Results,
    found: list[Evidence],
    colours: dict[str, str],
    place: Callable[[Cell], str],
) -> None:
    """Published and predicted numbers, a column for each `place`, both schedules side by side."""
    places = list(dict.fromkeys(place(results.cells[e.key]) for e in found))
    if not found:
        drawing.say(axes, NOT_SIMULATED)
    for e in found:
        cell = results.cells[e.key]
        name = _schedule(cell)
        side = 2 * SCHEDULES.index(name) - 1  # 1F1B on the left
        x = places.index(place(cell)) + 0.12 * side
        drawing.point(axes, x, e.published, drawing.INK, "published")
        if e.predicted is not None and e.error is not None:
            text = "fitted" if e.used_for_fit else percent_text(e.error)
            at, ink = (axes, x, e.predicted), drawing.INK
            axes.vlines(x, e.predicted, e.published, color=colours[name], linewidth=1)
            drawing.point(
                *at, colours[name], "predicted", text, side, ink=ink, fits=not e.infeasible
            )
    axes.set_xticks(range(len(places)), places)
    axes.set_xlim(-0.8, max(len(places), 1) - 0.2)
    numbers = [y for e in found for y in (e.published, e.predicted) if y is not None]
    axes.set_ylim(0, 1.08 * max(numbers, default=1.0))
    axes.grid(visible=False, axis="x")
