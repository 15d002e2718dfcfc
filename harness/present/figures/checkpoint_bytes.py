"""Section 3.3: host memory that the checkpoints of one GPU fill, by length."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from harness.cells.units import bytes_text, length_text
from harness.judge.claims import OURS
from harness.present import drawing
from harness.present.figures.base import simulated
from harness.records.published import look_up
from harness.records.table import NOT_SIMULATED, Results

PUBLISHED_TOKENS = 125_000
"""Of the fact `activation_checkpoints_125k_all_layers`."""


def draw(results: Results) -> Figure:
    """Host bytes of one GPU as the phantom device reads them, and the paper's count for one length."""
    points = sorted(
        (cell.train.seqlen, s.checkpoint_bytes, s.fits)
        for cell, s in simulated(results)
        if cell.train.world_size == 1 and s.timeline is None and s.checkpoint_bytes
    )
    colour = drawing.palette([OURS])[OURS]
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    if not points:
        drawing.say(axes, NOT_SIMULATED)
    lengths, held = [n for n, _, _ in points], [nbytes for _, nbytes, _ in points]
    axes.plot(lengths, held, **drawing.mark("predicted", colour))
    for n, nbytes, fits in points:
        drawing.point(axes, n, nbytes, colour, "predicted", fits=fits)
        axes.annotate(
            bytes_text(nbytes),
            (n, nbytes),
            xytext=(8, -12),
            textcoords="offset points",
            fontsize=7.5,
            color=colour,
        )
    fact = look_up("alst_memory_facts", {"fact": "activation_checkpoints_125k_all_layers"}, "value")
    label = f"{fact.value} GiB published"
    drawing.point(
        axes, PUBLISHED_TOKENS, fact.value * 2**30, drawing.INK, "published", label, side=-1
    )
    axes.set_xscale("log")
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: length_text(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: bytes_text(value)))
    axes.margins(0.14)
    axes.set_xlabel("tokens of one GPU")
    axes.set_ylabel("checkpoints of one GPU")
    handles = [
        drawing.handle("published", drawing.INK, "published"),
        drawing.handle("predicted: on a phantom device", colour, "predicted"),
    ]
    return drawing.frame(figure, results, "Activation checkpoints of Llama-8B by length", handles)
