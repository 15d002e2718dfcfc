"""Published numbers beside ours."""

from __future__ import annotations

from harness.cells.units import ratio_text
from harness.judge.claims import TOLERANCE, Evidence, Verdict, count
from harness.present.grids.base import Grid
from harness.present.grids.claims import (
    QUANTITIES,
    claim_grid,
    count_grid,
    errors_text,
    length_grid,
    misses,
    of_authors,
    ours_summary,
)
from harness.present.pages.base import Committed
from harness.present.render import render


def page(c: Committed) -> str:
    """How many numbers hold, each number beside ours, and what was ruled out where one does not."""
    judged = [e for e in c.evidence if e.verdict is not Verdict.NOT_MEASURED]
    reasons = [(reason, errors_text(found)) for reason, found in misses(judged).items()]
    return render(
        "claims.md",
        tolerance=f"{TOLERANCE:.0%}",
        counts=count_grid({name: of_authors(found) for name, found in c.claims.items()}),
        ours=ours_summary(judged),
        lengths=length_grid(judged),
        others=_others(judged),
        reasons=reasons,
        images=[k.shown() for k in c.forecasts if not k.is_search_alone],
        on_gpus=c.on_gpus,
    )


def _others(judged: list[Evidence]) -> list[tuple[str, Grid]]:
    """Heading and table of each quantity that is no length."""
    tables = []
    for quantity, heading in QUANTITIES.items():
        grid = claim_grid(e for e in judged if e.quantity == quantity)
        columns = [i for i, name in enumerate(grid.headings) if name != "limit"]
        rows = [[row[i] for i in columns] for row in grid.rows]
        if rows:
            tables.append((heading, Grid([grid.headings[i] for i in columns], rows)))
    return tables


def summary(c: Committed) -> list[tuple[str, str]]:
    """How many numbers were judged, how many hold, and where our own method stands."""
    counts = count(of_authors(c.evidence))
    total = counts.judged + counts.absent + counts.fitted
    rows = [
        (
            "published numbers that were judged",
            f"{counts.judged} of {total}; {counts.absent} have no record, {counts.fitted} served to fit a constant",
        ),
        (
            f"predicted within {', '.join(f'{bound:.0%}' for bound in counts.within)}",
            f"{', '.join(map(str, counts.within.values()))} of {counts.judged}; others: "
            f"{counts.longer} longer than published, {counts.refuted} refuted",
        ),
    ]
    ratios = [1 + e.error for e in c.evidence if e.is_ours and e.error is not None]
    if ratios:
        spread = f"{ratio_text(min(ratios))} to {ratio_text(max(ratios))}"
        rows.append(
            ("our `alst` over published lengths of ALST", f"{spread}, {len(ratios)} lengths")
        )
    return rows
