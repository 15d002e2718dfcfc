"""The correctness matrix: its rows are the committed ones, and parts of it pass."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from harness.cells import grid, paths
from harness.cells.experiment import Experiment, load_experiment
from harness.commands.matrix import Work, chosen, made_rows, run
from harness.gate.verdict import judgement
from harness.records.record import Outcome

ROOT = Path(__file__).parents[1]
EXPERIMENT = load_experiment(ROOT / paths.experiment("correctness"))
CHUNKS = 6
"""Number of tests that the covering subset is split into. Each prepares the truths of its cells in one process."""


@pytest.fixture
def experiment() -> Experiment:
    """The committed matrix."""
    return EXPERIMENT


def test_no_cell_enters_or_leaves_the_matrix_silently(experiment: Experiment) -> None:
    """Factors, rules and refusals generate exactly the committed rows (`alst matrix --write`)."""
    assert experiment.matrix
    made = grid.text_of(made_rows(experiment, experiment.matrix))
    committed = (ROOT / paths.experiment("correctness")).with_suffix(".csv").read_text()
    assert made == committed


def test_all_pairs_and_the_named_triples_are_covered(experiment: Experiment) -> None:
    """Every pair and named triple of levels is in a row, unless a rule refuses it."""
    assert experiment.matrix
    rows = [row.levels for row, _ in experiment.matrix_cells()]
    assert len(rows) >= 150
    assert not experiment.matrix.missing(rows)


def test_levels_that_never_run_are_refused(experiment: Experiment) -> None:
    """Every level of every factor is in a row that runs, or is refused by a rule."""
    assert experiment.matrix
    ran = {item for row, _ in experiment.matrix_cells() for item in row.levels.items()}
    alone = {(f, level) for rule in experiment.matrix.refused for f, level in _single(rule)}
    every = {(f, level) for f, levels in experiment.matrix.factors.items() for level in levels}
    assert every - ran == alone


def _single(rule: grid.Rule) -> list[tuple[str, str]]:
    """The levels of a rule with one factor."""
    ((factor, levels), *more) = rule.when.items()
    return [] if more else [(factor, level) for level in levels]


def passes(experiment: Experiment, work: list[Work], results: Path) -> None:
    """Fails unless every gradient and the first update are right."""
    done = list(run(Console(quiet=True), experiment, work, 1, force=True, results=results))
    assert len(done) == len(work)
    wrong = [f"{row.label}: {judgement(m)}" for row, m in done if m.outcome is not Outcome.OK]
    assert not wrong, "\n".join(wrong)


def few(work: list[Work]) -> list[Work]:
    """As few rows of `work` as hold every level that it has, by choosing the row with most new ones."""
    left = {level for row, _ in work for level in row.levels.items()}
    found = []
    while left:
        best = max(work, key=lambda each: len(left & set(each[0].levels.items())))
        left -= set(best[0].levels.items())
        found.append(best)
    return found


@pytest.mark.parametrize("half", range(2))
def test_every_level_passes(experiment: Experiment, shared: Path, half: int) -> None:
    """Each level of each factor, in few rows."""
    work = few(chosen(experiment, "covering"))
    assert len(work) <= 12
    passes(experiment, work[half::2], shared)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_the_covering_part_passes(experiment: Experiment, shared: Path, chunk: int) -> None:
    """All pairs of levels of the factors in `part`."""
    passes(experiment, chosen(experiment, "covering")[chunk::CHUNKS], shared)
