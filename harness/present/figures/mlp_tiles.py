"""Figure 4: forward and backward of one LlamaMLP on 256,000 tokens, with and without tiles."""

from __future__ import annotations

from matplotlib.figure import Figure

from harness.present import drawing
from harness.present.figures.base import draw_timelines, simulated
from harness.records.published import look_up
from harness.records.table import Results

TITLE = "One MLP: live tensors of forward and backward"


def published(state: str) -> float:
    """GiB above the floor of the published plot, which shows a process with other things in it."""
    peak, low = (
        look_up(
            "alst_memory_facts", {"fact": f"tiled_mlp_forward_backward_{word}_{state}"}, "value"
        )
        for word in ("peak", "low")
    )
    return peak.value - low.value


def draw(results: Results) -> Figure:
    """Bytes over events; stars at the published peaks above their floors."""
    lines = []
    for cell, s in simulated(results, "mlp"):
        tiled = cell.train.method.options.get("tile_mlp", True)
        whose = "ours" if cell.train.method.name == "alst" else "as released"
        lines.append((f"tiled, {whose}" if tiled else "whole", s))
    palette = drawing.palette(METHODS)
    colours = dict(zip(NAMES, (palette[method] for method in METHODS), strict=True))
    figure = Figure(figsize=(8.2, 4.2), layout="constrained")
    axes = figure.subplots()
    handles = draw_timelines(axes, lines, colours)
    if handles:
        drawing.point(axes, 1, published("untiled"), colours["whole"], "published")
        drawing.point(axes, 1, published("tiled"), colours["tiled, as released"], "published")
    handles.append(drawing.handle("published", drawing.INK, "published"))
    return drawing.frame(figure, results, TITLE, handles, NOTE)


NAMES = ("whole", "tiled, as released", "tiled, ours")
METHODS = ("baseline", "deepspeed_alst", "alst")
NOTE = (
    "All lines are of phantom devices (PyTorch's own CUDA build and allocator) and include parameters and input; events are spread evenly, so the width of a "
    "line says nothing of time. Stars: published peak less the floor of its plot."
)
