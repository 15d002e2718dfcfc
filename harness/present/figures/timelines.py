"""Live bytes over a step or a part of it: Figures 4 and 7, and section 3.1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from harness.cells.cell import Cell
from harness.cells.prediction import Simulated
from harness.cells.units import tokens_text
from harness.present import drawing
from harness.present.drawing import STOCK
from harness.present.figures.base import RELEASED_NOTE, Part, features, simulated
from harness.records.published import look_up
from harness.records.table import NOT_SIMULATED, Results


class Tiles(NamedTuple):
    """A part of a step that runs whole or in tiles."""

    part: Part
    feature: str
    """The feature of ALST that tiles this part."""
    published: Callable[[], dict[str, float]]
    """Words beside a star -> GiB."""
    legend: str
    """Of the published points."""
    title: str
    note: str


class Line(NamedTuple):
    """One timeline: its label, the method whose colour it has, and its readings."""

    label: str
    method: str
    readings: Simulated


def draw_tiles(tiles: Tiles, results: Results) -> Figure:
    """Bytes over events, whole and in tiles; stars at the published peaks."""
    cells = simulated(results, tiles.part)
    figure, axes, handles = _timelines([_tiled(tiles, cell, s) for cell, s in cells])
    for words, gib in tiles.published().items() if handles else ():
        drawing.point(axes, 1, gib, drawing.INK, "published", words, side=-1)
    handles.append(drawing.handle(tiles.legend, drawing.INK, "published"))
    return drawing.frame(figure, results, tiles.title, handles, tiles.note)


def _tiled(tiles: Tiles, cell: Cell, s: Simulated) -> Line:
    """A cell in the colour of its method; without the feature in that of the stock model."""
    method = cell.train.method.name
    if tiles.feature in features(cell):
        return Line(f"{tiles.feature}, {method}", method, s)
    return Line("whole", STOCK, s)


def draw_hill(results: Results) -> Figure:
    """Live bytes of one GPU over forward and backward, with and without offload."""
    found = [(cell.train, s) for cell, s in simulated(results) if s.timeline]
    figure, axes, handles = _timelines(
        [
            Line("checkpoints on the GPU", STOCK, s)
            if train.method.options.get("offload") is False
            else Line("checkpoints in host memory", train.method.name, s)
            for train, s in found
        ]
    )
    where = ""
    for train, s in found[:1]:
        where = f": {train.model}, {tokens_text(train.seqlen)} tokens on {train.world_size} GPUs"
        _mark_turn(axes, s)
    return drawing.frame(figure, results, f"Memory over one step{where}", handles, HILL_NOTE)


def _mark_turn(axes: Axes, s: Simulated) -> None:
    """A line where forward ends and backward begins."""
    assert s.timeline is not None
    phases = s.timeline.phases
    turn = phases.index("backward") / max(len(phases) - 1, 1)
    axes.axvline(turn, color=drawing.FAINT, linewidth=0.8, linestyle=":")
    at: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "va": "top", "fontsize": 8}
    axes.text(turn, 0.97, "forward ", ha="right", **at)
    axes.text(turn, 0.97, " backward", ha="left", **at)


def _timelines(lines: Sequence[Line]) -> tuple[Figure, Axes, list[Line2D]]:
    """Live bytes on the device over the course of a step, each stretched to the same width."""
    colours = drawing.palette(line.method for line in lines)
    figure = Figure(figsize=(8.2, 4.2), layout="constrained")
    axes, handles, peaks = figure.subplots(), [], [0.0]
    for label, method, s in lines:
        if s.timeline is None:
            continue
        colour = colours[method]
        held = [nbytes / 2**30 for nbytes in s.timeline.device_bytes]
        at = [i / max(len(held) - 1, 1) for i in range(len(held))]
        axes.fill_between(at, held, color=colour, alpha=0.12, linewidth=0)
        handles += axes.plot(at, held, color=colour, linewidth=1.5, label=label)
        peaks.append(max(held))
        if not s.fits:
            axes.plot(at[held.index(peaks[-1])], peaks[-1], **drawing.DOES_NOT_FIT)
    axes.set_ylabel("live tensors [GiB]")
    axes.set_xlabel("course of forward and backward [events]")
    axes.set_xticks([])
    axes.set_ylim(0, 1.15 * (max(peaks) or 1))
    if not handles:
        drawing.say(axes, NOT_SIMULATED)
    return figure, axes, handles


def _fact(name: str) -> float:
    return look_up("alst_memory_facts", {"fact": name}, "value").value


def _mlp_peaks() -> dict[str, float]:
    """Peaks above the floors of the published plots: the process of the paper holds other things, too."""
    fact = "tiled_mlp_forward_backward_{}_{}".format
    return {s: _fact(fact("peak", s)) - _fact(fact("low", s)) for s in ("untiled", "tiled")}


def _logits() -> dict[str, float]:
    return {"untiled": _fact("logits_fp32_one_copy_16k") * _fact("logits_copies_in_loss")}


NOTE = (
    "All lines are of phantom devices (PyTorch's own CUDA build and allocator) and include {}. Events are spread "
    "evenly: the width of a line says nothing of time. {} " + RELEASED_NOTE
)
HILL_NOTE = (
    "On a phantom device: PyTorch's own CUDA build and allocator. Events are spread evenly: the width of a stretch "
    "says nothing of time. The paper shows this figure as an image only and gives no number to compare with."
)
MLP = Tiles(
    part="mlp",
    feature="tiled MLP",
    published=_mlp_peaks,
    legend="published",
    title="One MLP: live tensors of forward and backward",
    note=NOTE.format("parameters and input", "Stars: published peak less the floor of its plot."),
)
LOSS = Tiles(
    part="loss",
    feature="tiled loss",
    published=_logits,
    legend="published: two fp32 copies of the logits",
    title="Logits and loss of 16,000 tokens, 128,256 words",
    note=NOTE.format(
        "the head's weight and its gradient",
        "The tiled loss of deepspeed_alst is Liger's fused one.",
    ),
)
FIGURES = {
    "mlp_tiles": partial(draw_tiles, MLP),
    "loss_tiles": partial(draw_tiles, LOSS),
    "step_hill": draw_hill,
}
