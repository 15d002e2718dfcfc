"""The longest sequence that fits, found by the real out-of-memory of PyTorch's allocator.

Every verdict is of a step with all layers. Where to look first is said by models of few layers, where layers are
alike and many: allocated bytes are a straight line in them.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

from alst_impl.config import TrainConfig
from alst_impl.methods.base import load_method
from alst_impl.models import field, published
from harness.cells.cell import Cell
from harness.cells.prediction import Limit, SearchResult
from harness.predict.attempts import (
    Exceeded,
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
from harness.predict.depth import at_depth, structure
from harness.processes.apart import apart
from harness.processes.jobs import Rank

STEP = 256
"""Lengths are searched in multiples of this many tokens per rank (the recipes' own advice)."""
PRECISION = 0.015
"""Relative width of the bracket at which a search ends."""
FULL = 0.975
"""Share of what the allocator may hold that a step allocates at most: blocks are rounded, and gaps are left."""
SMALL = (2, 4)
"""Depths that stand for all where layers are alike, in periods of the method."""
DEEP = 8
"""Periods from which on they do."""
LOOKS = 2
"""Lengths that are looked at on few layers."""


class Use(NamedTuple):
    """Bytes of one device and of one node's host memory: of a step, or what there is."""

    device: float
    host: float


def use_on_roomy(rank: Rank, cell: Cell) -> Use:
    """What a step uses that may not fit: from few layers where these stand for all, else whole."""
    if not _is_deep(cell):
        (step,) = apart([partial(roomy, rank, cell)])
        return use_of(cell, step)
    few, more = (with_train(cell, at_depth(cell.train, depth)) for depth in depths(cell))
    (near,), (far,) = (apart([partial(roomy, rank, each)]) for each in (few, more))
    return stretched(cell, near, far)


def near_longest(rank: Rank, cell: Cell, known: dict[int, Use]) -> dict[int, Use]:
    """`known` uses by length, and those of lengths near the longest, found on few layers where these stand for all."""
    unit, found = STEP * sequence_parallel(cell.train), dict(known)
    for _ in range(LOOKS if _is_deep(cell) else 0):
        seqlen = max(int(_crossing(cell, found) / unit), 1) * unit
        found[seqlen] = use_on_roomy(rank, at_length(cell, seqlen))
    return found


def _is_deep(cell: Cell) -> bool:
    """Whether small depths stand for all."""
    pipelined = load_method(cell.train.method).degrees(cell.train.world_size)["pp"] > 1
    deep = num_layers(cell) >= DEEP * period_of(cell) and num_layers(cell) % period_of(cell) == 0
    return deep and not pipelined and structure(cell.train).layers_alike


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


def use_of(cell: Cell, step: Step) -> Use:
    """What `step` uses."""
    return Use(device=step.allocated_bytes, host=host_bytes(cell, step))


def memory_limit(cell: Cell) -> Limit:
    """What stops a sequence that is too long for a device."""
    return "heads" if _heads_are_spent(cell.train) else "gpu_memory"


def exceeded(cell: Cell, tried: Step | Exceeded) -> Limit | None:
    """What a step on the cell's own device has too much of; None of one that fits."""
    if isinstance(tried, Exceeded):
        return memory_limit(cell)
    return "host_memory" if host_bytes(cell, tried) > host_memory_bytes(cell) else None


def longest(rank: Rank, cell: Cell, own: Limit | None, known: dict[int, Use]) -> SearchResult:
    """The longest sequence of `cell`, in multiples of `STEP` tokens per rank.

    A step of the cell's own length has too much of `own`. Straight lines through what is `known` say where to look,
    on both sides at a time.
    """
    unit, uses, length = STEP * sequence_parallel(cell.train), dict(known), cell.train.seqlen
    low, high = (length // unit, None) if own is None else (0, -(-length // unit))
    limit: Limit = own or "gpu_memory"
    evaluations, stride = len(known), 1
    while high is None or high - low > max(1, int(PRECISION * high)):
        tries = _next_tries(low, high, int(_crossing(cell, uses) / unit), stride)
        stride *= 4
        lengths = " and ".join(f"{n * unit:,}" for n in tries)
        rank.progress(f"searching for the longest sequence, at {lengths} tokens")
        cells = [at_length(cell, n * unit) for n in tries]
        found = apart([partial(attempt, rank, each, capacity_bytes(cell)) for each in cells])
        evaluations += len(tries)
        for n, each in zip(tries, found, strict=True):
            over = exceeded(cell, each)
            if isinstance(each, Step):
                uses[n * unit] = use_of(cell, each)
            if over is None:
                low = max(low, n)
            elif high is None or n < high:
                high, limit = n, over
    return SearchResult(
        longest_tokens=low * unit,
        shortest_failing_tokens=high * unit,
        limit=limit,
        evaluations=evaluations,
    )


def _next_tries(low: int, high: int | None, guess: int, stride: int) -> list[int]:
    """One or two numbers to try: around `guess`, else where they cut the range from `low`, which fits, to `high`, which does not.

    Where nothing failed yet they lie further beyond `low` from time to time, by `stride`.
    """
    half = max(1, int(PRECISION * guess * 0.45))
    if high is None:
        # A line through short lengths may miss by much, and each try is a whole step.
        around = min(max(guess, low + (stride - 1) * half), 16 * max(low, 64))
        return sorted({max(around - half, low + 1), max(around + half * stride, low + 2)})
    if guess + half >= high or guess - half <= low:
        third = (high - low) // 3
        return sorted({low + third, high - third} - {low, high}) or [low + 1]
    return sorted({guess - half, guess + half})


def _crossing(cell: Cell, known: dict[int, Use]) -> float:
    """Tokens at which straight lines through the two longest known uses meet the first limit."""
    limits = Use(device=FULL * capacity_bytes(cell), host=host_memory_bytes(cell))
    (x, near), (far, there) = sorted(known.items())[-2:]
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
