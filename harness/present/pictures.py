"""Figures as files: PNG, and SVG, whose text is the same for the same results."""

from __future__ import annotations

import hashlib
from io import BytesIO, StringIO

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from harness.present.drawing import STYLE


def png(figure: Figure, dpi: int = 144) -> bytes:
    """The figure as a PNG that holds its `fingerprint`."""
    buffer = BytesIO()
    about = {"Description": fingerprint(figure)}
    with mpl.rc_context(STYLE):
        FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=dpi, metadata=about)
    return buffer.getvalue()


def fingerprint(figure: Figure) -> str:
    """A hash of the points and words of a figure: the same on every machine, unlike its pixels."""
    parts = [text.get_text() for each in figure.legends for text in each.get_texts()]
    parts += [figure.get_supxlabel(), *(text.get_text() for text in figure.texts)]
    for axes in figure.axes:
        parts += [axes.get_title(), axes.get_title("left"), axes.get_xlabel(), axes.get_ylabel()]
        parts += [text.get_text() for text in axes.texts]
        for line in axes.get_lines():
            parts += [f"{value:.4g}" for value in np.asarray(line.get_xydata()).flatten()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def svg(figure: Figure) -> str:
    """The figure as an SVG; equal results give equal text."""
    buffer = StringIO()
    with mpl.rc_context(STYLE):
        FigureCanvasSVG(figure).print_figure(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
