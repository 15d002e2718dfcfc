"""A step of a cell on a phantom device, tried: what it holds, or that it met the allocator's out-of-memory."""

from __future__ import annotations

import math
import os

import torch

from alst_impl.config import Frozen, TrainConfig
from alst_impl.methods.base import load_method
from harness.cells.cell import Cell
from harness.cells.hardware import load_hardware
from harness.cells.prediction import Cost, Holding, Timeline
from harness.devices.outside import outside_bytes
from harness.phantom.load import described
from harness.predict.parts import run_part
from harness.processes.jobs import Rank
from harness.records.record import RankMemory
from harness.worlds.base import RankReadings, run
from harness.worlds.phantom import Phantom

GIB = 2**30
ROOMY_BYTES = 4000 * GIB
"""A device on which a step that does not fit shows what it would take."""


class Step(Frozen):
    """A step that ran to its end."""

    readings: RankReadings
    cost: Cost | None
    """Counted where it was asked for."""
    holdings: list[Holding]
    """What is alive at the peak, largest first, where it was asked for."""
    pageable_bytes: int
    """Host memory of one rank that is not page-locked: samples, and an optimizer's shards and states there."""
    timeline: Timeline | None
    """Where the cell asks for it."""

    @property
    def memory(self) -> RankMemory:
        """Of the tracked step."""
        assert self.readings.memory is not None
        return self.readings.memory

    @property
    def allocated_bytes(self) -> int:
        """The most that the allocator handed out."""
        return self.memory.peak_bytes

    @property
    def reserved_bytes(self) -> int:
        """The most that it held."""
        assert self.memory.cuda is not None
        return max(self.memory.cuda.reserved_bytes.values())


class Exceeded(Frozen):
    """A step that ended in the allocator's out-of-memory."""

    detail: str


def attempt(
    rank: Rank, cell: Cell, device_bytes: int, *, counted: bool = False, explained: bool = False
) -> Step | Exceeded:
    """A step of `cell` in this process, which has not used a device yet, on one of `device_bytes`."""
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
    """`attempt` on a device of `ROOMY_BYTES`. Raises `ValueError` for a step that takes even more."""
    found = attempt(rank, cell, ROOMY_BYTES, counted=counted, explained=explained)
    if isinstance(found, Exceeded):
        raise ValueError(
            f"seqlen ({cell.train.seqlen:,}) does not fit: a step takes more than {ROOMY_BYTES // GIB:,} GiB of a "
            "device; use a shorter sequence or more ranks"
        )
    return found


def _played(cell: Cell) -> list[int]:
    """The ranks one of which holds the most: of a pipeline the first stage holds most slices, the last the loss."""
    method, size = load_method(cell.train.method), cell.train.world_size
    stages = method.degrees(size)["pp"]
    return [0, size - size // stages] if stages > 1 else [method.heaviest_rank(size)]


def capacity_bytes(cell: Cell) -> int:
    """What the allocator of one rank of `cell` may hold: the device's memory less what lies outside."""
    chip = load_hardware(cell.hardware).chip
    assert chip is not None
    return chip.usable_bytes - outside_bytes(cell.train)


def host_bytes(cell: Cell, step: Step) -> int:
    """Host memory of a node's ranks."""
    ranks = min(cell.train.world_size, load_hardware(cell.hardware).devices_per_node)
    assert step.memory.cuda is not None
    return ranks * ((step.memory.cuda.pinned_bytes or 0) + step.pageable_bytes)


def host_memory_bytes(cell: Cell) -> float:
    """Of one node."""
    assert cell.simulation is not None
    row = load_hardware(cell.hardware)
    return cell.simulation.host_memory_bytes or row.host_memory_bytes or math.inf


def require_thinkable(cell: Cell) -> None:
    """Raise `ValueError` where the tokens' ids alone are more than a device holds: nothing has to run to see it."""
    ids = 8 * cell.train.batch_size * cell.train.seqlen // sequence_parallel(cell.train)
    capacity = capacity_bytes(cell)
    if ids > capacity:
        raise ValueError(
            f"seqlen ({cell.train.seqlen:,}) does not fit: the ids of a rank's tokens alone are {ids / GIB:,.0f} "
            f"GiB, more than the {capacity / GIB:.0f} GiB of a device; use a shorter sequence or more ranks"
        )


def at_length(cell: Cell, seqlen: int) -> Cell:
    return with_train(cell, cell.train.model_copy(update={"seqlen": seqlen}))


def with_train(cell: Cell, train: TrainConfig) -> Cell:
    return cell.model_copy(update={"train": train})


def sequence_parallel(config: TrainConfig) -> int:
    """Ranks that share the tokens of one sample."""
    degrees = load_method(config.method).degrees(config.world_size)
    return degrees["cp"] * degrees["sp"]
