"""Figure 7: memory over one step, with checkpoints on the GPU (a hill) and in host memory (flat)."""

from __future__ import annotations

from matplotlib.figure import Figure

from harness.cells.cell import Cell
from harness.cells.prediction import Simulated
from harness.cells.units import tokens_text
from harness.present import drawing
from harness.present.figures.base import Timeline, draw_timelines, simulated
from harness.records.table import Results


def _line(cell: Cell, s: Simulated) -> Timeline:
    """Without offload in the colour of the stock model, with it in that of the method."""
    if cell.train.method.options.get("offload") is False:
        return Timeline("checkpoints on the GPU", drawing.STOCK, s)
    return Timeline("checkpoints in host memory", cell.train.method.name, s)


def draw(results: Results) -> Figure:
    """Live bytes of one GPU over the events of forward and backward, with and without offload."""
    found = [(cell, s) for cell, s in simulated(results) if s.timeline]
    figure = Figure(figsize=(8.2, 4.2), layout="constrained")
    axes = figure.subplots()
    handles = draw_timelines(axes, [_line(cell, s) for cell, s in found])
    for _, s in found[:1]:
        assert s.timeline is not None
        phases = s.timeline.phases
        turn = phases.index("backward") / max(len(phases) - 1, 1)
        axes.axvline(turn, color=drawing.FAINT, linewidth=0.8, linestyle=":")
        for x, ha, name in ((turn, "right", "forward "), (turn, "left", " backward")):
            axes.text(
                x, 0.97, name, transform=axes.get_xaxis_transform(), ha=ha, va="top", fontsize=8
            )
    where = ""
    if found:
        train = found[0][0].train
        where = f": {train.model}, {tokens_text(train.seqlen)} tokens on {train.world_size} GPUs"
    return drawing.frame(figure, results, f"Memory over one step{where}", handles, NOTE)


NOTE = (
    "On a phantom device: PyTorch's own CUDA build and allocator. Events are spread evenly: the width of a stretch "
    "says nothing of time. The paper shows this figure as an image only and gives no number to compare with."
)
