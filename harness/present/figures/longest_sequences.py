"""The longest sequences of Llama-8B: published ones beside predictions for our own methods."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from harness.cells.units import length_text
from harness.present import drawing
from harness.present.lengths import METHODS, Length, beside_published, shortened
from harness.records.table import NOT_SIMULATED, Results


def draw(results: Results) -> Figure:
    """A panel per number of GPUs, in it a row per system, the longest below."""
    rows = shortened(beside_published([results]))
    by_gpus: dict[int, list[Length]] = {}
    for each in rows:
        by_gpus.setdefault(each.num_gpus, []).append(each)
    colours = drawing.palette(METHODS)
    heights = [len(lengths) + 0.6 for lengths in by_gpus.values()]
    figure = Figure(figsize=(9, 1.9 + 0.27 * sum(heights)), layout="constrained")
    grid = figure.subplots(len(by_gpus), 1, sharex=True, squeeze=False, height_ratios=heights)
    for (gpus, lengths), axes in zip(by_gpus.items(), grid[:, 0], strict=True):
        axes.set_title(f"{gpus} GPU{'s' if gpus > 1 else ''}", loc="left")
        _draw_panel(axes, lengths, colours)
    lowest = grid[-1][0]
    lowest.set_xscale("log")
    lowest.set_xlim(
        min(each.tokens for each in rows) / 1.6, 1.2 * max(each.tokens for each in rows)
    )
    lowest.xaxis.set_major_formatter(FuncFormatter(lambda value, _: length_text(value)))
    lowest.xaxis.set_minor_formatter(NullFormatter())
    lowest.set_xlabel("longest sequence [tokens]")
    shown = [method for method in METHODS if any(each.method == method for each in rows)]
    handles = [drawing.handle("published", drawing.INK, "published")]
    handles += [drawing.handle(f"predicted, our {m}", colours[m], "predicted") for m in shown]
    note = NOTE if shown else f"Our methods: {NOT_SIMULATED}. {NOTE}"
    return drawing.frame(figure, results, "Longest sequence of Llama-8B", handles, note)


def _draw_panel(axes: Axes, lengths: list[Length], colours: dict[str, str]) -> None:
    for place, each in enumerate(lengths):
        colour = colours[each.method] if each.method else drawing.INK
        kind: drawing.Kind = "published" if each.is_published else "predicted"
        drawing.point(axes, each.tokens, place, colour, kind, length_text(each.tokens))
    axes.set_yticks(range(len(lengths)), [_label(each) for each in lengths])
    axes.set_ylim(len(lengths) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")


def _label(each: Length) -> str:
    """System and hardware; of a prediction its node, too, which limits it."""
    if each.is_published:
        return f"{each.system} ({each.hardware})"
    return f"our {each.system} ({each.hardware}, {each.host} host)"


NOTE = (
    "Full fine-tuning with exact dense attention. Published: as the authors give it. Predicted: on phantom H100-80GB, up "
    "to the out-of-memory error of PyTorch's own allocator; by method, without options and with the exact options that "
    "are longest; GiB: host memory of a node. Sources: experiments/published/records.csv."
)
