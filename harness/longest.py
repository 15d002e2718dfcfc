"""The longest sequence that fits, found by the real out-of-memory of PyTorch's allocator.

Where layers are alike and many, a length is tried on a model of few layers, on a device that lacks what the other
layers hold: bytes are a straight line in the layers, which two small depths give.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from alst_impl.config import TrainConfig
from alst_impl.methods.base import load_method
from alst_impl.models import field, published
from harness.apart import apart
from harness.attempts import (
    Step,
    at_length,
    attempt,
    capacity_bytes,
    host_bytes,
    host_memory_bytes,
    roomy,
    sequence_parallel,
    with_train,
)
from harness.cell import Cell
from harness.depth import at_depth, structure
from harness.prediction import Limit, SearchResult
from harness.processes import Rank

STEP = 256
"""Lengths are searched in multiples of this many tokens per rank (the recipes' own advice)."""
PRECISION = 0.015
"""Relative width of the bracket at which a search ends."""
FULL = 0.97
"""Share of what the allocator may hold that a step allocates at most: blocks are rounded, and gaps are left."""
SMALL = (2, 4)
"""Depths that stand for all where layers are alike, in periods of the method."""
DEEP = 8
"""Periods from which on they do."""


class Use(NamedTuple):
    """Bytes of one device and of one node's host memory: of a step, or what there is."""

    device: float
    host: float


class Tried(NamedTuple):
    """A length that was tried."""

    use: Use
    exceeded: Limit | None
    """What it has too much of; None if it fits."""


Trial = Callable[[Cell], Tried]


def trial_of(rank: Rank, cell: Cell) -> Trial:
    """How lengths of `cell` are tried: on few layers where these stand for all, else whole."""
    return partial(_on_few_layers if _is_deep(cell) else _whole, rank)


def whole(rank: Rank) -> Trial:
    """Lengths are tried with all layers."""
    return partial(_whole, rank)


def _is_deep(cell: Cell) -> bool:
    """Whether small depths stand for all."""
    pipelined = load_method(cell.train.method).degrees(cell.train.world_size)["pp"] > 1
    deep = num_layers(cell) >= DEEP * period_of(cell) and num_layers(cell) % period_of(cell) == 0
    return deep and not pipelined and structure(cell.train).layers_alike


def _whole(rank: Rank, cell: Cell) -> Tried:
    (found,) = apart([partial(roomy, rank, cell)])
    return judged(cell, use_of(cell, found), fits=fits_in(rank, cell, found, capacity_bytes(cell)))


def _on_few_layers(rank: Rank, cell: Cell) -> Tried:
    few, more = (with_train(cell, at_depth(cell.train, depth)) for depth in depths(cell))
    (near,), (far,) = (apart([partial(roomy, rank, each)]) for each in (few, more))
    use = stretched(cell, near, far)
    left = capacity_bytes(cell) - int(use.device - far.allocated_bytes)
    return judged(cell, use, fits=fits_in(rank, more, far, left))


def fits_in(rank: Rank, cell: Cell, step: Step, device_bytes: int) -> bool:
    """Whether `step` of `cell`, which ran on a roomy device, also ends where the allocator has `device_bytes`.

    An allocator that never met the end of the device does there what it did; one that handed out more cannot.
    """
    if step.reserved_bytes <= device_bytes or step.allocated_bytes > device_bytes:
        return step.allocated_bytes <= device_bytes
    (found,) = apart([partial(attempt, rank, cell, device_bytes)])
    return isinstance(found, Step)


def depths(cell: Cell) -> tuple[int, int]:
    """Layers of the two models that stand for the whole."""
    near, far = SMALL
    return near * period_of(cell), far * period_of(cell)


def stretched(cell: Cell, near: Step, far: Step) -> Use:
    """What a step of all layers uses, from steps of few."""
    few, more = depths(cell)
    times = (num_layers(cell) - few) / (more - few)
    uses = (use_of(cell, step) for step in (near, far))
    return Use(*(a + times * (b - a) for a, b in zip(*uses, strict=True)))


def judged(cell: Cell, use: Use, *, fits: bool) -> Tried:
    """`use` with what it has too much of."""
    if not fits:
        return Tried(use, memory_limit(cell))
    return Tried(use, "host_memory" if use.host > host_memory_bytes(cell) else None)


def use_of(cell: Cell, step: Step) -> Use:
    """What `step` uses."""
    return Use(device=step.allocated_bytes, host=host_bytes(cell, step))


def memory_limit(cell: Cell) -> Limit:
    """What stops a sequence that is too long for a device."""
    return "heads" if _heads_are_spent(cell.train) else "gpu_memory"


def longest(rank: Rank, cell: Cell, trial: Trial, known: dict[int, Tried]) -> SearchResult:
    """The longest sequence of `cell`, in multiples of `STEP` tokens per rank.

    `known` are at least two lengths that were tried. Straight lines through the longest say where to look next.
    """
    unit, tried = STEP * sequence_parallel(cell.train), dict(known)
    low = max((n // unit for n, each in tried.items() if each.exceeded is None), default=0)
    failing = {-(-n // unit): each.exceeded for n, each in tried.items() if each.exceeded}
    high = min(failing, default=None)
    evaluations = len(tried)
    while high is None or high - low > max(1, int(PRECISION * high)):
        guess = _next_try(low, high, _crossing(cell, tried) / unit)
        rank.progress(f"searching for the longest sequence, at {guess * unit:,} tokens")
        tried[guess * unit] = found = trial(at_length(cell, guess * unit))
        evaluations += 1
        if found.exceeded is None:
            low = guess
        else:
            high = guess
            failing[guess] = found.exceeded
    limit = failing[high]
    assert limit is not None
    return SearchResult(
        longest_tokens=low * unit,
        shortest_failing_tokens=high * unit,
        limit=limit,
        evaluations=evaluations,
    )


def _next_try(low: int, high: int | None, meets: float) -> int:
    """A number between `low`, which fits, and `high`, which does not: on the side of `meets` that is wider."""
    half = max(1, int(PRECISION * meets * 0.45))
    if high is None:
        # A line through short lengths may miss by much, and each try is a whole step.
        return max(min(int(meets) + half, 16 * max(low, 64)), low + 1)
    guess = int(meets) + (half if high - meets > meets - low else -half)
    return guess if low < guess < high else (low + high) // 2


def _crossing(cell: Cell, tried: dict[int, Tried]) -> float:
    """Tokens at which straight lines through the two longest known steps meet the first limit."""
    limits = Use(device=FULL * capacity_bytes(cell), host=host_memory_bytes(cell))
    (x, near), (far, there) = sorted((n, each.use) for n, each in tried.items())[-2:]
    meets = [
        far + (limit - held) * (far - x) / max(held - before, 1)
        for before, held, limit in zip(near, there, limits, strict=True)
    ]
    return max(min(meets), 1.0)


def num_layers(cell: Cell) -> int:
    """Of the whole model."""
    return field(published(cell.train.model, cell.train.overrides), "num_hidden_layers")


def period_of(cell: Cell) -> int:
    """Layers after which a step repeats itself, on every stage."""
    method = load_method(cell.train.method)
    return method.period() * method.degrees(cell.train.world_size)["pp"]


def _heads_are_spent(config: TrainConfig) -> bool:
    """Whether ranks are left that cannot share a sample because the heads do not split over more."""
    method = load_method(config.method)
    fields = type(method).model_fields
    if "sp" not in fields or "cp" in fields:  # a ring takes any number of ranks
        return False
    heads = field(published(config.model, config.overrides), "num_attention_heads")
    largest = math.gcd(config.world_size, heads)
    return method.axes(config.world_size)["sp"] == largest < config.world_size
