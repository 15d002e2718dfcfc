"""Models step time with two constants: the rate of matrix products and the rate of attention.

Both rates are of an H100 with FlashAttention-2, fitted on two published rows. On other hardware
they scale with the peak FLOP/s. Copies, collectives and the update are assumed to overlap or to be
negligible. A lower bound is computed too: the time of a step's counted work at datasheet peaks.
"""

from __future__ import annotations

from harness.cells.hardware import Hardware, load_hardware
from harness.cells.prediction import Cost
from harness.formulas.flops import Shape, attention_forward, linear_forward

LINEAR_PASSES = 4
"""Passes of matrix products: forward, recomputed forward, and two for backward."""
ATTENTION_PASSES = 4.5
"""Passes of attention: as above, with 2.5 for FlashAttention's backward, which has five matrix
products to forward's two."""
FITTED_ON = ("8gpu_plus_tiled_loss", "8gpu_all")
"""Rows of `experiments/published/alst_tflops_crosscheck.csv` that the two rates were fitted on.
They are not evidence."""
LINEAR_RATE = 288.1e12
"""FLOP/s of matrix products with parameters, fitted."""
ATTENTION_RATE = 335.0e12
"""FLOP/s of causal attention, masked scores not counted, fitted."""
REFERENCE = "h100-80gb"
"""Hardware of the fitted rows."""


def speed(hardware: Hardware) -> float:
    """Factor on the rates above: peak FLOP/s relative to `REFERENCE`."""
    reference = load_hardware(REFERENCE).bf16_flops
    assert reference is not None
    return (hardware.bf16_flops or reference) / reference


def seconds(shape: Shape, seqlen: int, hardware: Hardware) -> float:
    """Seconds of one sequence on one GPU, with the passes of the published runs."""
    linear = LINEAR_PASSES * linear_forward(shape, seqlen)
    attention = ATTENTION_PASSES * attention_forward(shape, seqlen)
    return _at_rates(linear, attention, hardware)


def seconds_of(cost: Cost, hardware: Hardware) -> float:
    """Seconds of a step, from its counted work."""
    return _at_rates(cost.matmul_flops, cost.attention_flops, hardware)


def _at_rates(linear: float, attention: float, hardware: Hardware) -> float:
    return (linear / LINEAR_RATE + attention / ATTENTION_RATE) / speed(hardware)


def least_seconds(cost: Cost, hardware: Hardware, world_size: int) -> float:
    """Lower bound on the time of `cost`: the longest time that one resource needs at its peak.

    A resource without a peak in `hardware` takes no time.
    """
    within = world_size <= hardware.devices_per_node
    links = hardware.intra_node_bandwidth if within else hardware.inter_node_bandwidth
    loads = [
        (cost.flops, hardware.bf16_flops),
        (cost.device_bytes, hardware.memory_bandwidth),
        (max(cost.host_in_bytes, cost.host_out_bytes), hardware.host_bandwidth),
        (cost.link_bytes, links),
    ]
    return max((load / peak for load, peak in loads if peak), default=0.0)
