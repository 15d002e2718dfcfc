"""Published numbers with our evidence for them and a verdict. A function of records; imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from enum import StrEnum
from typing import Literal

from pydantic import Field

from alst_impl.config import Frozen
from alst_impl.methods.base import step_samples
from harness.cells.cell import Cell
from harness.cells.experiment import Claim, Quantity
from harness.cells.prediction import Limit
from harness.records.published import look_up
from harness.records.record import Measurement, Outcome
from harness.records.table import Results

TOLERANCE = 0.10
"""Largest relative error of a reproduced number."""

WITHIN = (0.03, 0.05, TOLERANCE)
"""Relative errors for which numbers are counted."""

OURS = "alst"
"""Our own implementation of ALST: its numbers stand beside published ones and reproduce none."""

Derived = Literal["count", "ratio"]
"""Published quantities that follow from other published numbers, or from several cells: no claim of one cell has them."""

UNITS: dict[Quantity, str] = {
    "longest_tokens": "tokens",
    "longest_ratio": "x",
    "step_seconds": "s",
    "speedup": "x",
    "tokens_per_second": "tokens/s",
    "device_bytes": "GiB",
    "allocated_bytes": "GiB",
}
"""Units of the published tables. Their memory readings in GB are GiB."""


class Verdict(StrEnum):
    """Verdict of our evidence on a published number."""

    REPRODUCED = "reproduced"
    LONGER = "longer"
    REFUTED = "refuted"
    NOT_MEASURED = "not_measured"


class Evidence(Frozen):
    """One published number and our number for it."""

    id: str
    source: str
    published: float
    unit: str
    predicted: float | None
    """Our forecast, by a phantom device or by playing a schedule."""
    measured: float | None
    """Our measurement on the hardware of the claim."""
    error: float | None
    """Our number divided by the published one, minus one; measured if there is a measurement, else predicted."""
    used_for_fit: bool
    """Whether constants were fitted to this number. Then it is no evidence."""
    verdict: Verdict
    outcome: Outcome | None
    """Outcome of the cell at its own length; None without a record."""
    key: str = Field(exclude=True)
    """Key of the cell."""
    method: str = Field(exclude=True)
    """Method of the cell."""
    place: str = Field(exclude=True)
    """Table, row and column of the published number; two methods may stand beside one number."""
    quantity: Quantity | Derived = Field(exclude=True)
    limit: Limit | None = Field(exclude=True)
    """The limit of the cell's longest sequence."""
    ruled_out: str = Field(exclude=True)
    """If our number misses: the causes that were ruled out."""

    @property
    def is_ours(self) -> bool:
        """Whether it is our own method that stands beside the published number."""
        return self.method == OURS

    @property
    def infeasible(self) -> bool:
        """Whether this is the time or the bytes of a step that does not fit. A longest sequence always fits."""
        return self.outcome is Outcome.DOES_NOT_FIT and not self.quantity.startswith("longest")

    @property
    def missed(self) -> bool:
        """Whether this is evidence with an error above `TOLERANCE`."""
        return not self.used_for_fit and self.error is not None and abs(self.error) > TOLERANCE


class Counts(Frozen):
    """How many published numbers there are of each verdict."""

    within: dict[float, int]
    """By each error of `WITHIN`: numbers whose absolute error is not above it."""
    longer: int
    refuted: int
    absent: int
    """Numbers without a record."""
    fitted: int
    """Numbers that a constant was fitted on; they count nowhere else."""

    @property
    def judged(self) -> int:
        """Numbers that have a verdict: reproduced, longer or refuted."""
        return self.within[TOLERANCE] + self.longer + self.refuted


def count(found: Iterable[Evidence]) -> Counts:
    """Count `found` by verdict. A length that is more than `TOLERANCE` longer is `longer`, not refuted."""
    found = list(found)
    honest = [e for e in found if not e.used_for_fit]
    verdicts = Counter(e.verdict for e in honest)
    errors = [abs(e.error) for e in honest if e.error is not None]
    return Counts(
        within={bound: sum(error <= bound for error in errors) for bound in WITHIN},
        longer=verdicts[Verdict.LONGER],
        refuted=verdicts[Verdict.REFUTED],
        absent=verdicts[Verdict.NOT_MEASURED],
        fitted=len(found) - len(honest),
    )


def judge(quantity: Quantity | Derived, published: float, ours: float | None) -> Verdict:
    """The verdict. Only lengths and their ratios can be `longer`; a time or a memory that is far off is refuted."""
    if ours is None:
        return Verdict.NOT_MEASURED
    error = ours / published - 1
    if abs(error) <= TOLERANCE:
        return Verdict.REPRODUCED
    return Verdict.LONGER if quantity.startswith("longest") and error > 0 else Verdict.REFUTED


def predicted(
    quantity: Quantity, m: Measurement | None, over: Measurement | None = None
) -> float | None:
    """The prediction of record `m` in the unit of `UNITS`; None if it has none.

    A ratio is the length of `m` divided by that of `over`.
    """
    if m is None or m.simulated is None or m.simulated.prediction is None:
        return None
    if quantity == "longest_tokens":
        return float(m.simulated.search.longest_tokens) if m.simulated.search else None
    if quantity == "longest_ratio":
        longest, base = (predicted("longest_tokens", each) for each in (m, over))
        return longest / base if longest is not None and base else None
    seconds = m.simulated.prediction.step_seconds_modelled
    if quantity == "step_seconds":
        return seconds
    if quantity == "tokens_per_second":
        return None if seconds is None else tokens_of_step(m.cell) / seconds
    if quantity == "allocated_bytes":
        return m.simulated.prediction.allocated_bytes / 2**30
    return m.simulated.prediction.total_bytes / 2**30


def tokens_of_step(cell: Cell) -> int:
    """Number of tokens of one step over all ranks."""
    train, tp = cell.train, cell.simulation.tp if cell.simulation else 1
    return step_samples(train) * train.seqlen // tp


def evidence(all_results: Iterable[Results]) -> list[Evidence]:
    """Evidence for every claim of every experiment, in order."""
    found: list[Evidence] = []
    for results in all_results:
        measured = {c.id: results.measurements.get(key) for key, c in results.claims}
        for key, claim in results.claims:
            over = None if claim.over is None else measured.get(claim.over)
            method = results.cells[key].train.method.name
            found += _of_claim(key, method, claim, results.measurements.get(key), over)
    return found


def _of_claim(
    key: str, method: str, claim: Claim, m: Measurement | None, over: Measurement | None
) -> Iterator[Evidence]:
    search = m.simulated.search if m and m.simulated else None
    for quantity, column in claim.columns.items():
        number = look_up(claim.table, claim.row, column)
        ours = predicted(quantity, m, over)
        yield Evidence(
            id=f"{claim.id}-{quantity}",
            source=number.source,
            published=number.value,
            unit=UNITS[quantity],
            predicted=ours,
            measured=None,
            error=None if ours is None else ours / number.value - 1,
            used_for_fit=quantity in claim.used_for_fit,
            verdict=judge(quantity, number.value, ours),
            outcome=m.outcome if m else None,
            key=key,
            method=method,
            place=f"{claim.table} {sorted(claim.row.items())} {column}",
            quantity=quantity,
            limit=search.limit if search else None,
            ruled_out=claim.ruled_out.get(quantity, ""),
        )
