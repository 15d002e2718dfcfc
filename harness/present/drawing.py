"""Styles and marks; every figure draws its points with these functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import cycle
from textwrap import wrap
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from alst_impl.plugin import names
from harness.cells.units import bytes_text, length_text, seconds_text
from harness.cells.worlds import TRAITS, World
from harness.records.record import Outcome
from harness.records.table import NOT_MEASURED, NOT_SIMULATED, Results, source_line

Kind = Literal["measured", "predicted", "published"]

KINDS: dict[Kind, dict[str, Any]] = {
    "measured": {"markersize": 6, "linestyle": "-"},
    "predicted": {"markersize": 6, "linestyle": "--", "markerfacecolor": "white"},
    "published": {"marker": "*", "markersize": 11, "linestyle": "none"},
}
"""The three kinds of number: filled, hollow and a star; no two share a mark."""

WRONG: dict[str, Any] = {
    "linestyle": "none",
    "marker": "X",
    "markersize": 11,
    "markerfacecolor": "white",
    "markeredgecolor": "#b3261e",
    "markeredgewidth": 1.3,
    "zorder": 5,
}
"""Drawn over a point whose gradients are wrong or were not compared."""

DOES_NOT_FIT: dict[str, Any] = {
    "linestyle": "none",
    "marker": "x",
    "markersize": 10,
    "markeredgecolor": "#b3261e",
    "markeredgewidth": 1.8,
    "zorder": 5,
    "gid": Outcome.DOES_NOT_FIT.value,
}
"""Drawn over a point of a predicted step that needs more than the machine has."""

INK = "#22272e"
FAINT = "#6b7280"
STOCK = "baseline"
"""The stock method; other methods are compared with it, and it is grey."""
GREY = "#5b6470"
WHEEL = [sns.color_palette("colorblind").as_hex()[i] for i in (0, 1, 2, 3, 4, 5, 9, 6)]
"""Colours that colour-blind readers can tell apart. Words can be read in all but the last, which is pale."""

SHAPES = dict(zip([GREY, *WHEEL], "osD^vPph<", strict=True))
"""The shape of each colour's marks: a series is known by either."""

STYLE = {
    **sns.axes_style("whitegrid"),
    **sns.plotting_context("notebook", font_scale=0.82),
    "font.family": ["DejaVu Sans"],
    "axes.edgecolor": "#c4c9d1",
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "figure.facecolor": "white",
    "grid.color": "#e8eaee",
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "svg.hashsalt": "alst-bench",
    "lines.linewidth": 1.8,
}


def kind_of(world: World) -> Kind:
    """The kind of number that a cell of `world` gives: predicted where no device runs it, else measured."""
    return "predicted" if TRAITS[world].forecast else "measured"


def mark(kind: Kind, colour: str) -> dict[str, Any]:
    """How a point of `kind` looks in `colour`."""
    return {"color": colour, "marker": SHAPES.get(colour, "o"), **KINDS[kind]}


class Panels(NamedTuple):
    """A figure and its panels by what they show."""

    figure: Figure
    axes: dict[Any, Axes]
    columns: int


def palette(series: Iterable[str]) -> dict[str, str]:
    """A colour for each series, in the order given.

    A method has one colour in every figure, and its first series takes it. Each further series of the
    method, and a name that is no method, takes a colour that is free in this figure.
    """
    coloured = [name for name in names("alst_impl.methods") if name != STOCK]
    of_method = {STOCK: GREY, **dict(zip(coloured, cycle(WHEEL), strict=False))}
    shown = list(dict.fromkeys(series))
    found: dict[str, str] = {}
    for name in shown:
        colour = of_method.get(name.split()[0])
        if colour and colour not in found.values():
            found[name] = colour
    *dark, pale = WHEEL
    rest = [colour for colour in [*reversed(dark), pale] if colour not in found.values()]
    free = cycle(rest or WHEEL)
    return {name: found[name] if name in found else next(free) for name in shown}


def panels(
    shown: Sequence[Any], across: int = 3, width: float = 3.3, height: float = 2.7
) -> Panels:
    """A panel with common axes for each of `shown`, at most `across` beside each other."""
    columns = max(min(len(shown), across), 1)
    rows = math.ceil(len(shown) / columns)
    figure = Figure(
        figsize=(max(width * columns + 1.0, 5.6), height * rows + 1.3), layout="constrained"
    )
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for unused in grid[len(shown) :]:
        unused.remove()
    return Panels(figure, dict(zip(shown, grid, strict=False)), columns)


def label_lowest(panels: Panels, xlabel: str) -> None:
    """Label the lowest panel of each column."""
    for axes in list(panels.axes.values())[-panels.columns :]:
        axes.tick_params(labelbottom=True)
        axes.set_xlabel(xlabel)


def line(axes: Axes, points: pd.DataFrame, metric: str, colour: str, kind: Kind) -> None:
    """Draw `metric` against length with the marks of `kind`; a point whose gate did not pass gets a cross."""
    points = points.dropna(subset=[metric]).sort_values("seqlen")
    if points.empty:
        return
    axes.plot(points["seqlen"], points[metric], **mark(kind, colour))
    wrong = points[untrusted(points)]
    axes.plot(wrong["seqlen"], wrong[metric], **WRONG)


def untrusted(cells: pd.DataFrame) -> pd.Series[bool]:
    """Which cells have readings but no gradient comparison that passed."""
    read = cells["peak_bytes"].notna() | cells["step_s"].notna()
    return read & ~cells["gate"].str.startswith("passed")


def spread(axes: Axes, points: pd.DataFrame, low: str, high: str, colour: str) -> None:
    """Shade from `low` to `high` behind a line, with a bar at each point."""
    points = points.dropna(subset=[low, high]).sort_values("seqlen")
    axes.vlines(points["seqlen"], points[low], points[high], color=colour, alpha=0.45, linewidth=3)
    axes.fill_between(
        points["seqlen"], points[low], points[high], color=colour, alpha=0.18, linewidth=0
    )


def failures(axes: Axes, cells: pd.DataFrame, colours: dict[str, str]) -> None:
    """Write each cell that ended without a reading at its length, at the top of the panel."""
    readable = {Outcome.OK.value, Outcome.WRONG_GRADIENT.value, NOT_MEASURED, NOT_SIMULATED}
    failed = cells[~cells["outcome"].isin(readable)]
    for i, (_, cell) in enumerate(failed.sort_values(["method", "seqlen"]).iterrows()):
        axes.annotate(
            f"× {cell['outcome']}",
            (cell["seqlen"], 1 - 0.07 * (i + 0.6)),
            xycoords=("data", "axes fraction"),
            color=colours[cell["series"]],
            ha="center",
            va="center",
            fontsize=7.5,
            fontweight="bold",
            annotation_clip=False,
        )


def length_axis(axes: Axes, lengths: Iterable[int]) -> None:
    """Logarithmic axis of sequence lengths; the ticks are the lengths of the cells."""
    values = sorted(set(lengths))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(values, [length_text(n) for n in values])
    if len(values) == 1:
        axes.set_xlim(values[0] / 2, values[0] * 2)
    elif values:
        axes.set_xlim(values[0] / 1.3, values[-1] * 1.3)


def log_axis(axes: Axes, values: pd.Series, text: Any) -> None:
    """Logarithmic axis in powers of two with steps between them where the range is small."""
    finite = values[np.isfinite(values) & (values > 0)]
    if finite.empty:
        axes.set_yticks([])
        return
    axes.set_yscale("log", base=2)
    low, high = finite.min() / 1.25, finite.max() * 1.25
    axes.set_ylim(low, high)
    subs = (1.0,) if math.log2(high / low) > 3 else (1.0, 1.25, 1.5, 1.75)
    axes.yaxis.set_major_locator(LogLocator(base=2, subs=subs, numticks=14))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))


def bytes_axis(axes: Axes, values: pd.Series) -> None:
    """Logarithmic axis of bytes, labelled in powers of 1024."""
    log_axis(axes, values, bytes_text)


def seconds_axis(axes: Axes, values: pd.Series) -> None:
    """Logarithmic axis of seconds, labelled in ms or s."""
    log_axis(axes, values, seconds_text)


def finish(
    figure: Figure,
    results: Results,
    title: str,
    colours: dict[str, str],
    cells: pd.DataFrame,
    note: str = "",
) -> Figure:
    """Title, legend of the series and marks in use, and the source line below.

    Without `colours`, where rows name the series, the legend has the kinds of numbers alone.
    """
    kinds = {name: kind_of(w) for name, w in zip(cells["series"], cells["world"], strict=True)}
    handles = [handle(name, colours[name], kinds[name]) for name in colours if name in kinds]
    if not colours:
        handles = [handle(kind, INK, kind) for kind in dict.fromkeys(kinds.values())]
    if untrusted(cells).any():
        handles.append(Line2D([], [], label="gradients wrong or not compared", **WRONG))
    return frame(figure, results, title, handles, note)


def frame(
    figure: Figure, source: Results | str, title: str, handles: Sequence[Line2D], note: str = ""
) -> Figure:
    """Title and legend above, note and source below; words beside points stay within their panels.

    The legend explains the cross of a step that does not fit.
    """
    gid = DOES_NOT_FIT["gid"]
    if any(line.get_gid() == gid for axes in figure.axes for line in axes.get_lines()):
        handles = [*handles, Line2D([], [], label="does not fit", **DOES_NOT_FIT)]
    _legend(figure, title, handles)
    columns = int(figure.get_figwidth() * 16)
    below = source if isinstance(source, str) else source_line(source)
    lines = [part for text in (note, below) for part in wrap(text, columns)]
    foot = "\n".join(lines)
    figure.supxlabel(foot, x=0.01, ha="left", fontsize=7.5, color=FAINT)
    _make_room(figure)
    return figure


def _legend(figure: Figure, title: str, handles: Sequence[Line2D]) -> None:
    """Title and legend in as many columns as the figure is wide enough for."""
    heading = "\n".join(wrap(title, int(figure.get_figwidth() * 9)))
    figure.draw_without_rendering()
    for ncols in range(min(max(len(handles), 1), 5), 0, -1):
        legend = figure.legend(
            handles=handles,
            loc="outside upper left",
            ncols=ncols,
            frameon=False,
            title=heading,
            title_fontproperties={"size": 12, "weight": "bold"},
            alignment="left",
            borderaxespad=0.2,
        )
        legend.get_title().set_color(INK)
        if ncols == 1 or legend.get_window_extent().width < figure.bbox.width:
            return
        legend.remove()


def _make_room(figure: Figure) -> None:
    """Widen horizontal axes until no words beside points cross a frame."""
    shared = [axes.get_shared_x_axes().get_siblings(axes) for axes in figure.axes]
    groups = {id(group[0]): group for group in shared}
    for _ in range(4):
        figure.draw_without_rendering()
        widened = [_widen(group) for group in groups.values()]
        if not any(widened):
            return


def _widen(group: list[Axes]) -> bool:
    """Widen the horizontal axis of panels by what words overlap a frame; returns whether any do."""
    axes, gap = group[0], 10
    frame = axes.get_window_extent()
    boxes = [
        (each.get_window_extent(), text.get_window_extent())
        for each in group
        for text in each.texts
        if text.get_text()
    ]
    over = [max([0.0, *(own.x0 - box.x0 + gap for own, box in boxes)])]
    over += [max([0.0, *(box.x1 - own.x1 + gap for own, box in boxes)])]
    if not 1 < max(over) < frame.width:
        return False
    scale = axes.xaxis.get_transform()
    low, high = scale.transform(axes.get_xlim())
    # A point moves away from the frame by less than the axis widens.
    left, right = (1.3 * (high - low) * each / frame.width for each in over)
    low, high = scale.inverted().transform([low - left, high + right])
    axes.set_xlim(float(low), float(high))
    return True


def point(
    axes: Axes,
    x: float,
    y: float,
    colour: str,
    kind: Kind,
    label: str = "",
    side: int = 1,
    ink: str | None = None,
    *,
    fits: bool = True,
    on_line: bool = False,
) -> None:
    """One point with the mark of `kind`, and `words` beside it, in its colour or in `ink`.

    A step that does not fit is crossed out.
    """
    axes.plot([x], [y], zorder=3, clip_on=False, **mark(kind, colour))
    if not fits:
        axes.plot([x], [y], clip_on=False, **DOES_NOT_FIT)
    if label:
        words(axes, x, y, label, ink or colour, side, on_line=on_line)


def words(
    axes: Axes, x: float, y: float, text: str, ink: str, side: int = 1, *, on_line: bool = False
) -> None:
    """Words right of a point, or left of it with `side` -1; above a line that runs through it."""
    axes.annotate(
        text,
        (x, y),
        xytext=(9 * side, 3 if on_line else 0),
        textcoords="offset points",
        ha="left" if side > 0 else "right",
        va="bottom" if on_line else "center",
        fontsize=7.5,
        color=ink,
        bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.5},
    )


def handle(label: str, colour: str, kind: Kind) -> Line2D:
    """A legend entry."""
    return Line2D([], [], label=label, **mark(kind, colour))


def say(axes: Axes, text: str) -> None:
    """Words in place of a drawing."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center")
