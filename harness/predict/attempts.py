"""A trial step of a cell on a phantom device: its memory use, or the allocator's out-of-memory error."""

from __future__ import annotations

import math
import os
from functools import partial

import torch

from alst_impl import models
from alst_impl.config import Frozen, TrainConfig
from alst_impl.methods.base import layouts, load_method
from harness.cells.cell import Cell, host_memory_bytes
from harness.cells.hardware import load_hardware
from harness.cells.prediction import Cost, Holding, Timeline
from harness.cells.units import length_text
from harness.devices.outside import outside_bytes
from harness.phantom.load import described
from harness.predict import passes
from harness.predict.parts import run_part
from harness.processes.apart import apart
from harness.processes.jobs import Rank
from harness.records.record import RankMemory
from harness.worlds.base import RankReadings, run
from harness.worlds.phantom import Phantom

GIB = 2**30
ROOMY_BYTES = 4000 * GIB
"""Memory of a device that is large enough to show how much a step needs that does not fit."""


class Step(Frozen):
    """A step that completed."""

    readings: RankReadings
    cost: Cost | None
    """Counted work; None if it was not requested."""
    holdings: list[Holding]
    """Allocations alive at the peak, largest first; empty if they were not requested."""
    pageable_bytes: int
    """Pageable host memory of one rank: samples, and the optimizer's offloaded shards and states."""
    timeline: Timeline | None
    """None if the cell does not request it."""

    @property
    def memory(self) -> RankMemory:
        """Memory of the tracked step."""
        assert self.readings.memory is not None
        return self.readings.memory

    @property
    def allocated_bytes(self) -> int:
        """Peak of allocated bytes."""
        return self.memory.peak_bytes

    @property
    def reserved_bytes(self) -> int:
        """Peak of reserved bytes."""
        assert self.memory.cuda is not None
        return max(self.memory.cuda.reserved_bytes.values())


class TooLarge(ValueError):
    """A step needs more memory than any device has."""


class Exceeded(Frozen):
    """A step that ended in the allocator's out-of-memory error."""

    detail: str


def attempt(
    rank: Rank, cell: Cell, device_bytes: int, *, counted: bool = False, explained: bool = False
) -> Step | Exceeded:
    """A step of `cell` on a phantom device of `device_bytes`, stretched from few chunks if it has many (`passes`).

    This process must not have used a device before.
    """
    if not passes.stretches(cell):
        return run_attempt(rank, cell, device_bytes, counted=counted, explained=explained)
    layout, found = layouts(cell.train)[0], []
    for few in passes.with_few(cell):
        missing = passes.missing_bytes(layout, layouts(few.train)[0]) * cell.train.batch_size
        room = max(device_bytes - missing, 0)
        once = partial(run_attempt, rank, few, room, counted=counted, explained=explained)
        (step,) = apart([once])
        if isinstance(step, Exceeded):
            return step
        found.append(step.model_dump())
    return Step(**passes.stretched(found, layout.passes))


def run_attempt(
    rank: Rank, cell: Cell, device_bytes: int, *, counted: bool, explained: bool
) -> Step | Exceeded:
    """A step of `cell` with all its chunks, as `attempt`."""
    os.environ["PHANTOM_DEVICE"] = described(load_hardware(cell.hardware), 1, device_bytes)
    found = []
    for played in _played(cell):
        world = Phantom(rank=played, counted=counted, explained=explained)
        body = run if cell.simulation and cell.simulation.part == "step" else run_part
        try:
            readings = body(rank, cell, world)
        except torch.OutOfMemoryError as error:
            return Exceeded(detail=str(error).partition(". GPU")[0])
        found.append(
            Step(
                readings=readings,
                cost=world.cost,
                holdings=world.holdings,
                pageable_bytes=world.pageable_bytes,
                timeline=world.timeline,
            )
        )
    return max(found, key=lambda step: step.allocated_bytes)


def roomy(rank: Rank, cell: Cell, *, counted: bool = False, explained: bool = False) -> Step:
    """`attempt` on a device of `ROOMY_BYTES`. Raises `TooLarge` if the step needs even more."""
    found = attempt(rank, cell, ROOMY_BYTES, counted=counted, explained=explained)
    if isinstance(found, Exceeded):
        raise TooLarge(
            f"seqlen ({length_text(cell.train.seqlen)}) does not fit: a step takes more than {ROOMY_BYTES // GIB:,} GiB of a "
            "device; use a shorter sequence or more ranks"
        )
    return found


def _played(cell: Cell) -> list[int]:
    """Candidates for the rank with the highest memory use. In a pipeline, the first stage has the
    most slices and the last has the loss.
    """
    method, size = load_method(cell.train.method), cell.train.world_size
    stages = layouts(cell.train)[0].pp
    return [0, size - size // stages] if stages > 1 else [method.heaviest_rank(size)]


def capacity_bytes(cell: Cell) -> int:
    """Memory for the allocator of one rank of `cell`: the device's usable memory less the margin and the
    memory outside the allocator; 0 if that is nothing.
    """
    assert cell.simulation is not None
    left = load_hardware(cell.hardware).usable_bytes * (1 - cell.simulation.margin)
    return max(int(left) - outside_bytes(cell.train), 0)


def host_bytes(cell: Cell, step: Step) -> int:
    """Host memory of all ranks of a node."""
    ranks = min(cell.train.world_size, load_hardware(cell.hardware).devices_per_node)
    assert step.memory.cuda is not None
    return ranks * ((step.memory.cuda.pinned_bytes or 0) + step.pageable_bytes)


def require_thinkable(cell: Cell) -> None:
    """Raise `TooLarge`, before anything runs, if one hidden state exceeds the memory of a device and of its share
    of the host: every method keeps at least the output of one layer.
    """
    train, row = cell.train, load_hardware(cell.hardware)
    hidden = models.field(models.described(train.model, train.overrides), "hidden_size")
    width = hidden * {"float64": 8, "float32": 4, "bfloat16": 2}[train.dtype]
    needed = width * train.batch_size * train.seqlen // sequence_parallel(train)
    host = host_memory_bytes(cell) / min(train.world_size, row.devices_per_node)
    capacity = capacity_bytes(cell) + (0 if math.isinf(host) else host)
    if needed > capacity:
        raise TooLarge(
            f"seqlen ({length_text(train.seqlen)}) does not fit: one hidden state of a rank's tokens alone is "
            f"{needed / GIB:,.0f} GiB, more than the {capacity / GIB:,.0f} GiB of a device and its share of the host; "
            "use a shorter sequence or more ranks"
        )


def at_length(cell: Cell, seqlen: int) -> Cell:
    return with_train(cell, cell.train.model_copy(update={"seqlen": seqlen}))


def with_train(cell: Cell, train: TrainConfig) -> Cell:
    return cell.model_copy(update={"train": train})


def sequence_parallel(config: TrainConfig) -> int:
    """Ranks that share the tokens of one sample."""
    return layouts(config)[0].shards
