"""Every gradient against the stock model."""

from __future__ import annotations

from harness.cells import paths
from harness.judge.defects import read_defects
from harness.present.grids.gradients import (
    defect_grid,
    finding_grid,
    method_grid,
    refusal_grid,
    verdict_counts,
)
from harness.present.grids.origins import origin
from harness.present.pages.base import Committed
from harness.present.render import render
from harness.records.record import Outcome
from harness.records.table import Results


def page(c: Committed) -> str:
    """What passed, what did not, what is refused, and which planted defects are caught."""
    sections = [
        {
            "results": results,
            "counts": verdict_counts(results),
            "origin": origin(results),
            "methods": method_grid(results),
            "findings": finding_grid(results),
            "refusals": refusal_grid(results),
            "defects": defect_grid(results),
            "caught": caught(results),
        }
        for results in c.compared
    ]
    return render("correctness.md", sections=sections)


def caught(results: Results) -> str:
    """How many planted defects a cell of the matrix catches, and how many are left to tests."""
    catches = len(defect_grid(results).rows)
    if not catches:
        return ""
    defects = read_defects(paths.DEFECTS).values()
    to_tests = sum(bool(defect.tests) for defect in defects)
    planted = len(defects) - to_tests
    return f"{catches} of {planted} caught by a cell; {to_tests} more are left to tests"


def summary(c: Committed) -> list[tuple[str, str]]:
    """Cells by experiment and method, and planted defects."""
    rows = []
    for results in c.compared:
        refused = [f"{len(results.refused)} cells refused"] * bool(results.refused)
        passed = "; ".join([*_passed(results), *refused])
        rows.append((f"gradients against the stock model (`{results.name}`)", passed))
        if caught(results):
            rows.append(("planted defects", caught(results)))
    return rows


def _passed(results: Results) -> list[str]:
    """By method: how many of its cells passed."""
    outcomes: dict[str, list[bool]] = {}
    for m in results.measurements.values():
        outcomes.setdefault(m.cell.train.method.name, []).append(m.outcome is Outcome.OK)
    return [f"`{method}` passed {sum(ok)} of {len(ok)} cells" for method, ok in outcomes.items()]
