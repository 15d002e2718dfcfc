"""Memory and time, measured on real devices."""

from __future__ import annotations

from harness.cells.units import length_text, ratio_text
from harness.judge.claims import OURS
from harness.present.grids.base import MISSING, ratio_or_missing, rows_of
from harness.present.grids.measured import (
    headline_grid,
    headline_title,
    ratio_grid,
    standings,
)
from harness.present.grids.measured import (
    summary as in_words,
)
from harness.present.grids.origins import origin
from harness.present.kinds import is_repeated
from harness.present.pages.base import Committed, Kept
from harness.present.render import render
from harness.records.table import Results, repeated_duels


def page(c: Committed) -> str:
    """Every measured experiment: its figure, its methods side by side, and who is better how often."""
    sections = [_section(k, results) for k, results in c.measured]
    return render("measured.md", sections=sections, gpus=c.on_gpus)


def _section(k: Kept, results: Results) -> dict[str, object]:
    repeated = is_repeated(results)
    return {
        "results": results,
        "repeated": repeated,
        "title": "" if repeated else headline_title(results),
        "image": k.shown(),
        "origin": origin(results),
        "grid": ratio_grid(results) if repeated else headline_grid(results),
        "words": "" if repeated else in_words(results),
    }


def summary(c: Committed) -> list[tuple[str, str]]:
    """`alst` beside other methods on each hardware, methods in turn with `alst`, and what a GPU measured."""
    by_hardware: dict[str, list[Results]] = {}
    for k, results in c.measured:
        if not is_repeated(results):
            by_hardware.setdefault(k.folder.parent.name, []).append(results)
    rows = [
        (f"`{OURS}` over others on {hardware}: peak memory, time per token", _medians(found))
        for hardware, found in by_hardware.items()
    ]
    rows += [_turns(k, results) for k, results in c.measured if is_repeated(results)]
    return [*rows, ("cells measured on a GPU", str(c.on_gpus or "none yet"))]


def _medians(found: list[Results]) -> str:
    """Median ratios by method, over the pairs of cells that differ in the method only."""
    ratios = [(s.peer, ratio_text(s.peak), ratio_or_missing(s.time)) for s in standings(found)]
    return "; ".join(f"`{peer}` {peak}, {time}" for peer, peak, time in ratios) or MISSING


def _turns(k: Kept, results: Results) -> tuple[str, str]:
    """Median ratios of the longest sequence that has the most repetitions."""
    rows = repeated_duels(results, OURS)
    most = rows[rows["repetitions"] == rows["repetitions"].max()]
    longest = most[most["seqlen"] == most["seqlen"].max()]
    ratios = [
        f"`{row['series_ours'].replace('=True', '')}` {ratio_text(row['peak'])}, {ratio_text(row['time'])}"
        for row in rows_of(longest)
    ]
    length = length_text(int(most["seqlen"].max()))
    where = f"at {length} tokens on {k.folder.parent.name}"
    return f"others over `{OURS}` {where}: peak memory, time per token", "; ".join(ratios)
