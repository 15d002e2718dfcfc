"""`alst devices`, `alst confirm`: the GPUs of this machine, and their readings beside phantom devices."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from harness.cells import paths
from harness.cells.experiment import load_experiment
from harness.commands.run import DEFAULT_RESULTS
from harness.commands.tables import show

Results = Annotated[Path, typer.Option("--results", help="Folder of records.")]


def devices() -> None:
    """List the GPUs that a run here would use: hardware row of cells, name, UUID, memory.

    Exit code 2 and the reason if there is none.
    """
    from harness.devices.machine import row_of, some_devices
    from harness.devices.nvml import library

    for device in some_devices(library()):
        held = device.memory_bytes
        gib = "shares the host's memory" if held is None else f"{held / 2**30:.1f} GiB"
        print("\t".join([row_of(device) or "-", device.name, device.uuid, gib]))


def confirm(
    name: Annotated[str, typer.Argument(help="An experiment with cells of a GPU and their twins.")],
    results: Results = DEFAULT_RESULTS,
) -> int:
    """Compare GPU readings with phantom-device readings of the same cells, phase by phase.

    Cells without a record of this code first run on phantom devices, which needs no GPU. Exit code 1: allocated
    bytes differ. 2: nothing can be compared, or no pair of records has one version of PyTorch.

    Example: alst confirm gpu_single
    """
    from harness.commands.claims import bring_up_to_date, simulated_cells
    from harness.judge.twins import run_of, torch_versions, twins
    from harness.present.grids.predicted import twin_grid
    from harness.records.table import fresh

    experiment = load_experiment(paths.experiment(name))
    folder = results / "cells" / name
    measured = {
        run_of(m.cell)
        for m in fresh(paths.experiment(name), folder).measurements.values()
        if m.cell.traits.gpus
    }
    played = {k: c for k, c in simulated_cells(experiment).items() if run_of(c) in measured}
    bring_up_to_date([(experiment, played)], results)
    found = fresh(paths.experiment(name), folder)
    pairs = twins(found)
    if not pairs:
        raise ValueError(
            f"{name}: no cell has both a record of a GPU and one of a phantom device in {folder}, so nothing "
            "can be compared; measure first, with experiments/measure_gpu.sh on a machine with the GPU"
        )
    grid = twin_grid(found)
    table = Table(title=f"{name}: a GPU beside a phantom device", title_justify="left")
    for i, heading in enumerate(grid.headings):
        table.add_column(heading, justify="right" if i > 1 else "left", no_wrap=True)
    for pair, row in zip(pairs, grid.rows, strict=True):
        table.add_row(*row, style="red" if pair.missed else None)
    console = Console()
    show(console, table)
    for gpu, phantom in torch_versions(found):
        console.print(
            f"not judged: the GPU ran torch {gpu}, the phantom device {phantom}; equal bytes are due between "
            "equal versions alone",
            highlight=False,
        )
    judged = [pair for pair in pairs if pair.judged]
    if not judged:
        raise ValueError(
            f"{name}: no pair was run with one version of torch, so nothing is judged; install the GPU's version here"
        )
    missed = [pair for pair in judged if pair.missed]
    console.print(
        f"{len(judged) - len(missed)} of {len(judged)} allocated numbers are equal to the byte",
        highlight=False,
    )
    return 1 if missed else 0
