"""Searches for the longest sequence that fits, with the real out-of-memory error of PyTorch's allocator.

Every verdict is of a step with all layers. If layers are many and alike, models with few layers
give the first guess, because allocated bytes are linear in the number of layers.
"""

from __future__ import annotations

import math
from functools import partial

from alst_impl.config import TrainConfig
from alst_impl.methods.base import layouts, load_method
from alst_impl.models import described, field
from harness.cells.cell import Cell, host_memory_bytes
from harness.cells.prediction import Limit, SearchResult
from harness.cells.units import length_text
from harness.predict.attempts import (
    Exceeded,
    Step,
    at_length,
    attempt,
    capacity_bytes,
    host_bytes,
    roomy,
    sequence_parallel,
)
from harness.predict.stretch import Use, is_deep, stretched_use, use_of, with_few_layers
from harness.processes.apart import apart
from harness.processes.jobs import Rank

STEP = 256
"""Lengths are searched in multiples of this many tokens per rank, as the recipes advise."""
PRECISION = 0.015
"""Relative width of the bracket at which a search ends."""
FULL = 0.975
"""Assumed share of the allocator's capacity that a step can allocate. Rounded blocks and
fragmentation take the rest."""
LOOKS = 2
"""Number of lengths that are tried with few layers."""


def use_on_roomy(rank: Rank, cell: Cell) -> Use:
    """Memory use of a step that may not fit: extrapolated from few layers if possible, else from the full model."""
    if not is_deep(cell):
        (step,) = apart([partial(roomy, rank, cell)])
        return use_of(cell, step)
    return stretched_use(cell, *with_few_layers(rank, cell))


def near_longest(rank: Rank, cell: Cell, known: dict[int, Use]) -> dict[int, Use]:
    """`known` uses by length, plus extrapolated uses at lengths near the longest. Unchanged if
    extrapolation is not possible.
    """
    unit, found = STEP * sequence_parallel(cell.train), dict(known)
    for _ in range(LOOKS if is_deep(cell) else 0):
        seqlen = max(int(crossing(cell, found) / unit), 1) * unit
        found[seqlen] = use_on_roomy(rank, at_length(cell, seqlen))
    return found


def memory_limit(cell: Cell) -> Limit:
    """The limit of a sequence that is too long for a device."""
    return "heads" if _heads_are_spent(cell.train) else "gpu_memory"


def exceeded(cell: Cell, tried: Step | Exceeded) -> Limit | None:
    """The limit that a step on the cell's own device exceeds; None if it fits."""
    if isinstance(tried, Exceeded):
        return memory_limit(cell)
    return "host_memory" if host_bytes(cell, tried) > host_memory_bytes(cell) else None


def longest(rank: Rank, cell: Cell, own: Limit | None, known: dict[int, Use]) -> SearchResult:
    """The longest sequence of `cell`, in multiples of `STEP` tokens per rank.

    `own` is the limit that the cell's own length exceeds; None if it fits. The guess is a linear
    extrapolation of the `known` uses. Each round tries a length on either side of the guess.
    """
    unit, uses, length = STEP * sequence_parallel(cell.train), dict(known), cell.train.seqlen
    low, high = (length // unit, None) if own is None else (0, -(-length // unit))
    limit: Limit = own or "gpu_memory"
    evaluations, stride = len(known), 1
    while high is None or high - low > max(1, int(PRECISION * high)):
        tries = _next_tries(low, high, int(crossing(cell, uses) / unit), stride)
        stride *= 4
        lengths = " and ".join(length_text(n * unit) for n in tries)
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
    """One or two lengths to try, in units: around `guess`, or at the thirds of the bracket if
    `guess` is too close to its ends.

    `low` fits and `high` does not; `high` is None until a length has failed. Until then the tries
    move further beyond `low` as `stride` grows.
    """
    half = max(1, int(PRECISION * guess * 0.45))
    if high is None:
        # An extrapolation from short lengths may be far off, and each try is a full step.
        around = min(max(guess, low + (stride - 1) * half), 16 * max(low, 64))
        return sorted({max(around - half, low + 1), max(around + half * stride, low + 2)})
    if guess + half >= high or guess - half <= low:
        third = (high - low) // 3
        return sorted({low + third, high - third} - {low, high}) or [low + 1]
    return sorted({guess - half, guess + half})


def crossing(cell: Cell, known: dict[int, Use]) -> float:
    """Tokens at which the first limit is met, by lines through the two longest known uses: one for each phase,
    because the peak of short sequences may lie in the update, which has no more bytes for more tokens.
    """
    (x, near), (far, there) = sorted(known.items())[-2:]
    room = FULL * capacity_bytes(cell)
    lines = [(near.phases[name], there.phases[name], room) for name in near.phases]
    lines.append((near.host, there.host, host_memory_bytes(cell)))
    meets = [
        far + (limit - held) * (far - x) / max(held - before, 1) for before, held, limit in lines
    ]
    return max(min(meets), 1.0)


def _heads_are_spent(config: TrainConfig) -> bool:
    """Whether sp is at its maximum although more ranks exist, because the heads do not split further."""
    method = load_method(config.method)
    fields = type(method).model_fields
    if "sp" not in fields or "cp" in fields:  # a ring takes any number of ranks
        return False
    heads = field(described(config.model, config.overrides), "num_attention_heads")
    largest = math.gcd(config.world_size, heads)
    return layouts(config)[0].sp == largest < config.world_size
