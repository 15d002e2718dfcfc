"""What kind of results an experiment has: predicted, compared, repeated or measured; and which question they answer."""

from __future__ import annotations

from typing import Literal

from harness.cells.experiment import Quantity
from harness.records.table import Results

Question = Literal["fits", "same", "costs", "others"]
"""What a reader asks: what fits, is it the same training, what does it cost, who else?"""

OF_ALST = "alst_"
"""How tables of numbers that the authors of ALST published begin."""


def is_simulated(results: Results) -> bool:
    """Whether no device runs the cells: there are no gradients to compare and no steps to time."""
    return all(cell.traits.forecast for cell in results.cells.values())


def is_compared(results: Results) -> bool:
    """Whether gradients are compared and nothing else is measured."""
    return not is_simulated(results) and not any(cell.steps for cell in results.cells.values())


def is_repeated(results: Results) -> bool:
    """Whether methods take turns several times, so that their ratios have a spread."""
    return any(cell.repetition for cell in results.cells.values())


def is_timed(results: Results) -> bool:
    """Whether memory and step times are measured."""
    return not is_simulated(results) and not is_compared(results)


def question_of(results: Results) -> Question:
    """The question that an experiment answers, by what its cells give and whose numbers it stands for."""
    if is_compared(results) or any(cell.followed for cell in results.cells.values()):
        return "same"
    claims = [claim for _, claim in results.claims]
    if is_timed(results) or (claims and all({*claim.columns} <= TIMES for claim in claims)):
        return "costs"
    others = claims and not any(claim.table.startswith(OF_ALST) for claim in claims)
    return "others" if others else "fits"


TIMES: set[Quantity] = {"step_seconds", "tokens_per_second"}
