"""The index of `results/reference/`: its pages, its experiments, and what the records were made with."""

from __future__ import annotations

from harness.cells import paths
from harness.present.grids.base import Grid
from harness.present.grids.origins import environment_grid, version_grid
from harness.present.pages.base import Committed, Kept
from harness.present.render import render
from harness.records.table import counted_outcomes

HEADINGS = ["experiment", "question", "records", "commits", "dates"]


def page(c: Committed) -> str:
    """A row per experiment, and a row per set of versions."""
    experiments = Grid(HEADINGS, [_row(k) for k in c.kept if k.results.measurements])
    absent = [k.results.name for k in c.forecasts if not k.results.measurements]
    return render(
        "records.md", experiments=experiments, absent=absent, versions=version_grid(c.recorded)
    )


def _row(k: Kept) -> list[str]:
    origins = environment_grid(k.results).rows
    commits, dates = (", ".join(sorted({row[i] for row in origins})) for i in (0, 4))
    link = f"[{k.results.name}]({k.folder.relative_to(paths.REFERENCE)})"
    return [link, k.results.question, counted_outcomes(k.results), commits, dates]


def summary(c: Committed) -> list[tuple[str, str]]:
    """How many records there are, and the versions that made most of them."""
    rows = version_grid(c.recorded).rows
    total = sum(int(row[2]) for row in rows)
    if not rows:
        return [("records", "none yet")]
    python, libraries, most = rows[0]
    return [("records", f"{total}, of which {most} with Python {python}, {libraries}")]
