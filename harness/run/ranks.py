"""The ranks of one cell on this machine: requirements, truths, execution, probes. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from psutil import virtual_memory

from alst_impl.config import Frozen
from alst_impl.engines.base import load_engine
from alst_impl.methods.base import load_method
from harness.cells.cell import Cell
from harness.cells.units import bytes_text
from harness.devices.machine import (
    rank_environment,
    require_attention,
    require_clean,
    require_cuda_build,
    require_devices,
)
from harness.devices.nvml import driver_version
from harness.devices.sampler import Sampler
from harness.processes import client
from harness.processes.client import Listener
from harness.processes.jobs import Ending
from harness.processes.launch import Launch, job_fields
from harness.records.readings import Device, DeviceReadings
from harness.records.record import Finding

UNWATCHED = "the process that reads the devices' memory ended before the run did"
"""The ranks' own readings are complete, but another process may have used their devices."""
TRUTHS_AT_ONCE = 16
"""Truths that one process computes, so that it imports torch once for all of them."""
RANK_BYTES = 64 * 2**20
"""What a rank on a CPU takes at least, beside what it shares with others."""
DOUBTING = 4
"""How much longer the stock model may take with doubts, which are dozens of steps."""


class Ran(Frozen):
    """How a cell ran, on one machine or on several."""

    ending: Ending
    """Of all ranks together."""
    devices: list[DeviceReadings] = []
    """Readings of the ranks' devices during the run."""
    driver: str | None = None
    """Of these devices."""
    nodes: int = 1
    """Machines."""


def require_fit(cell: Cell, launch: Launch | None, *, allow_dirty: bool) -> list[Device]:
    """The devices that the ranks of `cell` run on. Raises `ValueError` if `cell` cannot be measured here."""
    if launch is not None:
        launch.check(cell)
    if cell.traits.forecast:
        return []
    load_engine(cell.train.engine).require()
    load_method(cell.train.method).require()
    require_memory(cell)
    if not cell.traits.gpus:
        return []
    devices = require_devices(cell, launch)
    require_attention(cell.train.attention)
    if not allow_dirty:
        require_clean(cell.label)
    require_cuda_build(cell.label)
    return devices


def require_memory(cell: Cell) -> None:
    """Raise `ValueError` if this machine cannot hold the processes of `cell`, whatever they train."""
    held, needed = virtual_memory().total, RANK_BYTES * cell.num_processes
    if needed > held and not cell.traits.gpus:
        raise ValueError(
            f"{cell.label}: {cell.num_processes:,} ranks are as many processes and take over {bytes_text(needed)}, and this "
            f"machine has {bytes_text(held)}; use at most {held // RANK_BYTES} ranks"
        )


def truths(
    cells: Sequence[Cell], cache: Path, listener: Listener = client.ignore
) -> Iterator[list[dict[str, Any] | None]]:
    """The truth of each of `cells`, in order, in lists of `TRUTHS_AT_ONCE`; None if it failed."""
    for first in range(0, len(cells), TRUTHS_AT_ONCE):
        some = cells[first : first + TRUTHS_AT_ONCE]
        ending = prepare(some, cache, listener)
        yield ending.results[0] if ending.how == "finished" else [None] * len(some)


def prepare(
    cells: Sequence[Cell], cache: Path, listener: Listener, *, doubts: bool = False
) -> Ending:
    """Compute the truths of `cells` that `cache` lacks, with what rounding can do to them if `doubts`.

    Raises `ValueError` for a model that has no truth because its step draws random numbers.
    """
    trains = [cell.train.model_dump(mode="json") for cell in cells]
    wanted = {"trains": trains, "cache": str(cache.resolve()), "doubts": doubts}
    timeout_s = max(cell.timeout_s for cell in cells) * (DOUBTING if doubts else 1)
    ending = client.submit("harness.gate.truths:prepare_truths", wanted, 1, timeout_s, listener)
    if ending.error == "Refused":
        raise ValueError(f"{cells[0].label if len(cells) == 1 else 'the gate'}: {ending.message}")
    return ending


def execute(
    cell: Cell,
    truth: dict[str, Any] | None,
    listener: Listener,
    devices: Sequence[Device],
    launch: Launch | None = None,
    sources: Path | None = None,
) -> Ran:
    """Run the ranks of `cell` that belong to this process, and read `devices` meanwhile.

    `truth` is what `prepare` returned for the cell. `sources` is a folder with another `alst_impl` for the ranks.
    """
    payload = {"cell": cell.model_dump(mode="json"), "truth": truth}
    leader = 0 if launch is None else launch.rank
    with Sampler(devices) as sampler:

        def heard(event: dict[str, Any]) -> None:
            sampler.hear(event, leader)
            listener(event)

        ending = client.submit(
            "harness.worlds.base:execute",
            payload,
            cell.num_processes,
            cell.timeout_s,
            heard,
            **_job_fields(cell, launch, sources),
        )
    if sampler.ended_early and ending.how == "finished":
        ending = Ending(how="error", error="RuntimeError", message=UNWATCHED)
    driver = driver_version() if devices else None
    return Ran(ending=ending, devices=sampler.readings, driver=driver)


def _job_fields(cell: Cell, launch: Launch | None, sources: Path | None) -> dict[str, Any]:
    fields = job_fields(launch)
    if sources is not None:
        fields["sources"] = str(sources)
    if cell.traits.gpus:
        allocator = rank_environment(bool(cell.expandable_segments), os.environ)
        environment = fields.get("environment", {}) | allocator
        fields |= {"accelerator": "cuda", "environment": environment}
    return fields


def probed(cell: Cell) -> list[Finding]:
    """Findings of the probes of `cell`. Raises `RuntimeError` if they cannot be run."""
    payload = {"cell": cell.model_dump(mode="json")}
    ending = client.submit(
        "harness.judge.probes:execute", payload, cell.num_processes, cell.timeout_s
    )
    if ending.how != "finished":
        raise RuntimeError(f"probes: {ending.error or ending.how}: {ending.message}")
    return [Finding(**finding) for finding in ending.results[0]]
