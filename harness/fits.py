"""What fits: a step of a cell on a phantom device, and the longest sequence, found by the real out-of-memory.

What the allocator does is the allocator's own doing. What a device holds outside it is one constant for a
process alone and one for ranks that communicate, from readings named in `OUTSIDE_READINGS`.
"""

from __future__ import annotations

import math
import os
import sys
from functools import partial
from typing import Any

import torch

from alst_impl.config import Frozen, TrainConfig
from alst_impl.methods.base import load_method
from alst_impl.models import field, published
from harness import flops, pipelines, roofline
from harness.apart import apart
from harness.cell import Cell
from harness.depth import at_depth, structure
from harness.hardware import load_hardware
from harness.phantom.load import described
from harness.predict import GIB, PRECISION, STEP, heads_are_spent, sequence_parallel
from harness.prediction import Cost, Flops, Holding, Limit, Prediction, SearchResult, Simulated
from harness.processes import Rank
from harness.record import RankMemory
from harness.sources import fingerprint
from harness.worlds.base import RankReadings, run
from harness.worlds.phantom import Phantom

CONTEXT_BYTES = GIB
"""Outside the allocator of one process without communicators: a CUDA context (about 1 GiB: arXiv:2506.13996,
section 2.1)."""
OUTSIDE_READINGS = {
    "ArcticTraining, Llama-3.1-70B, 32 GPUs, 4,000,000 tokens": (47.70, 41.15),
    "ArcticTraining, Llama-3.1-70B, 64 GPUs, 10,000,000 tokens": (53.83, 47.10),
    "ArcticTraining, Qwen3-32B, 32 GPUs, 7,000,000 tokens": (71.55, 65.05),
}
"""(GiB that NVML read, GiB that the allocator reserves on a phantom device for the same recipe, run by
`deepspeed_alst` with `liger` and `offload` under `zero` with `offload_optimizer`)."""
COMMUNICATING_BYTES = int(
    sum(nvml - reserved for nvml, reserved in OUTSIDE_READINGS.values())
    / len(OUTSIDE_READINGS)
    * GIB
)
"""Outside the allocator of a rank among others: context, NCCL's buffers, libraries."""
ROOMY_BYTES = 1000 * GIB
"""A device on which a step that does not fit shows what it would take."""
FULL = 0.97
"""Share of what the allocator may hold that a step allocates at most: blocks are rounded, and gaps are left."""
HOLDINGS = 40
"""Rows kept of what is alive at the peak."""


class Step(Frozen):
    """A step that ran to its end."""

    readings: RankReadings
    cost: Cost | None
    """Counted where it was asked for."""
    holdings: list[Holding]
    """What is alive at the peak, largest first, where it was asked for."""
    pageable_bytes: int
    """Host memory of one rank that is not page-locked: samples, and an optimizer's shards and states there."""

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


Tried = Step | Exceeded


def execute(rank: Rank, payload: dict[str, Any]) -> dict[str, Any]:
    """`forecast` of `payload["cell"]` as plain data."""
    # The search path of who asks does not lead to what phantom processes have besides.
    ours = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path += [folder for folder in ours if folder not in sys.path]
    cell = Cell(**payload["cell"])
    load_method(cell.train.method).require()
    return forecast(rank, cell).model_dump(mode="json")


class Forecast(Frozen):
    """What was found of a cell."""

    simulated: Simulated
    readings: RankReadings
    """Of the tracked step, on a device on which it fits."""


def forecast(rank: Rank, cell: Cell) -> Forecast:
    """A step of `cell`, what one more token costs, and the longest sequence where the cell asks for it.

    Raises `ValueError` for a length whose tokens alone are more than a device holds.
    """
    assert cell.simulation is not None
    require_thinkable(cell)
    more = longer(cell)
    rank.progress("counting its work")
    cost = counted(rank, cell)
    rank.progress("running a step on a phantom device")
    full = partial(attempt, rank, cell, explained=True)
    tried, beyond = apart(
        [partial(full, capacity_bytes(cell)), partial(attempt, rank, more, ROOMY_BYTES)]
    )
    step = tried
    if isinstance(step, Exceeded):
        rank.progress("running it on a larger one, for it does not fit")
        (step,) = apart([partial(full, ROOMY_BYTES)])
    assert isinstance(step, Step), "a device of that size is full"
    assert isinstance(beyond, Step), "a device of that size is full"
    tokens = (more.train.seqlen - cell.train.seqlen) / sequence_parallel(cell.train)
    slope = (beyond.allocated_bytes - step.allocated_bytes) / tokens
    fits = isinstance(tried, Step)
    search = None
    if cell.simulation.search:
        rank.progress("searching for the longest sequence")
        search = longest(rank, cell, step, fits)
    return Forecast(
        simulated=_simulated(cell, step, cost, fits, slope, search), readings=step.readings
    )


def counted(rank: Rank, cell: Cell) -> Cost:
    """What a step of `cell` computes and moves: a straight line in the layers where they are alike, from two depths."""
    fields = published(cell.train.model, cell.train.overrides)
    layers = field(fields, "num_hidden_layers")
    method = load_method(cell.train.method)
    period = method.period() * method.degrees(cell.train.world_size)["pp"]
    straight = structure(cell.train).layers_alike and layers % period == 0 and layers > 2 * period
    depths = (period, 2 * period) if straight else (layers,)
    calls = [
        partial(attempt, rank, _of(cell, at_depth(cell.train, depth)), ROOMY_BYTES, counted=True)
        for depth in depths
    ]
    steps = apart(calls)
    costs = [step.cost for step in steps if isinstance(step, Step) and step.cost is not None]
    assert len(costs) == len(calls), "a device of that size is full"
    if not straight:
        return costs[0]
    one, two = (cost.model_dump() for cost in costs)
    return Cost(**{k: one[k] + (layers // period - 1) * (two[k] - one[k]) for k in one})


def attempt(
    rank: Rank, cell: Cell, device_bytes: int, *, counted: bool = False, explained: bool = False
) -> Tried:
    """A step of `cell` in this process, which has not used a device yet, on one of `device_bytes`."""
    os.environ["PHANTOM_DEVICE"] = described(load_hardware(cell.hardware), 1, device_bytes)
    found = []
    for played in _played(cell):
        world = Phantom(rank=played, counted=counted, explained=explained)
        try:
            readings = run(rank, cell, world)
        except torch.OutOfMemoryError as error:
            return Exceeded(detail=str(error).partition(". GPU")[0])
        found.append(
            Step(
                readings=readings,
                cost=world.cost,
                holdings=world.holdings,
                pageable_bytes=world.pageable_bytes,
            )
        )
    return max(found, key=lambda step: step.allocated_bytes)


def longest(rank: Rank, cell: Cell, step: Step, fits: bool) -> SearchResult:
    """The longest sequence of `cell`, in multiples of `STEP` tokens per rank; `step` is one of it, which `fits` or not.

    A straight line through what is known says where to look, on both sides at a time.
    """
    unit = STEP * sequence_parallel(cell.train)
    capacity, length = capacity_bytes(cell), cell.train.seqlen
    known = {0: step.memory.resting_bytes, length: step.allocated_bytes}
    low, high = (length // unit, None) if fits else (0, -(-length // unit))
    limit: Limit = "gpu_memory"
    evaluations = 1
    while high is None or high - low > max(1, int(PRECISION * high)):
        tries = _next_tries(low, high, int(_crossing(known, capacity) / unit))
        cells = [_at(cell, n * unit) for n in tries]
        found = apart([partial(attempt, rank, each, capacity) for each in cells])
        evaluations += len(tries)
        for n, each in zip(tries, found, strict=True):
            exceeded = _exceeds(cell, each)
            if isinstance(each, Step):
                known[n * unit] = each.allocated_bytes
            if exceeded is None:
                low = max(low, n)
            elif high is None or n < high:
                high, limit = n, exceeded
    return SearchResult(
        longest_tokens=low * unit,
        shortest_failing_tokens=high * unit,
        limit=limit,
        evaluations=evaluations,
    )


def _next_tries(low: int, high: int | None, guess: int) -> list[int]:
    """One or two numbers to try: around `guess`, else where they cut the range from `low`, which fits, to `high`, which does not."""
    half = max(1, int(PRECISION * guess * 0.45))
    beyond = high is not None and guess + half >= high
    if high is None:
        # A line through a short and a longer length may miss by much, and each try is a whole step.
        around = min(max(guess, low + 1), 16 * max(low, 64))
        return sorted({max(around - half, low + 1), max(around + half, low + 2)})
    if beyond or guess - half <= low:
        third = (high - low) // 3
        return sorted({low + third, high - third} - {low, high}) or [low + 1]
    return sorted({guess - half, guess + half})


def _crossing(known: dict[int, int], capacity: int) -> float:
    """Tokens at which a straight line through the two longest known steps meets the device's memory."""
    (x, near), (far, there) = sorted(known.items())[-2:]
    slope = max((there - near) / (far - x), 1.0)
    return far + (FULL * capacity - there) / slope


def _exceeds(cell: Cell, tried: Tried) -> Limit | None:
    """What a step has too much of; None of one that fits."""
    if isinstance(tried, Exceeded):
        return "heads" if heads_are_spent(cell.train) else "gpu_memory"
    limit = host_memory_bytes(cell)
    return "host_memory" if host_bytes(cell, tried) > limit else None


def capacity_bytes(cell: Cell) -> int:
    """What the allocator of one rank of `cell` may hold: the device's memory less what lies outside."""
    chip = load_hardware(cell.hardware).chip
    assert chip is not None
    return chip.usable_bytes - outside_bytes(cell.train)


def outside_bytes(config: TrainConfig) -> int:
    """What a device holds outside the allocator."""
    return CONTEXT_BYTES if config.world_size == 1 else COMMUNICATING_BYTES


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


def longer(cell: Cell) -> Cell:
    """The same run with sequences two per cent longer, by at least a token on every rank."""
    ranks = sequence_parallel(cell.train)
    return _at(cell, cell.train.seqlen + max(cell.train.seqlen // ranks // 50, 1) * ranks)


def require_thinkable(cell: Cell) -> None:
    """Raise `ValueError` where the tokens' ids alone are more than a device holds: nothing has to run to see it."""
    ids = 8 * cell.train.batch_size * cell.train.seqlen // sequence_parallel(cell.train)
    capacity = capacity_bytes(cell)
    if ids > capacity:
        raise ValueError(
            f"seqlen ({cell.train.seqlen:,}) does not fit: the ids of a rank's tokens alone are {ids / GIB:,.0f} "
            f"GiB, more than the {capacity / GIB:.0f} GiB of a device; use a shorter sequence or more ranks"
        )


def _at(cell: Cell, seqlen: int) -> Cell:
    return _of(cell, cell.train.model_copy(update={"seqlen": seqlen}))


def _of(cell: Cell, train: TrainConfig) -> Cell:
    return cell.model_copy(update={"train": train})


def _played(cell: Cell) -> list[int]:
    """The ranks one of which holds the most: of a pipeline the first stage holds most slices, the last the loss."""
    method, size = load_method(cell.train.method), cell.train.world_size
    stages = method.degrees(size)["pp"]
    return [0, size - size // stages] if stages > 1 else [method.heaviest_rank(size)]


def _simulated(
    cell: Cell,
    step: Step,
    cost: Cost,
    fits: bool,
    slope: float,
    search: SearchResult | None,
) -> Simulated:
    """The record's part of a step and what follows from it."""
    by_category: dict[str, int] = {}
    for each in step.holdings:
        by_category[each.category] = by_category.get(each.category, 0) + each.nbytes
    config, row = cell.train, load_hardware(cell.hardware)
    memory, total = step.memory, step.reserved_bytes + outside_bytes(cell.train)
    host = host_bytes(cell, step)
    limit: Limit = "none"
    if not fits:
        limit = "heads" if heads_are_spent(config) else "gpu_memory"
    elif host > host_memory_bytes(cell):
        limit = "host_memory"
    prediction = Prediction(
        allocated_bytes=step.allocated_bytes,
        reserved_bytes=step.reserved_bytes,
        overhead_bytes=total - step.allocated_bytes,
        total_bytes=total,
        host_bytes=host,
        bytes_per_local_token=slope,
        by_category=by_category,
        fits=limit == "none",
        limit=limit,
        flops=_flops(cell, step),
        step_seconds_modelled=_seconds(cell, step, cost),
        cost=cost,
        least_seconds_modelled=roofline.least_seconds(cost, row, config.world_size),
    )
    assert memory.cuda is not None
    return Simulated(
        code=fingerprint(),
        prediction=prediction,
        peak_bytes=step.allocated_bytes,
        phase_peak_bytes=memory.cuda.allocated_bytes,
        reserved_bytes=step.reserved_bytes,
        checkpoint_bytes=memory.host_peak_bytes,
        holdings=step.holdings[:HOLDINGS],
        search=search,
        timeline=None,
    )


def _sequences(config: TrainConfig) -> int:
    """Of one step, over all ranks."""
    replicas = load_method(config.method).axes(config.world_size)["dp"]
    return config.batch_size * config.accumulation * replicas


def _shape(cell: Cell, step: Step) -> flops.Shape:
    assert step.readings.num_parameters
    fields = published(cell.train.model, cell.train.overrides)
    return flops.shape_of(fields, step.readings.num_parameters)


def _flops(cell: Cell, step: Step) -> Flops:
    shape, sequences = _shape(cell, step), _sequences(cell.train)
    return Flops(
        paper_formula=sequences * flops.paper_formula(shape, cell.train.seqlen),
        model_causal=sequences * flops.model_causal(shape, cell.train.seqlen),
    )


def _seconds(cell: Cell, step: Step, cost: Cost) -> float:
    """Modelled, of a whole step: by the passes of the published runs where the method makes them, else as counted."""
    config, row = cell.train, load_hardware(cell.hardware)
    if load_method(config.method).recomputes_layers and config.checkpoint:
        one = roofline.seconds(_shape(cell, step), config.seqlen, row)
        seconds = _sequences(config) * one / config.world_size
    else:
        seconds = roofline.seconds_of(cost, row)
    return seconds / (1 - pipelines.waiting(config))
