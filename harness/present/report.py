"""Records to one self-contained HTML page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.cells import paths
from harness.judge.claims import evidence
from harness.present.grids.base import Grid
from harness.present.grids.claims import claim_grid, claim_summary, miss_grid
from harness.present.grids.gradients import (
    GateView,
    defect_grid,
    finding_grid,
    gate_view,
    refusal_grid,
)
from harness.present.grids.measured import cell_grid, ratio_grid, summary, verdict_grid
from harness.present.grids.origins import environment_grid
from harness.present.grids.predicted import simulated_grid, twin_grid
from harness.present.kinds import is_repeated, is_simulated, is_timed
from harness.present.render import render
from harness.records.record import Outcome
from harness.records.table import (
    NOT_MEASURED,
    NOT_SIMULATED,
    Results,
    counted_outcomes,
    measured_part,
    series,
)

GATES = ("passed", "failed")
GOOD = {Outcome.OK.value, "passed", "lower", "faster", "passed / passed"}
"""Words of a table that are drawn as a success."""
BAD = {
    *(outcome.value for outcome in Outcome if outcome is not Outcome.OK),
    *(f"{ours} / {theirs}" for ours in GATES for theirs in GATES if "failed" in (ours, theirs)),
    *("failed", "higher", "slower", NOT_MEASURED, NOT_SIMULATED),
}
"""Words of a table that are drawn as a failure."""


@dataclass(frozen=True)
class Section:
    """One experiment on the page."""

    name: str
    question: str
    source: str
    progress: str
    summary: str
    verdicts: Grid
    twins: Grid
    """What a GPU measured beside what a phantom device read of the same cells."""
    claims: Grid
    """Published numbers and ours."""
    misses: Grid
    """What was ruled out, and the claims that miss for another reason."""
    figures: list[tuple[str, str]]
    """Title and data URI."""
    simulated: bool
    findings: Grid
    """Cells that did not pass, and what was seen of them."""
    refusals: Grid
    """Combinations that the library refuses."""
    defects: Grid
    """Planted defects, with the cells that caught them."""
    cells: Grid
    gates: list[GateView]
    environments: Grid
    command: str


def section(results: Results, figures: Path) -> Section:
    """The part of the page on one experiment; `figures` holds its drawn SVG files."""
    beside = twin_grid(results)
    results = measured_part(results)
    named = series(results.cells)
    views = (gate_view(named[key], m) for key, m in results.measurements.items())
    simulated, found = is_simulated(results), evidence([results])
    return Section(
        name=results.name,
        question=results.question,
        source=results.source,
        progress=counted_outcomes(results),
        summary=claim_summary(found) if simulated else summary(results),
        verdicts=_verdicts(results),
        findings=finding_grid(results),
        refusals=refusal_grid(results),
        defects=defect_grid(results),
        twins=beside,
        claims=claim_grid(found),
        misses=miss_grid(found),
        figures=_drawn(results, figures),
        simulated=simulated,
        cells=simulated_grid(results) if simulated else cell_grid(results),
        gates=[view for view in views if view],
        environments=environment_grid(results),
        command=f"snakemake --cores all --config experiments={results.name}",
    )


def _verdicts(results: Results) -> Grid:
    """Methods side by side; empty where nothing is timed."""
    if not is_timed(results):
        return Grid([], [])
    return ratio_grid(results) if is_repeated(results) else verdict_grid(results)


def _drawn(results: Results, folder: Path) -> list[tuple[str, str]]:
    files = [(name, folder / f"{name}.svg") for name in results.figures]
    return [(name.replace("_", " "), _data_uri(file)) for name, file in files if file.is_file()]


def _data_uri(file: Path) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(file.read_bytes()).decode()


def page(all_results: Sequence[Results]) -> str:
    """The whole report: HTML that loads nothing from anywhere else."""
    sections = [section(results, paths.figures(results.name)) for results in all_results]
    return render("report.html", sections=sections, good=GOOD, bad=BAD)
