"""`alst claims`, `alst compare`: our numbers beside published ones, and changes between two sets of records."""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from harness.cells import paths
from harness.cells.cell import Cell
from harness.cells.experiment import Experiment, load_experiment
from harness.commands.run import DEFAULT_RESULTS, record_path, truth_cache
from harness.commands.tables import show

if TYPE_CHECKING:
    from harness.judge.claims import Evidence
    from harness.records.record import Measurement
    from harness.records.table import Results

Folder = Annotated[Path, typer.Argument(help="A folder with records, at any depth.")]


def claims(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
    run: Annotated[
        bool,
        typer.Option(
            "--run",
            help="First run the cells that have no record of this code; a cell takes up to minutes.",
        ),
    ] = False,
    results: Annotated[
        Path, typer.Option("--results", help="Folder of records.")
    ] = DEFAULT_RESULTS,
) -> int:
    """Judge every published number by our records, and compare fresh records with results/reference/.

    A record in RESULTS takes precedence over a committed one. Without --run nothing is run. Exit code 1: a fresh
    record of this code is worse than its committed one. 2: there is no number to judge.

    Example: alst claims --json
    """
    from harness.judge import decomposition
    from harness.judge.claims import Verdict, evidence
    from harness.judge.compare import changes
    from harness.judge.replays import evidence_of
    from harness.records.replays import committed
    from harness.records.table import fresh
    from harness.run.measure import stale

    experiments = [load_experiment(path) for path in paths.experiments()]
    forecasts = [(e, cells) for e in experiments if (cells := _forecasts(e))]
    if run:
        bring_up_to_date(forecasts, results)
    made, judged = [], []
    for e, cells in forecasts:
        here = fresh(paths.experiment(e.name), results / "cells" / e.name)
        kept = {k: m for k, m in reference_records(e.name).items() if k in cells}
        made.append((kept, here.measurements))
        judged.append(replace(here, measurements=kept | here.measurements))
    of_cells = evidence(judged)
    found = [*of_cells, *evidence_of(committed())]
    if all(each.verdict is Verdict.NOT_MEASURED for each in found):
        raise ValueError(_nothing(len(found), results))
    derived = [
        e for r in judged if r.name == decomposition.EXPERIMENT for e in decomposition.evidence(r)
    ]
    if as_json:
        print(json.dumps([each.model_dump(mode="json") for each in found + derived], indent=1))
    else:
        _print_claims(found, derived)
    _print_gaps(judged, of_cells)
    moved = [
        change
        for kept, here in made
        for change in changes(kept, {k: m for k, m in here.items() if not stale(m)})
    ]
    for change in moved:
        print(f"alst: {change}", file=sys.stderr)
    return 1 if any(change.worse for change in moved) else 0


def _print_gaps(judged: list[Results], found: list[Evidence]) -> None:
    """Say which records are of other code, and which claims have none."""
    from harness.judge.claims import Verdict
    from harness.run.measure import stale

    old = [m.cell.label for each in judged for m in each.measurements.values() if stale(m)]
    if old:
        print(
            f"alst: {len(old)} records are of other code; --run makes them again",
            file=sys.stderr,
        )
    absent = [each.id for each in found if each.verdict is Verdict.NOT_MEASURED]
    if absent:
        print(f"alst: {len(absent)} claims have no record: {', '.join(absent)}", file=sys.stderr)


def _nothing(count: int, results: Path) -> str:
    """Why no number can be judged, and what to do."""
    if not count:
        return (
            f"no published number to judge: no experiment in {paths.EXPERIMENTS}/ has a claim; run it in a "
            "checkout"
        )
    return (
        f"none of {count} published numbers can be judged: neither {results}/cells nor {paths.REFERENCE} holds "
        "a record for them; run it with --run"
    )


def compare(before: Folder, after: Folder) -> int:
    """Compare two folders of records: bytes, longest lengths, outcomes. Exit code 1 if a cell got worse.

    Example: alst compare results/reference results/cells
    """
    from harness.judge.compare import changes, load

    old, new = load(before), load(after)
    if not set(old) & set(new):
        raise ValueError(f"{before} and {after} have no cell in common")
    moved = changes(old, new)
    for change in moved:
        print(change)
    print(f"{len(set(old) & set(new))} cells in both, {len({c.key for c in moved})} moved")
    return 1 if any(change.worse for change in moved) else 0


def reference_records(name: str) -> dict[str, Measurement]:
    """The committed records of experiment `name` by key."""
    from harness.records import record

    files = sorted(paths.REFERENCE.glob(f"*/{name}/*.json"))
    return {file.stem: record.read(file) for file in files}


def _forecasts(experiment: Experiment) -> dict[str, Cell]:
    """Forecast cells of `experiment` without twins of cells that a GPU measures, which `alst confirm` handles."""
    from harness.judge.twins import run_of

    cells = experiment.cells()
    measured = {run_of(cell) for cell in cells.values() if cell.traits.gpus}
    return {
        key: cell
        for key, cell in cells.items()
        if cell.traits.forecast and not (cell.traits.phantom and run_of(cell) in measured)
    }


def simulated_cells(experiment: Experiment) -> dict[str, Cell]:
    """The cells that need no device, by key: forecasts."""
    return {key: cell for key, cell in experiment.cells().items() if cell.traits.forecast}


def bring_up_to_date(simulated: list[tuple[Experiment, dict[str, Cell]]], results: Path) -> None:
    """Run all cells that have no record of this code, neither in `results` nor committed, one per core at a time.

    Shows each cell that was run, and why.
    """
    from harness.run.measure import measure_to

    jobs = [
        (record_path(results, experiment, key), cell, why)
        for experiment, cells in simulated
        for key, cell in cells.items()
        if (why := _why_to_run(experiment, key, results)) is not None
    ]
    console = Console(stderr=True)
    counted = sum(len(cells) for _, cells in simulated)
    console.print(
        f"{counted - len(jobs)} of {counted} cells have a record of this code", highlight=False
    )
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task("running on phantom devices", total=len(jobs))

        def one(job: tuple[Path, Cell, str]) -> None:
            path, cell, why = job
            begin = time.monotonic()
            made, _ = measure_to(path, cell, truth_cache(results), force=False)
            progress.advance(task)
            done = int(progress.tasks[task].completed)
            took = f"{time.monotonic() - begin:.1f} s"
            progress.console.print(
                f"[{done}/{len(jobs)}] {cell.label}: {made.outcome} {took} ({why}), in {path}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )

        list(pool.map(one, jobs))


def _why_to_run(experiment: Experiment, key: str, results: Path) -> str | None:
    """Why a cell has to run: it has no record, or one of other code. None if it has one of this code."""
    from harness.records import record
    from harness.run.measure import stale

    own = record_path(results, experiment, key)
    files = [
        *paths.REFERENCE.glob(f"*/{experiment.name}/{key}.json"),
        *([own] if own.is_file() else []),
    ]
    if not files:
        return "there was no record"
    if all(stale(record.read(file)) for file in files):
        return "its record is of other code"
    return None


def _print_claims(found: list[Evidence], derived: list[Evidence]) -> None:
    from harness.judge.claims import Verdict
    from harness.present.grids.claims import claim_grid, claim_summary, derived_summary

    colours = {Verdict.REPRODUCED: "green", Verdict.LONGER: "cyan", Verdict.REFUTED: "red"}
    shown = found + derived
    grid = claim_grid(shown)
    table = Table()
    for i, heading in enumerate(grid.headings[:-1]):  # the report and --json have the sources
        table.add_column(heading, justify="right" if 0 < i < 4 else "left", no_wrap=True)
    for each, row in zip(shown, grid.rows, strict=True):
        table.add_row(*row[:-1], style=colours.get(each.verdict))
    console = Console()
    show(console, table)
    console.print(claim_summary(found), highlight=False)
    if derived:
        console.print(derived_summary(derived), highlight=False)
