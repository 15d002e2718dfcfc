"""Dataset Decomposition: the published plan made again, and what a step costs by the length of its sequences."""

from __future__ import annotations

from harness.cells.units import bytes_text, length_text, percent_text, ratio_text
from harness.judge.claims import Evidence, Verdict, evidence
from harness.judge.decomposition import EXPERIMENT, cost_over, mean_length, planned, step_seconds
from harness.judge.decomposition import evidence as derived
from harness.present.grids.base import MISSING, Grid
from harness.present.grids.claims import claim_grid
from harness.present.pages.base import Committed
from harness.present.render import render
from harness.records.table import Results


def page(c: Committed) -> str:
    """What was published, what follows from it, and our forecast of each length."""
    kept = next((k for k in c.forecasts if k.results.name == EXPERIMENT), None)
    found = [] if kept is None else derived(kept.results)
    return render(
        "decomposition.md",
        image="" if kept is None else kept.shown(),
        steps=Grid([], []) if kept is None else step_grid(kept.results),
        held=sum(e.verdict is Verdict.REPRODUCED for e in found),
        derived=_without(claim_grid(found), "limit"),
        wikipedia=f"{mean_length('Wikipedia'):,.0f}",
        dclm=f"{mean_length('DCLM-Baseline subset'):,.0f}",
    )


def step_grid(results: Results) -> Grid:
    """A row for each length: the published plan, and speed, time and bytes of a step."""
    plan, seconds = planned(), step_seconds(results)
    of_cell = {key: cell.train.seqlen for key, cell in results.cells.items()}
    speeds = {of_cell[e.key]: e for e in evidence([results]) if e.quantity == "tokens_per_second"}
    allocated = {
        of_cell[key]: m.simulated.peak_bytes
        for key, m in results.measurements.items()
        if m.simulated
    }
    headings = ["tokens of a sequence", "steps of a cycle", "published", "predicted", "error"]
    return Grid(
        [*headings, "the run's time, at this length alone = 1", "allocated on a GPU"],
        [
            [
                length_text(length),
                f"{steps:,}",
                *_speeds(speeds.get(length)),
                MISSING if (cost := cost_over(seconds, length)) is None else ratio_text(cost),
                bytes_text(allocated[length]) if length in allocated else MISSING,
            ]
            for length, steps in plan.steps.items()
        ],
    )


def _speeds(e: Evidence | None) -> list[str]:
    """Tokens per second of all GPUs, published and predicted, and the error."""
    if e is None:
        return [MISSING] * 3
    ours = MISSING if e.predicted is None else f"{e.predicted:,.0f}/s"
    return [
        f"{e.published:,.0f}/s",
        ours,
        MISSING if e.error is None else percent_text(e.error),
    ]


def _without(grid: Grid, heading: str) -> Grid:
    kept = [i for i, name in enumerate(grid.headings) if name != heading]
    return Grid([grid.headings[i] for i in kept], [[row[i] for i in kept] for row in grid.rows])


def summary(_: Committed) -> list[tuple[str, str]]:
    """Nothing: the README has no room for it."""
    return []
