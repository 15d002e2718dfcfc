"""Peak of PyTorch's CUDA allocator, the largest over ranks."""

from __future__ import annotations

from harness.records.record import Measurement

UNIT = "B"


def value(m: Measurement) -> float | None:
    """Largest `max_memory_allocated` of a phase of the tracked step: live tensors and kernel scratch."""
    if m.readings is None:
        return None
    found = [rank.cuda.allocated_bytes for rank in m.readings.memory if rank.cuda is not None]
    return max((max(phases.values()) for phases in found), default=None)
