"""Forecast of a cell: a step on a phantom device, its work, the memory of one more token, the longest sequence."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from alst_impl.config import Frozen, TrainConfig
from alst_impl.engines.base import load_engine
from alst_impl.methods.base import load_method, step_samples
from alst_impl.models import described, hf_config
from alst_impl.ops.attention.cores.base import load_core
from harness.cells.cell import Cell, host_memory_bytes
from harness.cells.hardware import load_hardware
from harness.cells.prediction import (
    Cost,
    Flops,
    Holding,
    Limit,
    Prediction,
    SearchResult,
    Simulated,
)
from harness.devices.machine import require_attention
from harness.devices.outside import outside_bytes
from harness.formulas import flops, pipelines, roofline, steptime
from harness.predict.attempts import (
    Step,
    at_length,
    attempt,
    capacity_bytes,
    require_thinkable,
    roomy,
    sequence_parallel,
    with_train,
)
from harness.predict.depth import at_depth, structure
from harness.predict.longest import (
    FULL,
    exceeded,
    longest,
    memory_limit,
    near_longest,
    use_on_roomy,
)
from harness.predict.stretch import (
    Use,
    is_deep,
    num_layers,
    period_of,
    stretched_cost,
    stretched_holdings,
    stretched_use,
    use_of,
    with_few_layers,
)
from harness.processes.apart import apart
from harness.processes.jobs import Rank
from harness.records.sources import fingerprint
from harness.worlds.base import RankReadings

HOLDINGS = 40
"""Maximum number of holdings in a record."""


def execute(rank: Rank, payload: dict[str, Any]) -> dict[str, Any]:
    """`forecast` of `payload["cell"]` as plain data."""
    # The caller's search path lacks the folders that only phantom processes have. They come first, because PyTorch's
    # compiler starts processes with this path, which must find the CUDA build.
    ours = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [*ours, *(folder for folder in sys.path if folder not in ours)]
    cell = Cell(**payload["cell"])
    load_method(cell.train.method).require()
    require_attention(cell.train.attention)
    return forecast(rank, cell).model_dump(mode="json")


class Forecast(Frozen):
    """Result of a forecast."""

    simulated: Simulated
    readings: RankReadings
    """Readings of the tracked step, on a device on which it fits."""


class Around(Frozen):
    """Results of the runs of a cell besides the step at its own length."""

    few: tuple[Step, Step] | None
    """Counted and explained steps with few layers; None if `cell` has few itself."""
    cost: Cost | None
    """None if the attention is compiled."""
    slope: float
    """Increase of allocated bytes per token of one rank."""
    uses: dict[int, Use]
    """Length -> memory use. Includes lengths near the longest if the cell requests a search."""


def forecast(rank: Rank, cell: Cell) -> Forecast:
    """Run a step of `cell`, measure the memory of one more token, and search for the longest sequence if requested.

    Raises `ValueError` if the token ids alone exceed a device's memory.
    """
    assert cell.simulation is not None
    require_thinkable(cell)
    if cell.simulation.part != "step":
        return _part(rank, cell)
    rank.progress("running a step on a phantom device")
    # Concurrent, because the full step takes about as long as all runs with few layers.
    calls: list[Callable[[], Step | Around]] = [
        partial(roomy, rank, cell, explained=not is_deep(cell)),
        partial(_around, rank, cell),
    ]
    step, around = apart(calls)
    assert isinstance(step, Step)
    assert isinstance(around, Around)
    step = _explained(rank, cell, step, around)
    step, fits = _on_its_device(rank, cell, step)
    search = None
    if cell.simulation.search:
        own = memory_limit(cell) if not fits else exceeded(cell, step)
        uses = {**around.uses, cell.train.seqlen: use_of(cell, step)}
        search = longest(rank, cell, own, uses)
    prediction = _prediction(cell, step, around.cost, fits, around.slope)
    return Forecast(simulated=_seen(step, prediction, search), readings=step.readings)


def estimate(rank: Rank, cell: Cell) -> tuple[Prediction, Use]:
    """Prediction and memory use of a step of `cell`, from few layers if they are many and alike. No allocator says what
    it reserves: the step fits if `FULL` of the capacity is not exceeded.

    Raises `ValueError` if a step takes more than a phantom device can have.
    """
    require_thinkable(cell)
    if is_deep(cell):
        few = with_few_layers(rank, cell, counted=True)
        use, cost = stretched_use(cell, *few), stretched_cost(cell, *few)
    else:
        (step,) = apart([partial(roomy, rank, cell, counted=True)])
        assert step.cost is not None
        use, cost = use_of(cell, step), step.cost
    fits = use.device <= FULL * capacity_bytes(cell)
    return _assembled(cell, use, None, cost, fits), use


def confirmed(rank: Rank, cell: Cell, estimated: Prediction) -> Prediction:
    """`estimated` with the memory use of a whole step of `cell` on a device of its size."""
    (step,) = apart([partial(roomy, rank, cell)])
    step, fits = _on_its_device(rank, cell, step)
    return _assembled(cell, use_of(cell, step), step.reserved_bytes, estimated.cost, fits)


def _around(rank: Rank, cell: Cell) -> Around:
    """Work, slope and memory uses of `cell`, from steps that run one after the other."""
    assert cell.simulation is not None
    more = longer(cell)
    work = not load_core(cell.train.attention).compiled  # else a part of it cannot be counted
    few = with_few_layers(rank, cell, counted=work, explained=True) if is_deep(cell) else None
    cost = None
    if work:
        cost = counted(rank, cell) if few is None else stretched_cost(cell, *few)
    own = use_on_roomy(rank, cell) if few is None else stretched_use(cell, *few)
    uses = {cell.train.seqlen: own, more.train.seqlen: use_on_roomy(rank, more)}
    slope = _slope(cell, more, uses)
    if slope <= 0:  # a tile more makes each tile smaller; at twice the length that is averaged out
        more = at_length(cell, 2 * cell.train.seqlen)
        slope = _slope(cell, more, {**uses, more.train.seqlen: use_on_roomy(rank, more)})
    if cell.simulation.search:
        uses = near_longest(rank, cell, uses)
    return Around(few=few, cost=cost, slope=slope, uses=uses)


def _slope(cell: Cell, more: Cell, uses: dict[int, Use]) -> float:
    """Increase of allocated bytes per token of one rank from `cell` to the longer `more`."""
    here, beyond = (uses[of.train.seqlen].device for of in (cell, more))
    tokens = (more.train.seqlen - cell.train.seqlen) / sequence_parallel(cell.train)
    return (beyond - here) / tokens


def _explained(rank: Rank, cell: Cell, step: Step, around: Around) -> Step:
    """`step` with the allocations alive at its peak: stretched from few layers where that adds up."""
    if around.few is None:
        return step
    holdings = stretched_holdings(cell, *around.few, step.allocated_bytes)
    if holdings is None:
        rank.progress("looking for what is alive at the peak")
        return apart([partial(roomy, rank, cell, explained=True)])[0]
    return step.model_copy(update={"holdings": holdings})


def _on_its_device(rank: Rank, cell: Cell, step: Step) -> tuple[Step, bool]:
    """`step`, run on a roomy device, as it is on a device of the cell's size, and whether it fits there.

    It runs again only if reserved bytes exceed the capacity and allocated bytes do not.
    """
    capacity = capacity_bytes(cell)
    if step.reserved_bytes <= capacity or step.allocated_bytes > capacity:
        return step, step.allocated_bytes <= capacity
    rank.progress("running it on a device of its own size")
    (tried,) = apart([partial(attempt, rank, cell, capacity)])
    if not isinstance(tried, Step):
        return step, False
    return tried.model_copy(update={"holdings": step.holdings}), True


def _part(rank: Rank, cell: Cell) -> Forecast:
    """Forecast of a part of a step. A part has no limits to exceed."""
    rank.progress("running it on a phantom device")
    (step,) = apart([partial(roomy, rank, cell, explained=True)])
    return Forecast(simulated=_seen(step, None, None), readings=step.readings)


def counted(rank: Rank, cell: Cell) -> Cost:
    """Counted work of a step of `cell` with few layers. Beyond two that are alike it is extrapolated linearly."""
    period, layers = period_of(cell), num_layers(cell)
    straight = structure(cell.train).layers_alike and layers % period == 0 and layers > 2 * period
    depths = (period, 2 * period) if straight else (layers,)
    costs = []
    for depth in depths:
        of = with_train(cell, at_depth(cell.train, depth))
        (step,) = apart([partial(roomy, rank, of, counted=True)])
        assert step.cost is not None
        costs.append(step.cost)
    if not straight:
        return costs[0]
    one, two = (cost.model_dump() for cost in costs)
    return Cost(**{k: one[k] + (layers // period - 1) * (two[k] - one[k]) for k in one})


def longer(cell: Cell) -> Cell:
    """The same run with sequences two per cent longer, by at least one token per rank."""
    ranks = sequence_parallel(cell.train)
    return at_length(cell, cell.train.seqlen + max(cell.train.seqlen // ranks // 50, 1) * ranks)


def _prediction(cell: Cell, step: Step, cost: Cost | None, fits: bool, slope: float) -> Prediction:
    """The prediction from a completed step."""
    found = _assembled(cell, use_of(cell, step), step.reserved_bytes, cost, fits)
    by_category = _by_category(step.holdings)
    return found.model_copy(update={"bytes_per_local_token": slope, "by_category": by_category})


def _assembled(
    cell: Cell, use: Use, reserved_bytes: int | None, cost: Cost | None, fits: bool
) -> Prediction:
    """The prediction of a step that uses `use` and does `cost`."""
    allocated, host = int(use.device), int(use.host)
    total = (reserved_bytes or allocated) + outside_bytes(cell.train)
    limit: Limit = "none"
    if not fits:
        limit = memory_limit(cell)
    elif host > host_memory_bytes(cell):
        limit = "host_memory"
    return Prediction(
        allocated_bytes=allocated,
        reserved_bytes=reserved_bytes,
        overhead_bytes=total - allocated,
        total_bytes=total,
        host_bytes=host,
        bytes_per_local_token=None,
        by_category={},
        fits=limit == "none",
        limit=limit,
        flops=_flops(cell.train),
        cost=cost,
        **_time(cell, cost),
    )


def _seen(step: Step, prediction: Prediction | None, search: SearchResult | None) -> Simulated:
    """The part of a step that goes into the record."""
    assert step.memory.cuda is not None
    return Simulated(
        code=fingerprint(),
        prediction=prediction,
        peak_bytes=step.allocated_bytes,
        phase_peak_bytes=step.memory.cuda.allocated_bytes,
        reserved_bytes=step.reserved_bytes,
        checkpoint_bytes=step.memory.host_peak_bytes,
        holdings=step.holdings[:HOLDINGS],
        search=search,
        timeline=step.timeline,
    )


def _by_category(holdings: list[Holding]) -> dict[str, int]:
    found: dict[str, int] = {}
    for each in holdings:
        found[each.category] = found.get(each.category, 0) + each.nbytes
    return found


def _sequences(config: TrainConfig) -> int:
    """Sequences of one step, over all ranks."""
    return step_samples(config)


def _flops(config: TrainConfig) -> Flops:
    parts, fields = structure(config), described(config.model, config.overrides)
    # Which layers have a window is often left to the configuration's class.
    kinds = getattr(hf_config(config).get_text_config(decoder=True), "layer_types", None)
    fields = {**fields, **({"layer_types": kinds} if kinds else {})}
    shape = flops.shape_of(fields, parts.num_parameters, parts.num_expert_parameters)
    frozen = 1 - parts.num_trained_parameters / parts.num_parameters
    documents = config.data.lengths(config.seqlen, config.seed, 0)
    pattern = load_core(config.attention).pattern
    return Flops(
        paper_formula=_sequences(config) * flops.paper_formula(shape, config.seqlen),
        model_causal=_sequences(config) * flops.model_causal(shape, documents, frozen, pattern),
    )


def _time(cell: Cell, cost: Cost | None) -> dict[str, Any]:
    """The fields of a prediction that are about time."""
    if cost is None:
        return {
            "step_seconds_modelled": None,
            "time_unknown": "the work of the step was not counted",
        }
    assert cell.simulation is not None
    config, row = cell.train, load_hardware(cell.hardware)
    on_host = load_engine(config.engine).updates_on_host
    found: dict[str, Any] = {"least_seconds_modelled": roofline.least_seconds(cost, row)}
    try:
        time = steptime.step_time(
            cost,
            row,
            kernel=cell.simulation.timed_as or config.attention.name,
            ranks=config.world_size,
            host_parameters=structure(config).num_trained_parameters if on_host else 0,
            bubble=pipelines.waiting(config),
        )
    except steptime.Unknown as error:
        return {**found, "step_seconds_modelled": None, "time_unknown": str(error)}
    return {**found, "step_seconds_modelled": time.seconds, "time": time}
