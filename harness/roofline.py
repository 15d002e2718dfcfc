"""Step time modelled with two constants: how fast matrix products run, and how fast attention does.

Both are rates on an H100 with FlashAttention-2, fitted on two named published rows; on other hardware
they scale with the peak FLOP/s. Copies, collectives and the update are taken to hide or to vanish.
"""

from __future__ import annotations

from harness.flops import Shape, attention_forward, linear_forward
from harness.hardware import Hardware, load_hardware

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
    """Seconds that one GPU would take for one sequence."""
    linear = LINEAR_PASSES * linear_forward(shape, seqlen) / LINEAR_RATE
    attention = ATTENTION_PASSES * attention_forward(shape, seqlen) / ATTENTION_RATE
    return (linear + attention) / speed(hardware)
