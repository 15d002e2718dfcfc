"""The least time that a step can take: its counted work at the peaks of the datasheet. Imports no torch."""

from __future__ import annotations

from harness.cells.hardware import Hardware
from harness.cells.prediction import Cost


def least_seconds(cost: Cost, hardware: Hardware) -> float:
    """Lower bound on the time of `cost`: the longest time that one resource needs at its peak.

    A resource without a peak in `hardware` takes no time.
    """
    loads = [
        (cost.flops, hardware.bf16_flops),
        (cost.device_bytes, hardware.memory_bandwidth),
        (max(cost.host_in_bytes, cost.host_out_bytes), hardware.host_bandwidth),
        (cost.link_bytes - cost.network_bytes, hardware.intra_node_bandwidth),
        (cost.network_bytes, hardware.inter_node_bandwidth),
    ]
    return max((load / peak for load, peak in loads if peak), default=0.0)
