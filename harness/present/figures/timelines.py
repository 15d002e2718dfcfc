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
from harness.cells.units import length_text
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
    """What was published, in words -> GiB."""
    title: str
    note: str


class Line(NamedTuple):
    """One timeline: its label, the method whose colour it has, and its readings."""

    label: str
    method: str
    readings: Simulated


def draw_tiles(tiles: Tiles, results: Results) -> Figure:
    """Bytes over events, whole and in tiles; a dotted line with a star at each published peak."""
    cells = simulated(results, tiles.part)
    figure, axes, handles = _timelines([_tiled(tiles, cell, s) for cell, s in cells])
    for words, gib in tiles.published().items() if handles else ():
        axes.axhline(gib, color=drawing.INK, linewidth=1, linestyle=":")
        text = f"{words}: {gib:.3g} GiB"
        at = axes, RIGHT_OF_ALL, gib
        drawing.point(*at, drawing.INK, "published", text, side=-1, on_line=True)
    handles.append(drawing.handle("published", drawing.INK, "published"))
    return drawing.frame(figure, results, tiles.title, handles, tiles.note)


RIGHT_OF_ALL = 1.03
"""Where published peaks stand: nothing says at which event they were."""


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
        where = f": {train.model}, {length_text(train.seqlen)} tokens on {train.world_size} GPUs"
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
        axes.plot(at, held, color=colour, linewidth=1.5)
        peak = max(held)
        first = at[held.index(peak)]
        text = f"{peak:.3g} GiB"
        drawing.point(axes, first, peak, colour, "predicted", text, fits=s.fits, on_line=True)
        handles.append(
            Line2D([], [], label=label, **drawing.mark("predicted", colour) | {"linestyle": "-"})
        )
        peaks.append(peak)
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
    """Peaks above the floors of the published plots."""
    fact = "tiled_mlp_forward_backward_{}_{}".format
    return {
        f"published peak, {words}": _fact(fact("peak", name)) - _fact(fact("low", name))
        for name, words in (("untiled", "whole"), ("tiled", "tiled MLP"))
    }


def _logits() -> dict[str, float]:
    held = _fact("logits_fp32_one_copy_16k") * _fact("logits_copies_in_loss")
    return {"published: two fp32 copies of the logits": held}


NOTE = (
    "All lines are of phantom devices (PyTorch's own CUDA build and allocator) and include {}. A mark is at the peak. "
    "Events are spread evenly: the width of a line says nothing of time. {} " + RELEASED_NOTE
)
HILL_NOTE = (
    "On a phantom device: PyTorch's own CUDA build and allocator. Events are spread evenly: the width of a stretch "
    "says nothing of time. The paper shows this figure as an image only and gives no number to compare with."
)
MLP = Tiles(
    part="mlp",
    feature="tiled MLP",
    published=_mlp_peaks,
    title="One MLP: live tensors of forward and backward",
    note=NOTE.format(
        "parameters and input",
        "A published peak is that of the paper's plot of a GPU's memory less the plot's floor, because its process "
        "holds other things, too.",
    ),
)
LOSS = Tiles(
    part="loss",
    feature="tiled loss",
    published=_logits,
    title="Logits and loss of 16,000 tokens, 128,256 words",
    note=NOTE.format(
        "the head's weight and its gradient",
        "Published is the paper's count of what the loss holds without tiles, not a reading: two fp32 copies of the "
        "logits. The tiled loss of deepspeed_alst is Liger's fused one.",
    ),
)
FIGURES = {
    "mlp_tiles": partial(draw_tiles, MLP),
    "loss_tiles": partial(draw_tiles, LOSS),
    "step_hill": draw_hill,
}
