"""`alst run`, `alst cell`, `alst cells`: measure the cells of experiments."""

from __future__ import annotations

import os
import statistics
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from harness.cells.cell import Cell
from harness.cells.experiment import Experiment, load_experiment
from harness.commands.live import CellLine
from harness.commands.tables import show
from harness.processes.launch import launched
from harness.records.record import Measurement, Outcome
from harness.run.measure import measure_to

ExperimentPath = Annotated[
    Path, typer.Argument(help="An experiment, such as experiments/smoke.yaml.")
]
Force = Annotated[bool, typer.Option("--force", help="Measure cells that have a record again.")]
Results = Annotated[Path, typer.Option("--results", help="Folder of records and caches.")]
AllowDirty = Annotated[
    bool,
    typer.Option(
        "--allow-dirty",
        help="Measure CUDA cells of a tree with uncommitted changes; records say so.",
    ),
]
DEFAULT_RESULTS = Path("results")


def record_path(results: Path, experiment: Experiment, key: str) -> Path:
    """Path of the record of a cell."""
    return results / "cells" / experiment.name / f"{key}.json"


def truth_cache(results: Path) -> Path:
    """Folder of truths of the gradient comparison."""
    return results / ".cache" / "truth"


def run(
    experiment: ExperimentPath,
    force: Force = False,
    allow_dirty: AllowDirty = False,
    results: Results = DEFAULT_RESULTS,
) -> None:
    """Measure all cells of an experiment that have no final record yet.

    Every outcome is a record: out of memory, a hang, a crash, a wrong gradient. The next run measures again a
    cell that was killed from outside. Under torchrun all of its ranks take part.
    Exit code 2: this machine cannot run some cells of world 'cuda'; they have no record, all others were measured.

    Example: alst run experiments/smoke.yaml
    """
    loaded = load_experiment(experiment)
    cells = loaded.cells()
    console = quiet_console()
    measured, refused = [], []
    for number, (key, cell) in enumerate(cells.items(), start=1):
        path, cache = record_path(results, loaded, key), truth_cache(results)
        try:
            line = CellLine(console, cell, number, len(cells))
            measured.append(_run_one(line, path, cell, cache, force, allow_dirty))
        except ValueError as error:
            if launched(os.environ) is not None:
                raise  # other ranks may have accepted the cell: torchrun ends them, so they do not wait
            refused.append(str(error))
    if measured:
        show(console, _summary(loaded, measured))
        passed = sum(m.outcome is Outcome.OK for m in measured)
        folder = results / "cells" / loaded.name
        page = ", and `alst report` makes the page" if results == DEFAULT_RESULTS else ""
        console.print(
            f"{passed} of {len(cells)} cells passed; records are in {folder}{page}",
            highlight=False,
            soft_wrap=True,
        )
    if refused:
        others = f" (and {len(refused) - 1} other cells)" if len(refused) > 1 else ""
        raise ValueError(f"{refused[0]}{others}")


def cell(
    experiment: ExperimentPath,
    key: Annotated[str, typer.Argument(help="Key of the cell, as `alst cells` lists it.")],
    force: Force = False,
    allow_dirty: AllowDirty = False,
    results: Results = DEFAULT_RESULTS,
) -> None:
    """Measure one cell of an experiment and write RESULTS/cells/EXPERIMENT/KEY.json."""
    loaded = load_experiment(experiment)
    cells = loaded.cells()
    if key not in cells:
        raise ValueError(f"{experiment} has no cell '{key}'; `alst cells {experiment}` lists them")
    line = CellLine(quiet_console(), cells[key], list(cells).index(key) + 1, len(cells))
    path, cache = record_path(results, loaded, key), truth_cache(results)
    _run_one(line, path, cells[key], cache, force, allow_dirty)


def cells(experiment: ExperimentPath) -> None:
    """List the keys of an experiment's cells."""
    for key in load_experiment(experiment).cells():
        print(key)


def quiet_console() -> Console:
    """A console that prints only on the first rank of a launch."""
    launch = launched(os.environ)
    return Console(quiet=launch is not None and launch.rank > 0)


def _run_one(
    line: CellLine, path: Path, cell: Cell, cache: Path, force: bool, allow_dirty: bool
) -> Measurement:
    with line:
        measurement, fresh = measure_to(
            path, cell, cache, line.hear, force=force, allow_dirty=allow_dirty
        )
    line.done(measurement, fresh=fresh)
    return measurement


def _summary(experiment: Experiment, measured: list[Measurement]) -> Table:
    """One row per cell with its main numbers."""
    table = Table(title=experiment.question, box=None)
    for heading in ("cell", "outcome", "gradients", "step [s]", "peak [MiB]", "last loss"):
        left = heading == "cell"
        table.add_column(escape(heading), justify="left" if left else "right", no_wrap=not left)
    for m in measured:
        readings = m.readings
        if readings is None:
            table.add_row(m.cell.label, m.outcome, *["-"] * 4)
            continue
        steps = [max(ranks) for ranks in readings.step_s]
        peaks = [rank.peak_bytes for rank in readings.memory]
        gate = "-" if readings.gate is None else ("ok" if readings.gate.passed else "wrong")
        table.add_row(
            m.cell.label,
            m.outcome,
            gate,
            f"{statistics.median(steps):.3f}" if steps else "-",
            f"{max(peaks) / 2**20:.1f}" if peaks else "-",
            f"{readings.loss[-1]:.5f}" if readings.loss else "-",
        )
    return table
