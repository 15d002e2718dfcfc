"""Section 3.1: logits and loss of 16,000 tokens, whole and in tiles."""

from __future__ import annotations

from matplotlib.figure import Figure

from harness.present import drawing
from harness.present.figures.base import draw_timelines, simulated
from harness.records.published import look_up
from harness.records.table import Results

NAMES = {"whole": "baseline", "Liger's fused loss": "deepspeed_alst", "tiled, ours": "alst"}
"""Line -> whose colour it has."""


def draw(results: Results) -> Figure:
    """Bytes over events; the star is the two fp32 copies of the logits that the paper counts."""
    lines = []
    for cell, s in simulated(results, "loss"):
        ours = cell.train.method.name == "alst"
        fused = cell.train.method.options.get("liger", False)
        lines.append(("tiled, ours" if ours else "Liger's fused loss" if fused else "whole", s))
    palette = drawing.palette(NAMES.values())
    colours = {name: palette[method] for name, method in NAMES.items()}
    figure = Figure(figsize=(8.2, 4.2), layout="constrained")
    axes = figure.subplots()
    handles = draw_timelines(axes, lines, colours)
    copy, copies = (
        look_up("alst_memory_facts", {"fact": fact}, "value").value
        for fact in ("logits_fp32_one_copy_16k", "logits_copies_in_loss")
    )
    if handles:
        drawing.point(axes, 1, copy * copies, colours["whole"], "published")
    handles.append(
        drawing.handle("published: two fp32 copies of the logits", drawing.INK, "published")
    )
    title = "Logits and loss of 16,000 tokens, 128,256 words"
    return drawing.frame(figure, results, title, handles, NOTE)


NOTE = (
    "All lines are of phantom devices (PyTorch's own CUDA build and allocator) and include the head's weight and its gradient; events are spread evenly, so the "
    "width of a line says nothing of time."
)
