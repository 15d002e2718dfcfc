"""What a figure shows, in words: for readers who do not see it. Read off the figure, so that it cannot differ from it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation, Text
from matplotlib.ticker import FixedLocator

Look = tuple[object, ...]
"""What tells a series apart: colour, shape and fill."""

LONGEST = 900
"""Characters after which a description leaves out the rest: the numbers are in tables, too."""


def described(figure: Figure) -> str:
    """Title, series, panels with their axes, and the numbers that are written beside points."""
    legend = figure.legends[0]
    title = _line(legend.get_title().get_text())
    names = {_look(line): str(line.get_label()) for line in legend.get_lines()}
    text = f"{title}."
    if names:
        text += f" Shown: {'; '.join(names.values())}."
    for sentence in (each for axes in figure.axes for each in _panel(axes, names)):
        if len(text) + len(sentence) > LONGEST:
            return f"{text} More is in the tables."
        text += f" {sentence}"
    return text


def _line(text: str) -> str:
    return " ".join(text.split())


def _look(line: Line2D) -> Look:
    return line.get_color(), line.get_marker(), line.get_markerfacecolor()


def _panel(axes: Axes, names: dict[Look, str]) -> Iterator[str]:
    """A sentence on a panel and its axes, then one for each row, or for each line and for the words beside points."""
    heading = axes.get_title() or axes.get_title("left")
    labels = [_line(label) for label in (axes.get_ylabel(), axes.get_xlabel()) if label]
    yield ": ".join(filter(None, [heading, " against ".join(labels)])) + "."
    rows = list(_ticks(axes.yaxis).values())
    words = [text for text in axes.texts if len(text.get_text()) > 1]
    if rows and words:
        here = [(_row_of(text), _said(axes, text, names)) for text in words]
        for place, label in enumerate(rows):
            said = "; ".join(text for row, text in here if row == place)
            yield f"{_line(label)}: {said or 'nothing'}."
        return
    yield from _lines(axes, names, at_least=2 if words else 1)
    if words:
        yield f"{'; '.join(_said(axes, text, names) for text in words)}."


def _lines(axes: Axes, names: dict[Look, str], at_least: int) -> Iterator[str]:
    """A sentence for each line of a series with `at_least` so many points: its ends."""
    ticks = _ticks(axes.xaxis)
    for line in axes.get_lines():
        name, (xs, ys) = names.get(_look(line)), _points(line)
        if name and len(xs) >= at_least and len(axes.get_xticks()):
            ends = dict.fromkeys([(xs[0], ys[0]), (xs[-1], ys[-1])])
            said = [f"{axes.format_ydata(y)} at {ticks.get(x, f'{x:,.6g}')}" for x, y in ends]
            yield f"{name}: {', '.join(said)}."


def _ticks(axis: Axis) -> dict[float, str]:
    """Words by place of an axis that names its ticks; empty for an axis of numbers."""
    if not isinstance(axis.get_major_locator(), FixedLocator):
        return {}
    places = [float(place) for place in axis.get_majorticklocs()]
    return dict(zip(places, axis.get_major_formatter().format_ticks(places), strict=True))


def _row_of(text: Text) -> int:
    """The row of words: points stand at the height of their row or a little below."""
    return int(text.xy[1] + 0.2) if isinstance(text, Annotation) else -1


def _said(axes: Axes, text: Text, names: dict[Look, str]) -> str:
    """Words beside a point, and the series of the point."""
    words = _line(text.get_text())
    if not isinstance(text, Annotation):
        return words
    for line in axes.get_lines():
        xs, ys = _points(line)
        if len(xs) == 1 and text.xy == (xs[0], ys[0]) and _look(line) in names:
            return f"{words} ({names[_look(line)]})"
    return words


def _points(line: Line2D) -> tuple[list[float], list[float]]:
    xs, ys = (np.asarray(values, dtype=float).tolist() for values in line.get_data())
    return xs, ys
