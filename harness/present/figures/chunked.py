"""What a GPU holds when a sequence runs in chunks: by length of the sequence, and by length of a chunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from harness.cells.cell import Cell
from harness.cells.prediction import Prediction
from harness.cells.units import length_text, options_text
from harness.present import drawing
from harness.present.figures.base import simulated
from harness.records.table import NOT_SIMULATED, Results

Points = list[tuple[int, Prediction]]
GIB = 2**30


def draw(results: Results) -> Figure:
    """Allocated bytes by length; allocated bytes and modelled time by length of a chunk."""
    cells = [
        (cell, s.prediction)
        for cell, s in simulated(results)
        if s.prediction and s.search is None and s.fits
    ]
    by_length = _series(cells)
    chunks = sorted(
        (cell.train.method.options["chunk"], p)
        for cell, p in cells
        if cell.train.seqlen == _common_length(cells) and "chunk" in cell.train.method.options
    )
    colours = drawing.palette(by_length)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    lengths, held, time = figure.subplots(1, 3)
    for name, points in by_length.items():
        _line(lengths, [(x, p.allocated_bytes / GIB) for x, p in points], colours[name])
    lengths.set_ylabel("GiB of one GPU, allocated")
    _lengths_on(lengths, "tokens of the sequence")
    one = next((colours[name] for name in by_length if name.startswith("chunked")), "grey")
    _line(held, [(x, p.allocated_bytes / GIB) for x, p in chunks], one)
    held.set_ylabel("GiB of one GPU, allocated")
    timed = [(x, p.step_seconds_modelled / 60) for x, p in chunks if p.step_seconds_modelled]
    _line(time, timed, one)
    time.set_ylabel("minutes of a step, modelled")
    for axes in (held, time):
        _lengths_on(axes, "tokens of a chunk")
    if not cells:
        drawing.say(lengths, NOT_SIMULATED)
    handles = [drawing.handle(name, colours[name], "predicted") for name in by_length]
    return drawing.frame(figure, results, "One sequence in chunks", handles, NOTE)


def _name(cell: Cell) -> str:
    method = cell.train.method
    return ", ".join([method.name, *options_text(method.options)])


def _series(cells: Sequence[tuple[Cell, Prediction]]) -> dict[str, Points]:
    """Predictions by length of each method with several lengths, in the order of the cells."""
    found: dict[str, Points] = {}
    for cell, p in cells:
        found.setdefault(_name(cell), []).append((cell.train.seqlen, p))
    return {name: sorted(points, key=_length) for name, points in found.items() if len(points) > 1}


def _length(point: tuple[int, Any]) -> int:
    return point[0]


def _common_length(cells: Sequence[tuple[Cell, Prediction]]) -> int:
    """The length at which most kinds of chunks ran; 0 without any."""
    lengths = [cell.train.seqlen for cell, _ in cells if "chunk" in cell.train.method.options]
    return max(set(lengths), key=lengths.count, default=0)


def _line(axes: Axes, points: Sequence[tuple[int, float]], colour: str) -> None:
    axes.plot([x for x, _ in points], [y for _, y in points], **drawing.mark("predicted", colour))


def _lengths_on(axes: Axes, label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: length_text(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(0.1)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(label)


NOTE = (
    "Llama-3.1-8B on one phantom H100-80GB, training states on the host. Left: methods that run layer by layer hold more "
    "for every token; in chunks a GPU holds one chunk. Keys, values and their gradients lie on the host: about 390 KiB per "
    "token. Middle and right: 512K tokens in chunks; weights are read once per chunk, pages once per pair of chunks."
)
