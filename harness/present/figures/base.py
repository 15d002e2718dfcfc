"""What figures share: finding one by name, and the cells that they show."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.figure import Figure

from alst_impl.methods.base import load_method
from alst_impl.plugin import names
from harness.cells.cell import Cell
from harness.cells.prediction import Simulated
from harness.present import drawing
from harness.records.table import Results


def figures() -> dict[str, Callable[[Results], Figure]]:
    """Every figure by name: a file of this folder with `draw`, or an entry of `FIGURES` in one."""
    found: dict[str, Callable[[Results], Figure]] = {}
    for name in names("harness.present.figures"):
        module = importlib.import_module(f"harness.present.figures.{name}")
        found |= getattr(module, "FIGURES", None) or {name: module.draw}
    return found


def draw(name: str, results: Results) -> Figure:
    """The figure `name` of `results`. Raises `ValueError` for an unknown name."""
    known = figures()
    if name not in known:
        raise ValueError(f"unknown figure '{name}'; use one of {', '.join(sorted(known))}")
    with mpl.rc_context(drawing.STYLE):
        figure = known[name](results)
        figure.draw_without_rendering()
    return figure


Part = Literal["step", "mlp", "loss"]


def simulated(results: Results, part: Part = "step") -> Iterator[tuple[Cell, Simulated]]:
    """Cells of phantom devices that run `part`, with their readings."""
    for key, cell in results.cells.items():
        m = results.measurements.get(key)
        if cell.traits.phantom and _part(cell) == part and m and m.simulated:
            yield cell, m.simulated


def _part(cell: Cell) -> str:
    assert cell.simulation is not None
    return cell.simulation.part


def methods_of(cells: Iterable[Cell]) -> list[str]:
    """The methods of `cells`, in their order."""
    return list(dict.fromkeys(cell.train.method.name for cell in cells))


RELEASED_NOTE = "deepspeed_alst: ALST as its authors released it. alst: our own implementation."
"""Explains two methods beside published numbers."""


def features(cell: Cell) -> str:
    """Which parts of ALST a cell turns on, in words."""
    method: Any = load_method(cell.train.method)
    parts = {
        "tiled loss": getattr(method, "liger", False) or getattr(method, "tile_loss", False),
        "Ulysses": getattr(method, "sp", 1) > 1,
        "tiled MLP": getattr(method, "tile_mlp", False),
        "offload": getattr(method, "offload", False),
    }
    return "\n+ ".join(name for name, on in parts.items() if on) or "baseline"
