"""One cell measured by all processes of a launch, on one machine or on several. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from harness.cells.cell import Cell
from harness.processes.client import Listener
from harness.processes.jobs import Ending
from harness.processes.launch import Launch, Meeting, combined
from harness.records.readings import Device
from harness.records.record import Measurement, write
from harness.run.outcomes import measurement
from harness.run.ranks import Ran, execute, prepare


def measure_together(
    launch: Launch,
    path: Path,
    cell: Cell,
    cache: Path,
    kept: Measurement | None,
    listener: Listener,
    devices: Sequence[Device],
) -> tuple[Measurement, bool]:
    """The record of `cell`, and whether it was measured now. Collective.

    The first rank decides for all: it returns `kept` if there is one, else it judges the run and writes `path`.
    `devices` are those of this machine's ranks.
    """
    begin, first = time.monotonic(), launch.rank == 0
    meeting = Meeting(launch, cell)
    if first:
        meeting.say("kept", "" if kept is None else kept.model_dump_json())
    told = meeting.hear("kept")
    if told:
        return Measurement.model_validate_json(told), False
    mine = _execute_one(launch, cell, cache, listener, devices)
    meeting.say(f"ran {launch.rank}", mine.model_dump_json())
    if first:
        ran = _all_of([Ran.model_validate_json(text) for text in meeting.hear_all("ran")], launch)
        measured = measurement(cell, ran, time.monotonic() - begin)
        write(path, measured)
        meeting.say("record", measured.model_dump_json())
    return Measurement.model_validate_json(meeting.hear("record")), True


def _all_of(ranks: Sequence[Ran], launch: Launch) -> Ran:
    """The runs of all ranks, in order, as one."""
    return Ran(
        ending=combined([ran.ending for ran in ranks]),
        devices=[reading for ran in ranks for reading in ran.devices],
        driver=ranks[0].driver,
        nodes=launch.num_nodes,
    )


def _execute_one(
    launch: Launch, cell: Cell, cache: Path, listener: Listener, devices: Sequence[Device]
) -> Ran:
    """Run the rank of `launch`. Rank 0 has the truth; the first rank of a machine reads its devices."""
    truth = None
    if cell.gate and launch.rank == 0:
        try:
            prepared = prepare([cell], cache, listener)
        except ValueError as error:  # The other ranks wait for this one's ending.
            return Ran(ending=Ending(how="error", error="ValueError", message=str(error)))
        if prepared.how != "finished":
            return Ran(ending=prepared)
        ((truth,),) = prepared.results
    watched = devices if launch.local_rank == 0 else []
    return execute(cell, truth, listener, watched, launch)
