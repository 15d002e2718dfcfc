"""A step with all layers, stretched from two steps with few. Bytes and work are linear in the number of layers."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from alst_impl.methods.base import layouts, load_method
from alst_impl.models import described, field
from harness.cells.cell import Cell
from harness.cells.prediction import Cost, Holding
from harness.predict.attempts import Step, host_bytes, roomy, with_train
from harness.predict.depth import at_depth, structure
from harness.processes.apart import apart
from harness.processes.jobs import Rank

SMALL = (2, 4)
"""Depths, in periods of the method, of the two models to stretch."""
DEEP = 8
"""Minimum depth, in periods, of a model that is stretched to."""
ROUNDING = 512
"""PyTorch's allocator rounds every tensor to a multiple of this many bytes."""


class Use(NamedTuple):
    """Bytes that a step takes."""

    phases: dict[str, float]
    """Peak of one device in forward, backward and update. With layers and tokens each is a line; the peak is not."""
    host: float
    """Host memory of one node."""

    @property
    def device(self) -> float:
        """Peak of one device."""
        return max(self.phases.values())


def num_layers(cell: Cell) -> int:
    """Number of layers of the full model."""
    return field(described(cell.train.model, cell.train.overrides), "num_hidden_layers")


def period_of(cell: Cell) -> int:
    """Number of layers after which a step repeats itself, on every stage."""
    return load_method(cell.train.method).period() * layouts(cell.train)[0].pp


def is_deep(cell: Cell) -> bool:
    """Whether a step of `cell` can be stretched from few layers."""
    pipelined = layouts(cell.train)[0].pp > 1
    deep = num_layers(cell) >= DEEP * period_of(cell) and num_layers(cell) % period_of(cell) == 0
    return deep and not pipelined and structure(cell.train).layers_alike


def with_few_layers(
    rank: Rank, cell: Cell, *, counted: bool = False, explained: bool = False
) -> tuple[Step, Step]:
    """Steps of `cell` at the two depths to stretch from, one after the other."""
    near, far = (
        apart([partial(roomy, rank, of, counted=counted, explained=explained)])[0]
        for of in (with_train(cell, at_depth(cell.train, depth)) for depth in _depths(cell))
    )
    return near, far


def _depths(cell: Cell) -> tuple[int, int]:
    near, far = SMALL
    return near * period_of(cell), far * period_of(cell)


def _times(cell: Cell) -> float:
    few, more = _depths(cell)
    return (num_layers(cell) - few) / (more - few)


def use_of(cell: Cell, step: Step) -> Use:
    """Memory use of `step`."""
    return Use(phases=dict(step.memory.phase_peak_bytes), host=host_bytes(cell, step))


def stretched_use(cell: Cell, near: Step, far: Step) -> Use:
    """Memory use of a step with all layers."""
    few, more = (use_of(cell, step) for step in (near, far))
    return Use(
        phases={name: _stretched(cell, few.phases[name], more.phases[name]) for name in few.phases},
        host=_stretched(cell, few.host, more.host),
    )


def _stretched(cell: Cell, few: float, more: float) -> float:
    """A quantity of a step with all layers from that of two with few."""
    return few + _times(cell) * (more - few)


def stretched_cost(cell: Cell, near: Step, far: Step) -> Cost:
    """Work of a step with all layers; both steps were counted."""
    assert near.cost is not None
    assert far.cost is not None
    few, more = near.cost.model_dump(), far.cost.model_dump()
    return Cost(**{k: _stretched(cell, few[k], more[k]) for k in few})


def stretched_holdings(
    cell: Cell, near: Step, far: Step, allocated_bytes: int
) -> list[Holding] | None:
    """Allocations alive at the peak of a step with all layers, largest first; both steps were explained.

    None if they do not add up to `allocated_bytes`, the peak of that step: it then lies at another place.
    """
    few, more = (_by_line(step.holdings) for step in (near, far))
    found = []
    for what in dict.fromkeys([*few, *more]):
        sizes, counts = (
            [getattr(side[what], name) if what in side else 0 for side in (few, more)]
            for name in ("nbytes", "count")
        )
        nbytes, count = (round(_stretched(cell, *both)) for both in (sizes, counts))
        if nbytes:
            any_of = (more if what in more else few)[what]
            found.append(any_of.model_copy(update={"nbytes": nbytes, "count": count}))
    rounded = allocated_bytes - sum(each.nbytes for each in found)
    if min(each.nbytes for each in found) < 0:
        return None
    if not 0 <= rounded <= ROUNDING * sum(each.count for each in found):
        return None
    return sorted(found, key=lambda each: -each.nbytes)


def _by_line(holdings: list[Holding]) -> dict[tuple[str | None, ...], Holding]:
    """Holdings by the line that allocated them, or by category where none is known.

    The category is that of the largest of a line: it is told by addresses, which small tensors may inherit.
    """
    found: dict[tuple[str | None, ...], Holding] = {}
    for each in holdings:  # largest first
        line = (each.operator, each.location) if each.location else (each.category,)
        if line in found:
            other = found[line]
            sums = {"nbytes": each.nbytes + other.nbytes, "count": each.count + other.count}
            found[line] = other.model_copy(update=sums)
        else:
            found[line] = each
    return found
