"""Figure 4: forward and backward of one LlamaMLP on 256,000 tokens, with and without tiles."""

from __future__ import annotations

from matplotlib.figure import Figure

from harness.present import drawing
from harness.present.figures.base import RELEASED_NOTE, draw_timelines, part_timelines
from harness.records.published import look_up
from harness.records.table import Results

TITLE = "One MLP: live tensors of forward and backward"


def published(state: str) -> float:
    """GiB above the floor of the published plot: the process of the paper holds other things, too."""
    peak, low = (
        look_up(
            "alst_memory_facts", {"fact": f"tiled_mlp_forward_backward_{word}_{state}"}, "value"
        )
        for word in ("peak", "low")
    )
    return peak.value - low.value


def draw(results: Results) -> Figure:
    """Bytes over events; stars at the published peaks above their floors."""
    figure = Figure(figsize=(8.2, 4.2), layout="constrained")
    axes = figure.subplots()
    handles = draw_timelines(axes, part_timelines(results, "mlp", "tiled MLP"))
    if handles:
        for state in ("untiled", "tiled"):
            words = f"{state} "
            drawing.point(axes, 1, published(state), drawing.INK, "published", words, side=-1)
    handles.append(drawing.handle("published", drawing.INK, "published"))
    return drawing.frame(figure, results, TITLE, handles, NOTE)


NOTE = (
    "All lines are of phantom devices (PyTorch's own CUDA build and allocator) and include parameters and input. "
    "Events are spread evenly: the width of a line says nothing of time. Stars: published peak less the floor of "
    "its plot. " + RELEASED_NOTE
)
