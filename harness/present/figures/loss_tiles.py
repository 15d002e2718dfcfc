"""Section 3.1: logits and loss of 16,000 tokens, whole and in tiles."""

from __future__ import annotations

from matplotlib.figure import Figure

from harness.present import drawing
from harness.present.figures.base import RELEASED_NOTE, draw_timelines, part_timelines
from harness.records.published import look_up
from harness.records.table import Results


def draw(results: Results) -> Figure:
    """Bytes over events; the star is the two fp32 copies of the logits that the paper counts."""
    figure = Figure(figsize=(8.2, 4.2), layout="constrained")
    axes = figure.subplots()
    handles = draw_timelines(axes, part_timelines(results, "loss", "tiled loss"))
    copy, copies = (
        look_up("alst_memory_facts", {"fact": fact}, "value").value
        for fact in ("logits_fp32_one_copy_16k", "logits_copies_in_loss")
    )
    if handles:
        drawing.point(axes, 1, copy * copies, drawing.INK, "published")
    label = "published: two fp32 copies of the logits"
    handles.append(drawing.handle(label, drawing.INK, "published"))
    title = "Logits and loss of 16,000 tokens, 128,256 words"
    return drawing.frame(figure, results, title, handles, NOTE)


NOTE = (
    "All lines are of phantom devices (PyTorch's own CUDA build and allocator) and include the head's weight and "
    "its gradient. Events are spread evenly: the width of a line says nothing of time. The tiled loss of "
    "deepspeed_alst is Liger's fused one. " + RELEASED_NOTE
)
