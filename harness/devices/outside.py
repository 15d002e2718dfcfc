"""What a device holds outside PyTorch's allocator: one constant, from published readings. Imports no torch."""

from __future__ import annotations

from alst_impl.config import TrainConfig

GIB = 2**30
CONTEXT_BYTES = GIB
"""Outside the allocator of one process without communicators: a CUDA context (about 1 GiB: arXiv:2506.13996,
section 2.1)."""
OUTSIDE_READINGS = {
    ("llama3.1-70b", 32): (47.70, 41.15),
    ("llama3.1-70b", 64): (53.83, 44.54),
    ("qwen3-32b", 32): (71.55, 64.93),
    ("qwen3-32b", 64): (71.00, 64.62),
}
"""(model, GPUs) of a recipe of ArcticTraining -> (GiB that NVML read, GiB that the allocator reserves on a phantom
device for the same recipe, run by `deepspeed_alst` with `liger` and `offload` under `zero` with `offload_optimizer`)."""


def outside_bytes(config: TrainConfig) -> int:
    """What a device holds outside the allocator: context, and of a rank among others NCCL's buffers and libraries.

    One constant for all stacks, from readings of other runs: none stands for itself.
    """
    if config.world_size == 1:
        return CONTEXT_BYTES
    of = (config.model, config.world_size)
    others = [nvml - held for run, (nvml, held) in OUTSIDE_READINGS.items() if run != of]
    return int(sum(others) / len(others) * GIB)
