"""Pipeline schedules over sequence slices as data, and their simulated cost. Imports no torch.

Source: Seq1F1B (arXiv:2406.03488). With one slice it is 1F1B (PipeDream-Flush, arXiv:2006.09503).
`alst_impl.ops.pipeline.executor` runs the same orders that are simulated here.
Legend: P stages, M micro-batches, k slices of a sequence, S tokens of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Unit(NamedTuple):
    """Forward or backward of one slice of one micro-batch through the layers of one stage."""

    backward: bool
    micro_batch: int
    part: int
    """Index of the slice."""


class Span(NamedTuple):
    """A unit with its start and stop times."""

    unit: Unit
    start_s: float
    stop_s: float


def seq1f1b(stages: int, micro_batches: int, parts: int, stage: int) -> list[Unit]:
    """The order of `stage`: P - stage + k - 2 warm-up forwards, then one forward, one backward, then the rest.

    Forwards run in order. Backwards run by micro-batch, last slice first, because no other slice attends to
    its keys and values. So when a slice runs backward, all later slices have added their gradients of its
    keys and values.
    """
    forwards = [Unit(False, m, i) for m in range(micro_batches) for i in range(parts)]
    backwards = [Unit(True, m, i) for m in range(micro_batches) for i in reversed(range(parts))]
    warm_up = min(stages - stage + parts - 2, len(forwards))
    order = forwards[:warm_up]
    for forward, backward in zip(forwards[warm_up:], backwards, strict=False):
        order += [forward, backward]
    return order + backwards[len(forwards) - warm_up :]


def orders(stages: int, micro_batches: int, parts: int) -> list[list[Unit]]:
    """`seq1f1b` of every stage."""
    return [seq1f1b(stages, micro_batches, parts, stage) for stage in range(stages)]


# -- what a schedule costs ------------------------------------------------------------------------


def play(
    orders: Sequence[Sequence[Unit]],
    seconds: Callable[[int, Unit], float],
    transfer_s: float = 0.0,
) -> list[list[Span]]:
    """Simulate the orders: each unit starts as soon as its stage is free and its inputs are ready.

    `seconds(stage, unit)` is the duration of a unit. Raises `ValueError` for a deadlock, also if an order has
    a unit before another that it depends on.
    """
    parts = 1 + max((unit.part for order in orders for unit in order), default=0)
    stops: dict[tuple[int, Unit], float] = {}
    played: list[list[Span]] = [[] for _ in orders]
    moved = True
    while moved:
        moved = False
        for stage, order in enumerate(orders):
            while len(played[stage]) < len(order):
                unit = order[len(played[stage])]
                ready = _ready(stage, unit, len(orders), parts, stops, transfer_s)
                if ready is None:
                    break
                start = max(ready, played[stage][-1].stop_s if played[stage] else 0.0)
                stops[stage, unit] = start + seconds(stage, unit)
                played[stage].append(Span(unit, start, stops[stage, unit]))
                moved = True
    _refuse_deadlock(orders, played)
    return played


def _ready(
    stage: int,
    unit: Unit,
    stages: int,
    parts: int,
    stops: dict[tuple[int, Unit], float],
    transfer_s: float,
) -> float | None:
    """Time at which all inputs of `unit` are ready; None if that is not known yet."""
    backward, _, part = unit
    here, times = [], [0.0]
    if backward:
        here.append(unit._replace(backward=False))
    if 0 <= (before := part + 1 if backward else part - 1) < parts:
        here.append(unit._replace(part=before))
    for needed in here:
        if (stage, needed) not in stops:
            return None
        times.append(stops[stage, needed])
    neighbour = stage + 1 if backward else stage - 1
    if 0 <= neighbour < stages:
        if (neighbour, unit) not in stops:
            return None
        times.append(stops[neighbour, unit] + transfer_s)
    return max(times)


def _refuse_deadlock(orders: Sequence[Sequence[Unit]], played: Sequence[Sequence[Span]]) -> None:
    stuck = [
        f"stage {stage} at {'backward' if unit.backward else 'forward'} of slice {unit.part} of "
        f"micro-batch {unit.micro_batch}"
        for stage, (order, spans) in enumerate(zip(orders, played, strict=True))
        for unit in order[len(spans) : len(spans) + 1]
    ]
    if stuck:
        raise ValueError(f"the order is a deadlock: {', '.join(stuck)} wait for ever")


def makespan(played: Sequence[Sequence[Span]]) -> float:
    """Seconds from the first unit's start to the last one's end."""
    return max(spans[-1].stop_s for spans in played)


def bubble(played: Sequence[Sequence[Span]]) -> float:
    """Fraction of the stages' total time that they are idle."""
    busy = sum(span.stop_s - span.start_s for spans in played for span in spans)
    return 1 - busy / (len(played) * makespan(played))


def peak_live(order: Sequence[Unit], sizes: Sequence[float]) -> float:
    """Peak of the summed `sizes` (by slice) of units that have run forward and not yet backward on a stage."""
    live = peak = 0.0
    for backward, _, part in order:
        live += -sizes[part] if backward else sizes[part]
        peak = max(peak, live)
    return peak


# -- slices ---------------------------------------------------------------------------------------


def equal_lengths(seqlen: int, parts: int) -> list[int]:
    """Boundaries of slices whose lengths differ by at most one token: 0, ..., S."""
    return [seqlen * i // parts for i in range(parts + 1)]


def equal_flops(seqlen: int, parts: int, per_token: float, per_pair: float) -> list[int]:
    """Boundaries of slices of equal work ("computation-wise", arXiv:2406.03488): 0, ..., S.

    `per_token` is the work of a token without attention, `per_pair` that of a visible (query, key) pair.
    Rounded to tokens; no slice is empty.
    """
    square, linear = per_pair / 2, per_token + per_pair / 2
    whole = square * seqlen**2 + linear * seqlen
    borders = [0]
    for i in range(1, parts):
        work = whole * i / parts
        # The root of square e^2 + linear e = work, in a form that stays accurate for a small `square`.
        end = round(2 * work / (linear + math.sqrt(linear**2 + 4 * square * work)))
        borders.append(min(max(end, borders[-1] + 1), seqlen - parts + i))
    return [*borders, seqlen]
