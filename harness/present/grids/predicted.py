"""Tables of what phantom devices read, alone and beside a GPU."""

from __future__ import annotations

from harness.cells.cell import Cell
from harness.cells.prediction import Prediction
from harness.cells.units import LIMITS, bytes_text, length_text, ratio_text, seconds_text
from harness.judge.twins import twins
from harness.present.grids.base import MISSING, Grid
from harness.records.record import Measurement
from harness.records.table import Results, outcome_of, series

HEADINGS = [
    "cell",
    "GPUs",
    "length",
    "outcome",
    "allocated",
    "reserved",
    "total (modelled)",
    "host per node",
    "step (modelled)",
    "FLOPs / needed",
    "host traffic per GPU",
    "step at least (modelled)",
    "longest that fits",
    "limit",
]
"""Of `simulated_grid`."""


def simulated_grid(results: Results) -> Grid:
    """A row per cell of a phantom device: what it holds, and the longest sequence of its settings."""
    named = series(results.cells)
    rows = [
        [f"{cell.train.model} {named[key]}", *_readings(cell, results.measurements.get(key))]
        for key, cell in results.cells.items()
    ]
    return Grid(HEADINGS, rows, [results.files.get(key) for key in results.cells])


def _readings(cell: Cell, m: Measurement | None) -> list[str]:
    s = m.simulated if m else None
    p, search = (s.prediction, s.search) if s else (None, None)
    limit = search.limit if search else p.limit if p and not p.fits else None
    return [
        str(cell.train.world_size),
        length_text(cell.train.seqlen),
        outcome_of(cell, m),
        bytes_text(s.peak_bytes) if s else MISSING,
        bytes_text(p.reserved_bytes) if p and p.reserved_bytes else MISSING,
        bytes_text(p.total_bytes) if p else MISSING,
        bytes_text(p.host_bytes) if p else MISSING,
        seconds_text(p.step_seconds_modelled) if p and p.step_seconds_modelled else MISSING,
        *_roofline(cell, p),
        length_text(search.longest_tokens) if search else MISSING,
        LIMITS[limit] if limit else MISSING,
    ]


def _roofline(cell: Cell, p: Prediction | None) -> list[str]:
    """FLOPs over the FLOPs that training needs, bytes between GPU and host, and the least time of both."""
    if p is None or p.cost is None or p.least_seconds_modelled is None:
        return [MISSING] * 3
    return [
        ratio_text(p.cost.flops * cell.train.world_size / p.flops.model_causal),
        bytes_text(p.cost.host_in_bytes + p.cost.host_out_bytes),
        seconds_text(p.least_seconds_modelled),
    ]


def twin_grid(results: Results) -> Grid:
    """What a GPU measured beside what a phantom device read of the same cell."""
    rows = [
        [
            f"{t.cell.label}, {t.cell.train.engine.name}",
            t.quantity,
            bytes_text(t.measured),
            bytes_text(t.predicted),
            f"{t.predicted - t.measured:+,.0f} B",
            "differs" if t.missed else "equal" if t.judged else "not judged",
        ]
        for t in twins(results)
    ]
    return Grid(["cell", "quantity", "GPU", "phantom", "difference", "verdict"], rows)
