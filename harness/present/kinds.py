"""What kind of results an experiment has: predicted, compared, repeated or measured."""

from __future__ import annotations

from harness.records.table import Results


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
