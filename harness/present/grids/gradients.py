"""Tables of gradient comparisons: what passed, what did not, what is refused, which defects are caught."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from alst_impl.config import DType
from harness.cells import paths
from harness.cells.units import error_text, length_text
from harness.gate.verdict import TOLERANCES
from harness.judge.defects import read_catches
from harness.present.grids.base import MISSING, Grid
from harness.records.record import Gate, Measurement, Outcome, ParameterGate
from harness.records.table import Results, series

WORST = 3
"""Parameters of a failed comparison that `worst_grid` shows; its record has all."""


def worst_grid(results: Results) -> Grid:
    """A row for each of the parameters that are furthest from the truth, of every comparison that failed."""
    named = series(results.cells)
    rows, files = [], []
    for key, m in results.measurements.items():
        gate = m.readings.gate if m.readings else None
        if gate is None or gate.passed:
            continue
        t = m.cell.train
        title = f"{t.model} {named[key]}, {t.world_size} ranks, {length_text(t.seqlen)} tokens"
        for p in sorted(gate.parameters, key=_distance, reverse=True)[:WORST]:
            rows.append([title, p.parameter, _signed(p.ratio), _cosine_error(p.cosine)])
            files.append(results.files.get(key))
    return Grid(["cell", "parameter", "ratio - 1", "1 - cosine"], rows, files)


def _signed(ratio: float | None) -> str:
    return "zero in truth" if ratio is None else f"{ratio - 1:+.1e}"


def _cosine_error(cosine: float | None) -> str:
    return MISSING if cosine is None else error_text(1 - cosine)


def _distance(p: ParameterGate) -> float:
    ratio = 0.0 if p.ratio is None else abs(p.ratio - 1)
    return max(ratio, 0.0 if p.cosine is None else 1 - p.cosine)


def verdict_counts(results: Results) -> str:
    """How many cells ran, passed and failed, and how many rows of a matrix are refused."""
    outcomes = [m.outcome for m in results.measurements.values()]
    passed = outcomes.count(Outcome.OK)
    counted = f"{len(outcomes)} cells run, {passed} passed, {len(outcomes) - passed} failed"
    refused = f"; {len(results.refused)} refused, each with its reason" if results.refused else ""
    return counted + refused


def method_grid(results: Results) -> Grid:
    """A row per method and type: how many cells ran and passed, and the gradient furthest from the truth."""
    kinds: dict[tuple[str, DType], list[Measurement]] = {}
    for m in results.measurements.values():
        train = m.cell.train
        kinds.setdefault((train.method.name, train.dtype), []).append(m)
    rows = [[*kind, *_method_row(kind[1], ms)] for kind, ms in sorted(kinds.items())]
    errors = ["largest |ratio - 1| (allowed)", "largest 1 - cosine (allowed)"]
    return Grid(["method", "type", "cells", "passed", *errors], rows)


def _method_row(dtype: DType, measurements: Sequence[Measurement]) -> list[str]:
    passed = sum(m.outcome is Outcome.OK for m in measurements)
    gates = [m.readings.gate for m in measurements if m.readings and m.readings.gate]
    parameters = [p for gate in gates for p in gate.parameters]
    ratios = [abs(p.ratio - 1) for p in parameters if p.ratio is not None]
    cosines = [1 - p.cosine for p in parameters if p.cosine is not None]
    allowed = TOLERANCES[dtype]
    worst = [
        f"{error_text(max(errors))} ({error_text(limit)})" if errors else MISSING
        for errors, limit in ((ratios, allowed.ratio), (cosines, allowed.cosine))
    ]
    return [str(len(measurements)), str(passed), *worst]


def finding_grid(results: Results) -> Grid:
    """A row per cell that did not pass: how its gradients differ from the stock model's, and why it ended."""
    named = series(results.cells)
    rows, files = [], []
    for key, m in results.measurements.items():
        if m.outcome in (Outcome.OK, Outcome.DOES_NOT_FIT):
            continue  # a step that does not fit is a result, and the table of cells has it
        t = m.cell.train
        files.append(results.files.get(key))
        rows.append(
            [
                f"{t.model} {named[key]}",
                str(t.world_size),
                length_text(t.seqlen),
                m.outcome.value,
                *_spread(m.readings.gate if m.readings else None),
                m.detail or MISSING,
            ]
        )
    headings = ["cell", "ranks", "length", "outcome", "ratios", "least cosine", "what was seen"]
    return Grid(headings, rows, files)


def _spread(gate: Gate | None) -> list[str]:
    """Least and largest ratio over parameters, and the least cosine."""
    compared = [p for p in gate.parameters if p.ratio is not None] if gate else []
    if not compared:
        return [MISSING, MISSING]
    ratios = [p.ratio for p in compared if p.ratio is not None]
    cosine = min(p.cosine for p in compared if p.cosine is not None)
    low, high = f"{min(ratios):.4g}", f"{max(ratios):.4g}"
    return [low if low == high else f"{low} to {high}", f"{cosine:.6g}"]


def refusal_grid(results: Results) -> Grid:
    """A row per combination that the library refuses: the levels that matter, and the refusal."""
    usual = {
        factor: Counter(row.levels[factor] for row in results.refused).most_common(1)[0][0]
        for factor in (results.refused[0].levels if results.refused else {})
    }
    rows = [
        [
            ", ".join(f"{f} {level}" for f, level in row.levels.items() if level != usual[f]),
            row.refused or MISSING,
        ]
        for row in results.refused
    ]
    return Grid(["refused", "because"], rows)


def defect_grid(results: Results) -> Grid:
    """A row per planted defect that a cell of the matrix caught; empty for an experiment without a matrix."""
    catches = read_catches(paths.CAUGHT) if results.refused else []
    rows = [[c.defect, c.cell, c.detail or c.outcome] for c in catches]
    return Grid(["planted defect", "caught by", "what the cell said"], rows)
