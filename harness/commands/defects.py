"""`alst defects`: plant each defect in turn and find the cell of the correctness matrix that catches it."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from harness.cells import paths
from harness.cells.cell import Cell, make_cell
from harness.cells.experiment import load_experiment
from harness.commands.matrix import CORRECTNESS, chosen
from harness.commands.run import DEFAULT_RESULTS, truth_cache
from harness.gate.verdict import ROUNDED
from harness.judge.defects import Catch, Defect, plant, read_defects, text_of
from harness.records import record
from harness.records.record import Outcome
from harness.run.measure import measure
from harness.run.ranks import truths

Trial = tuple[str, Cell, dict[str, Any] | None]
"""Levels of a row, its cell, and the truth for it; None where it has yet to be computed."""


def defects(
    jobs: Annotated[
        int,
        typer.Option(min=1, show_default="one per core", help="Defects tested at the same time."),
    ] = len(os.sched_getaffinity(0)),
    results: Annotated[Path, typer.Option("--results", help="Folder of caches.")] = DEFAULT_RESULTS,
) -> int:
    """Plant each defect of experiments/planted/defects.yaml by itself, and run cells until one fails.

    The cells are those that tests run (`alst matrix --part covering`), those of exact dtypes and few ranks first, or
    one that the defect names. The cell that caught each defect is written to experiments/planted/caught.csv. Exit code
    0: all were caught; 1: one was not.

    Example: alst defects
    """
    begin = time.monotonic()
    console = Console()
    if not paths.DEFECTS.is_file():
        raise ValueError(
            f"{paths.DEFECTS} is not in this folder, and what catches them is written beside it; run it in a "
            "checkout"
        )
    planted = {n: d for n, d in read_defects(paths.DEFECTS).items() if not d.tests}
    if not planted:
        raise ValueError(
            f"{paths.DEFECTS}: every defect is left to tests, so there is none to plant; use `make test`"
        )
    trials = _trials(truth_cache(results))
    caught: dict[str, Catch] = {}
    with ThreadPoolExecutor(jobs) as pool:
        running = {
            pool.submit(
                first_catch, name, defect, own(defect) or trials, truth_cache(results)
            ): name
            for name, defect in planted.items()
        }
        for future in as_completed(running):
            name, catch = running[future], future.result()
            said = "NOT CAUGHT" if catch is None else f"caught by {catch.cell}\n    {catch.detail}"
            style = "red" if catch is None else None
            console.print(f"{name}: {said}", style=style, markup=False, soft_wrap=True)
            if catch is not None:
                caught[name] = catch
    record.write_text(paths.CAUGHT, text_of([caught[name] for name in planted if name in caught]))
    seconds = time.monotonic() - begin
    console.print(f"{len(caught)} of {len(planted)} planted defects caught; {seconds:.0f} s")
    return 0 if len(caught) == len(planted) else 1


def _trials(cache: Path) -> list[Trial]:
    """The cells that tests run, with their truths. Those that fail soonest are first: no rounding to doubt, few ranks."""
    work = chosen(load_experiment(CORRECTNESS), "covering")
    work.sort(key=lambda pair: (pair[1].train.dtype in ROUNDED, pair[1].num_processes))
    found = [truth for some in truths([cell for _, cell in work], cache) for truth in some]
    return [(row.label, cell, truth) for (row, cell), truth in zip(work, found, strict=True)]


def own(defect: Defect) -> list[Trial]:
    """The cell that `defect` names, if any, without its truth."""
    if defect.cell is None:
        return []
    cell = make_cell(defect.cell)
    return [(cell.key, cell, None)]


def first_catch(name: str, defect: Defect, trials: Sequence[Trial], cache: Path) -> Catch | None:
    """The first of `trials` that fails with `defect` planted; None if all pass."""
    with tempfile.TemporaryDirectory() as folder:
        sources = plant(defect, Path(folder))
        for label, cell, truth in trials:
            m = measure(cell, cache, truth=truth, sources=sources)
            if m.outcome is not Outcome.OK:
                return Catch(defect=name, cell=label, outcome=m.outcome, detail=m.detail or "")
    return None
