"""Peak of pinned host memory of one process, the largest over ranks."""

from __future__ import annotations

from harness.records.record import Measurement

UNIT = "B"


def value(m: Measurement) -> float | None:
    """Most pinned host memory in use in the tracked step, each block rounded as the allocator does."""
    if m.readings is None:
        return None
    found = [rank.cuda.pinned_bytes for rank in m.readings.memory if rank.cuda is not None]
    return max((nbytes for nbytes in found if nbytes is not None), default=None)
