"""Tables of published numbers beside ours, and how many of them hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from harness.cells.experiment import Quantity
from harness.cells.units import (
    LIMITS,
    bytes_text,
    length_text,
    percent_text,
    ratio_text,
    seconds_text,
)
from harness.judge.claims import OURS, WITHIN, Counts, Evidence, Verdict, count
from harness.present.grids.base import MISSING, Grid
from harness.records.record import Outcome

HEADINGS = ["claim", "published", "predicted", "error", "limit", "verdict", "source"]

QUANTITIES: dict[Quantity, str] = {
    "longest_ratio": "Ratios of longest sequences",
    "step_seconds": "Seconds of a step",
    "speedup": "Times of other systems over those of a system",
    "tokens_per_second": "Tokens per second",
    "device_bytes": "Memory of a GPU, as NVML reads it",
    "allocated_bytes": "Memory that PyTorch's allocator handed out",
}
"""Headings of the tables of numbers that are no lengths."""


def claim_grid(found: Iterable[Evidence], files: Mapping[str, Path] | None = None) -> Grid:
    """A row per published number, marked where a constant was fitted on it or our step does not fit.

    `files` are the records by key.
    """
    found = list(found)
    rows = [
        [
            e.id,
            quantity_text(e, e.published),
            MISSING if _ours(e) is None else quantity_text(e, _ours(e) or 0.0),
            MISSING if e.error is None else percent_text(e.error),
            LIMITS[e.limit] if e.limit and e.quantity == "longest_tokens" else MISSING,
            _verdict(e),
            e.source,
        ]
        for e in found
    ]
    return Grid(HEADINGS, rows, [files.get(e.key) for e in found] if files else [])


def _ours(e: Evidence) -> float | None:
    return e.predicted if e.measured is None else e.measured


def _verdict(e: Evidence) -> str:
    notes = ["fitted"] * e.used_for_fit + [Outcome.DOES_NOT_FIT.value] * e.infeasible
    note = f" ({', '.join(notes)})" if notes else ""
    return ("no record" if e.verdict is Verdict.NOT_MEASURED else e.verdict.value) + note


def quantity_text(of: Evidence, value: float) -> str:
    """A value in the unit of its claim."""
    if of.quantity == "longest_tokens":
        return length_text(value)
    if of.quantity == "count":
        return f"{value:,.0f}"
    if of.quantity in ("longest_ratio", "ratio", "speedup"):
        return ratio_text(value)
    if of.quantity == "tokens_per_second":
        return f"{value:,.0f}/s"
    return seconds_text(value) if of.quantity == "step_seconds" else bytes_text(value * 2**30)


def length_grid(found: Sequence[Evidence]) -> Grid:
    """A row per published length: what is predicted for the run of its authors, and for our method."""
    lengths = [e for e in found if e.quantity == "longest_tokens"]
    ours = {e.place: e for e in lengths if e.is_ours}
    of_authors = {e.place: e for e in lengths if not e.is_ours}
    rows = []
    for place in dict.fromkeys(e.place for e in lengths):
        theirs, mine = of_authors.get(place), ours.get(place)
        row = claim_grid([theirs or ours[place]]).rows[0]
        predicted = row[2:6] if theirs else [MISSING] * 4
        beside = MISSING if mine is None or mine.predicted is None else length_text(mine.predicted)
        label = _label(theirs or ours[place])
        rows.append([label, row[1], *predicted[:3], beside, predicted[3], row[6]])
    headings = ["claim", "published", "predicted", "error", "limit", f"our `{OURS}`"]
    return Grid([*headings, "verdict", "source"], rows)


def _label(e: Evidence) -> str:
    return e.id.removesuffix(f"-{e.quantity}").removesuffix(f"-{e.method}")


def of_authors(found: Iterable[Evidence]) -> list[Evidence]:
    """Numbers that stand for what the authors ran, and not for our own method."""
    return [e for e in found if not e.is_ours]


def count_grid(by_experiment: dict[str, list[Evidence]]) -> Grid:
    """A row per experiment, then all together: numbers of the authors' runs by error and verdict."""
    rows = [[name, *_counts_text(count(found))] for name, found in by_experiment.items()]
    everything = [e for found in by_experiment.values() for e in found]
    if len(rows) > 1:
        rows.append(["all", *_counts_text(count(everything))])
    within = [f"within {bound:.0%}" for bound in WITHIN]
    return Grid(["experiment", "judged", *within, "longer", "refuted", "no record", "fitted"], rows)


def _counts_text(counts: Counts) -> list[str]:
    verdicts = (counts.longer, counts.refuted, counts.absent, counts.fitted)
    return [str(n) for n in (counts.judged, *counts.within.values(), *verdicts)]


def claim_summary(found: Sequence[Evidence]) -> str:
    """How many numbers of the authors' runs hold, and how our method stands beside published lengths."""
    counts = count(of_authors(found))
    within = ", ".join(f"{n} within {bound:.0%}" for bound, n in counts.within.items())
    sentences = [
        f"Of {counts.judged} published numbers: {within} (reproduced), {counts.longer} longer, "
        f"{counts.refuted} refuted."
    ]
    if counts.absent:
        sentences.append(f"{counts.absent} more have no record.")
    if counts.fitted:
        sentences.append(f"{counts.fitted} more were used to fit a constant and are no evidence.")
    return " ".join([*sentences, ours_summary(found)]).strip()


def derived_summary(found: Sequence[Evidence]) -> str:
    """How many numbers hold that follow from other published ones or from several cells; none is among `found` of `claim_summary`."""
    held = sum(e.verdict is Verdict.REPRODUCED for e in found)
    return (
        f"Of {len(found)} more, which follow from others or from several cells: {held} reproduced."
    )


def ours_summary(found: Iterable[Evidence]) -> str:
    """How our own method stands beside published lengths, in a sentence; empty without a record."""
    ratios = [1 + e.error for e in found if e.is_ours and e.error is not None]
    if not ratios:
        return ""
    spread = f"{ratio_text(min(ratios))} to {ratio_text(max(ratios))}"
    return f"Our {OURS} beside {len(ratios)} published lengths of ALST: {spread}."


def misses(found: Iterable[Evidence]) -> dict[str, list[Evidence]]:
    """Claims that are further off than the tolerance, grouped by what was ruled out; the largest group first.

    Claims for which nothing was ruled out come last, under the empty text. Our own method is left out: it
    reproduces nothing, and a longer sequence is its result.
    """
    by_reason: dict[str, list[Evidence]] = {}
    for e in of_authors(found):
        if e.missed:
            by_reason.setdefault(e.ruled_out, []).append(e)
    return dict(sorted(by_reason.items(), key=lambda item: (not item[0], -len(item[1]))))


def miss_grid(found: Iterable[Evidence]) -> Grid:
    """A row per reason: what was ruled out, and the claims with their errors."""
    rows = [[reason or "nothing yet", errors_text(es)] for reason, es in misses(found).items()]
    return Grid(["what was looked at", "claims and their errors"], rows)


def errors_text(found: Iterable[Evidence]) -> str:
    """Claims with their errors, each quantity named once."""
    by_quantity: dict[str, list[str]] = {}
    for e in found:
        assert e.error is not None
        name = e.id.removesuffix(f"-{e.quantity}")
        by_quantity.setdefault(e.quantity, []).append(f"{name} {percent_text(e.error)}")
    return "; ".join(f"{quantity} of {', '.join(each)}" for quantity, each in by_quantity.items())
