"""`alst devices`, `alst calibrate`, `alst confirm`: what a GPU is, holds, and says of the simulation."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from harness import paths
from harness.cell import load_experiment
from harness.commands.run import DEFAULT_RESULTS, AllowDirty

Results = Annotated[Path, typer.Option("--results", help="Folder of records.")]


def devices() -> None:
    """List the GPUs that a run here would use: name, UUID, memory, and the hardware row of cells for it.

    Exit code 2 where there is none, saying why.
    """
    from harness.machine import row_of, some_devices
    from harness.nvml import library

    for device in some_devices(library()):
        held = device.memory_bytes
        gib = "shares the host's memory" if held is None else f"{held / 2**30:.1f} GiB"
        print("\t".join([row_of(device) or "-", device.name, device.uuid, gib]))


def calibrate(
    allow_dirty: AllowDirty = False,
    force: Annotated[
        bool, typer.Option("--force", help="Measure again what was measured.")
    ] = False,
    results: Results = DEFAULT_RESULTS,
) -> None:
    """Measure on the first GPU what the simulator cannot count: kernel scratch, contexts, copies.

    Writes RESULTS/calibration/HARDWARE.json; the committed one of a hardware row is read by `alst confirm`.
    """
    from harness.calibration import fresh_path
    from harness.machine import calibrated_device, require_clean, require_cuda_build
    from harness.nvml import library
    from harness.record import write_text
    from harness.run import calibration

    row, device = calibrated_device(library())
    if not allow_dirty:
        require_clean("calibration")
    require_cuda_build("calibration")
    path = fresh_path(row, results)
    if path.is_file() and not force:
        print(path)
        return
    begin = time.monotonic()
    found = calibration(row, device)
    write_text(path, found.model_dump_json(indent=1) + "\n")
    print(f"{path} ({time.monotonic() - begin:.0f} s)")


def confirm(
    name: Annotated[str, typer.Argument(help="An experiment with measured and simulated cells.")],
    results: Results = DEFAULT_RESULTS,
) -> int:
    """Set what a GPU measured beside what is simulated of the same cells, phase by phase.

    Simulates what has no record of this code, which needs no GPU. Exit code 1 where a counted number is
    further off than 3 %; 2 where nothing counted can be compared.

    Example: alst confirm gpu_single
    """
    from harness.commands.claims import bring_up_to_date, simulated_cells
    from harness.report import twin_grid
    from harness.table import fresh
    from harness.twins import TOLERANCE, twins

    experiment = load_experiment(paths.experiment(name))
    bring_up_to_date([(experiment, simulated_cells(experiment))], results)
    found = fresh(paths.experiment(name), results / "cells" / name)
    pairs = twins(found)
    counted = [pair for pair in pairs if pair.judged]
    if not counted:
        raise ValueError(
            f"{name}: no cell has both a record of a GPU and a simulated one in {results}/cells/{name}, so nothing "
            "can be compared; measure first, with experiments/measure_gpu.sh on a machine with the GPU"
        )
    grid = twin_grid(found)
    table = Table(title=f"{name}: measured beside simulated", title_justify="left")
    for i, heading in enumerate(grid.headings):
        table.add_column(heading, justify="right" if i > 1 else "left", no_wrap=True)
    for pair, row in zip(pairs, grid.rows, strict=True):
        table.add_row(*row, style="red" if pair.missed else None)
    console = Console()
    console.width = max(console.width, 110)  # a narrower terminal wraps rather than hides
    console.print(table)
    missed = [pair for pair in counted if pair.missed]
    console.print(
        f"{len(counted) - len(missed)} of {len(counted)} counted numbers are within {TOLERANCE:.0%} of what "
        "was measured",
        highlight=False,
    )
    return 1 if missed else 0
