"""`alst claims`, `alst compare`: published numbers beside ours, and what moved between two sets of records."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from harness import paths
from harness.cell import Cell, Experiment, load_experiment
from harness.commands.run import DEFAULT_RESULTS, record_path, truth_cache

if TYPE_CHECKING:
    from harness.claims import Evidence
    from harness.record import Measurement

Folder = Annotated[Path, typer.Argument(help="A folder with records, at any depth.")]


def claims(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
    stored: Annotated[
        bool, typer.Option("--stored", help="Judge the records there are; simulate nothing.")
    ] = False,
    results: Annotated[
        Path, typer.Option("--results", help="Folder of records.")
    ] = DEFAULT_RESULTS,
) -> int:
    """Judge every published number by our evidence, and compare with results/reference/.

    Simulates what has no record or one of other code. Exit code 1 where a simulated number got worse
    than its committed record; 2 where there is no number to judge or no committed record to compare with.

    Example: alst claims --json
    """
    from harness.claims import Verdict, evidence
    from harness.compare import changes

    experiments = [load_experiment(path) for path in paths.experiments()]
    simulated = [(e, cells) for e in experiments if (cells := _simulated(e))]
    if not stored:
        _require_reference(simulated)  # before minutes of work
        bring_up_to_date(simulated, results)
    from harness.table import fresh

    all_results = [
        fresh(paths.experiment(e.name), results / "cells" / e.name) for e, _ in simulated
    ]
    found = evidence(all_results)
    if all(each.verdict is Verdict.NOT_MEASURED for each in found):
        raise ValueError(_nothing(len(found), results))
    if as_json:
        print(json.dumps([each.model_dump(mode="json") for each in found], indent=1))
    else:
        _print_claims(found)
    _require_reference(simulated)
    moved = [
        change
        for each in all_results
        for change in changes(reference_records(each.name), each.measurements)
    ]
    for change in moved:
        print(f"alst: {change}", file=sys.stderr)
    return 1 if any(change.worse for change in moved) else 0


def _require_reference(simulated: list[tuple[Experiment, dict[str, Cell]]]) -> None:
    """Raise `ValueError` if no cell has a committed record: nothing would say whether a number got worse."""
    if not any(set(reference_records(e.name)) & set(cells) for e, cells in simulated):
        raise ValueError(
            f"{paths.REFERENCE} holds none of these cells, so nothing says whether a number got worse; "
            "run it in a checkout with committed records, or make them with `alst reference NAME`"
        )


def _nothing(count: int, results: Path) -> str:
    """Why there is no number to judge, and the way out."""
    if not count:
        return (
            f"no published number to judge: no experiment in {paths.EXPERIMENTS}/ has a claim; run it in a "
            "checkout"
        )
    return (
        f"none of {count} published numbers can be judged: {results}/cells holds no record for them; run it "
        "without --stored"
    )


def compare(before: Folder, after: Folder) -> int:
    """Compare two folders of records: bytes, longest lengths, outcomes. Exit code 1 if one got worse.

    Example: alst compare results/reference results/cells
    """
    from harness.compare import changes, load

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
    from harness import record

    files = sorted(paths.REFERENCE.glob(f"*/{name}/*.json"))
    return {file.stem: record.read(file) for file in files}


def _simulated(experiment: Experiment) -> dict[str, Cell]:
    """Its simulated cells, without the twins of measured ones: `alst confirm` is for those."""
    return {key: cell for key, cell in simulated_cells(experiment).items() if not is_twin(cell)}


def simulated_cells(experiment: Experiment) -> dict[str, Cell]:
    """The cells of world `sim` by key."""
    return {key: cell for key, cell in experiment.cells().items() if cell.world == "sim"}


def is_twin(cell: Cell) -> bool:
    """Whether a simulated cell stands beside a measured one."""
    return cell.simulation is not None and cell.simulation.resident


def bring_up_to_date(simulated: list[tuple[Experiment, dict[str, Cell]]], results: Path) -> None:
    """Simulate all cells without a record of this code, as many at a time as there are cores."""
    from harness.run import measure_to

    jobs = [
        (record_path(results, experiment, key), cell)
        for experiment, cells in simulated
        for key, cell in cells.items()
    ]
    console = Console(stderr=True)
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task("simulating", total=len(jobs))

        def one(job: tuple[Path, Cell]) -> None:
            measure_to(*job, truth_cache(results), force=False)
            progress.advance(task)

        list(pool.map(one, jobs))


def _print_claims(found: Iterable[Evidence]) -> None:
    from harness.claims import Verdict
    from harness.report import claim_grid, claim_summary

    colours = {Verdict.REPRODUCED: "green", Verdict.LONGER: "cyan", Verdict.REFUTED: "red"}
    found = list(found)
    grid = claim_grid(found)
    table = Table()
    for i, heading in enumerate(grid.headings[:-1]):  # sources are in the report and in --json
        table.add_column(heading, justify="right" if 0 < i < 4 else "left", no_wrap=True)
    for each, row in zip(found, grid.rows, strict=True):
        table.add_row(*row[:-1], style=colours.get(each.verdict))
    console = Console()
    console.width = max(console.width, 110)  # a narrower terminal wraps rather than hides
    console.print(table)
    console.print(claim_summary(found), highlight=False)
