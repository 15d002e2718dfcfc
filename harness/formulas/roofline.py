"""Step time modelled with two constants: how fast matrix products run, and how fast attention does.

Both are rates on an H100 with FlashAttention-2, fitted on two named published rows; on other hardware
they scale with the peak FLOP/s. Copies, collectives and the update are taken to hide or to vanish.
Beside it stands a bound: what the counted work of a step takes at the peaks of the datasheet.
"""

from __future__ import annotations

from harness.cells.hardware import Hardware, load_hardware
from harness.cells.prediction import Cost
from harness.formulas.flops import Shape, attention_forward, linear_forward

LINEAR_PASSES = 4
"""Forward, recomputed forward, and a backward of two products."""
ATTENTION_PASSES = 4.5
"""As above with FlashAttention's backward, five products for the two of forward."""
FITTED_ON = ("8gpu_plus_tiled_loss", "8gpu_all")
"""Rows of `experiments/published/alst_tflops_crosscheck.csv` that give the two rates; no evidence."""
LINEAR_RATE = 288.1e12
"""FLOP/s of matrix products with parameters, fitted."""
ATTENTION_RATE = 335.0e12
"""FLOP/s of causal attention, masked scores not counted, fitted."""
REFERENCE = "h100-80gb"
"""The hardware of those rows."""


def speed(hardware: Hardware) -> float:
    """Times the rates above, by peak FLOP/s."""
    reference = load_hardware(REFERENCE).bf16_flops
    assert reference is not None
    return (hardware.bf16_flops or reference) / reference


def seconds(shape: Shape, seqlen: int, hardware: Hardware) -> float:
    """Seconds that one GPU would take for one sequence, by the passes of the published runs."""
    linear = LINEAR_PASSES * linear_forward(shape, seqlen)
    attention = ATTENTION_PASSES * attention_forward(shape, seqlen)
    return _at_rates(linear, attention, hardware)


def seconds_of(cost: Cost, hardware: Hardware) -> float:
    """Seconds of a step, by what was counted of it."""
    return _at_rates(cost.matmul_flops, cost.attention_flops, hardware)


def _at_rates(linear: float, attention: float, hardware: Hardware) -> float:
    return (linear / LINEAR_RATE + attention / ATTENTION_RATE) / speed(hardware)


def least_seconds(cost: Cost, hardware: Hardware, world_size: int) -> float:
    """The longest that one of the resources is busy at its peak: no schedule of this work is faster.

    A resource that `hardware` does not know takes no time.
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
