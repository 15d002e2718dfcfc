"""`alst matrix`: runs every cell of a correctness matrix, and lists refused rows with their reasons."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from harness.cells import grid, paths
from harness.cells.cell import Cell
from harness.cells.experiment import Experiment, load_experiment, read_experiment
from harness.cells.grid import Matrix, Row
from harness.commands.run import DEFAULT_RESULTS, record_path, truth_cache
from harness.gate.verdict import exceptions, judgement, outcome_line
from harness.records import families, record
from harness.records.record import Measurement, Outcome
from harness.run.measure import final, measure
from harness.run.ranks import truths

Work = tuple[Row, Cell]
CORRECTNESS = paths.experiment("correctness")


def matrix(
    experiment: Annotated[
        Path, typer.Argument(help="An experiment with a matrix, or its name.")
    ] = CORRECTNESS,
    part: Annotated[
        str,
        typer.Option(
            metavar="I/N",
            help="Every Nth cell from the Ith, or 'covering': the cells that tests run.",
        ),
    ] = "1/1",
    jobs: Annotated[
        int, typer.Option(min=1, show_default="one per core", help="Cells run at the same time.")
    ] = len(os.sched_getaffinity(0)),
    force: Annotated[
        bool, typer.Option("--force", help="Run cells that have a record again.")
    ] = False,
    write: Annotated[
        bool,
        typer.Option(
            "--write",
            help="Run nothing; write the rows again, or the table of outcomes of a matrix of every combination.",
        ),
    ] = False,
    results: Annotated[
        Path, typer.Option("--results", help="Folder of records and caches.")
    ] = DEFAULT_RESULTS,
) -> int:
    """Compare every gradient and the first update of each cell with those of the stock model.

    Records are kept: an interrupted run resumes, and a cell runs again after the code has changed.
    Exit code 0: every cell passed, or was refused with a reason; 1: a cell failed; 2: cannot be run.

    Example: alst matrix --part 1/4; alst matrix families
    """
    experiment = _named(experiment)
    if write:
        return _write(experiment, results)
    loaded = load_experiment(experiment)
    if loaded.matrix is None:
        raise ValueError(f"{experiment} has no matrix; use 'alst run {experiment}'")
    begin = time.monotonic()
    refused = loaded.refusals()
    console = Console()
    done = list(run(console, loaded, chosen(loaded, part), jobs, force, results))
    _report(console, done, refused, time.monotonic() - begin)
    return 0 if all(m.outcome in (Outcome.OK, Outcome.REFUSED) for _, m in done) else 1


def _named(experiment: Path) -> Path:
    """The YAML of an experiment that is given by name: in a folder of its own, or beside the others."""
    if experiment.suffix or len(experiment.parts) > 1:
        return experiment
    own = paths.EXPERIMENTS / experiment / f"{experiment}.yaml"
    return own if paths.located(own).exists() else paths.experiment(str(experiment))


def _write(experiment: Path, results: Path) -> int:
    """Make the rows and write them beside the experiment, or the table of outcomes of every combination."""
    loaded = read_experiment(experiment)
    if loaded.matrix is None:
        raise ValueError(f"{experiment} has no matrix: there are no rows to write")
    if loaded.matrix.every:
        return _write_outcomes(load_experiment(experiment), results)
    path = experiment.with_suffix(".csv")
    record.write_text(path, grid.text_of(made_rows(loaded, loaded.matrix)))
    print(path)
    return 0


def _write_outcomes(experiment: Experiment, results: Path) -> int:
    """Write the table of outcomes from the records in `results`, which must be complete."""
    ran = {str(row.levels): cell for row, cell in experiment.matrix_cells()}
    found = []
    for row in experiment.rows:
        cell = ran.get(str(row.levels))
        measured = None if cell is None else final(record_path(results, experiment, cell.key), cell)
        if cell is not None and measured is None:
            raise ValueError(f"{row.label} has no record of this code; run 'alst matrix' first")
        said = (outcome_line(measured), exceptions(measured)) if measured else ()
        found.append(families.family(row, measured, *said))
    record.write_text(families.PATH, families.text_of(found))
    print(families.PATH)
    return 0


def made_rows(experiment: Experiment, made: Matrix) -> list[Row]:
    """Rows of the file beside the experiment: rows that run, then rows that are refused."""
    return [Row(levels=levels, refused=None) for levels in made.rows()] + experiment.refusals()


def chosen(experiment: Experiment, part: str) -> list[Work]:
    """The cells of `part`, at least one. Raises `ValueError` if `part` is not valid."""
    work = experiment.matrix_cells()
    assert experiment.matrix is not None
    if part == "covering":
        # Among rows that cover the same pairs, the row with the fewest ranks is the fastest.
        cheap = sorted(work, key=lambda pair: pair[1].num_processes)
        covering = experiment.matrix.covering([row.levels for row, _ in cheap])
        return [(row, cell) for row, cell in work if row.levels in covering]
    numbers = re.fullmatch(r"(\d+)/(\d+)", part)
    index, count = map(int, numbers.groups()) if numbers else (0, 0)
    if not 1 <= index <= count:
        raise ValueError(f"--part {part}: write I/N with 1 <= I <= N, such as 1/4, or 'covering'")
    if index > len(work):
        raise ValueError(
            f"--part {part}: {experiment.name} has {len(work)} cells, so nothing is left for part {index}; "
            f"use at most {len(work)} parts"
        )
    return work[index - 1 :: count]


def run(
    console: Console,
    experiment: Experiment,
    work: Sequence[Work],
    jobs: int,
    force: bool,
    results: Path,
) -> Iterator[tuple[Row, Measurement]]:
    """Yield each row with its record, kept or measured now, when it is ready. Print a line for each cell."""
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    with (
        Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress,
        ThreadPoolExecutor(jobs) as pool,
    ):
        task = progress.add_task("cells", total=len(work))
        try:
            for row, measurement in _ended(pool, experiment, work, force, results):
                progress.advance(task)
                fine = measurement.outcome in (Outcome.OK, Outcome.REFUSED)
                style = None if fine else "red"
                line = f"{row.label}\n    {judgement(measurement)}"
                console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)
                yield row, measurement
        finally:
            pool.shutdown(cancel_futures=True)


def _ended(
    pool: ThreadPoolExecutor,
    experiment: Experiment,
    work: Sequence[Work],
    force: bool,
    results: Path,
) -> Iterator[tuple[Row, Measurement]]:
    left: list[Work] = []
    for row, cell in work:
        kept = None if force else final(record_path(results, experiment, cell.key), cell)
        if kept is None:
            left.append((row, cell))
        else:
            yield row, kept
    running: dict[Future[Measurement], Row] = {}
    waiting = iter(left)
    # Truths are computed in batches, while the cells of earlier batches run.
    for some in truths([cell for _, cell in left], truth_cache(results)):
        for truth, (row, cell) in zip(some, waiting, strict=False):
            path = record_path(results, experiment, cell.key)
            running[pool.submit(_measure, path, cell, truth_cache(results), truth)] = row
        for future in [future for future in running if future.done()]:
            yield running.pop(future), future.result()
    for future in as_completed(running):
        yield running[future], future.result()


def _measure(path: Path, cell: Cell, cache: Path, truth: dict[str, Any] | None) -> Measurement:
    measurement = measure(cell, cache, truth=truth)
    record.write(path, measurement)
    return measurement


def _report(
    console: Console, done: list[tuple[Row, Measurement]], refused: list[Row], seconds: float
) -> None:
    """Print the number of cells of each failure, and how many passed, failed and were refused."""
    counts = Counter(m.outcome for _, m in done)
    for outcome, count in sorted(counts.items()):
        if outcome is not Outcome.OK:
            console.print(f"{count} {outcome}")
    passed, found = counts[Outcome.OK], counts[Outcome.REFUSED]
    console.print(
        f"{len(done)} cells run: {passed} passed, {len(done) - passed - found} failed; {len(refused) + found} "
        f"refused with their reasons; {seconds:.0f} s"
    )
