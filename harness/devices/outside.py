"""Device memory outside PyTorch's allocator: one constant, from published readings. Imports no torch."""

from __future__ import annotations

from alst_impl.config import TrainConfig

GIB = 2**30
CONTEXT_BYTES = GIB
"""Memory outside the allocator of a single process without communicators: a CUDA context (about 1
GiB: arXiv:2506.13996, section 2.1)."""
OUTSIDE_READINGS = {
    ("llama3.1-70b", 32): (47.70, 41.15),
    ("llama3.1-70b", 64): (53.83, 44.54),
    ("qwen3-32b", 32): (71.55, 64.93),
    ("qwen3-32b", 64): (71.00, 64.62),
}
"""(model, GPUs) of an ArcticTraining recipe -> (GiB that NVML read, GiB that the allocator
reserves). The second number is from a phantom run of the same recipe: `deepspeed_alst` with `liger`
and `offload`, `zero` with `offload_optimizer`."""


def outside_bytes(config: TrainConfig) -> int:
    """Device memory outside the allocator: the CUDA context and, with several ranks, NCCL's buffers and libraries.

    One constant for all stacks: the mean over the readings of other runs. A run's own reading is left out.
    """
    if config.world_size == 1:
        return CONTEXT_BYTES
    of = (config.model, config.world_size)
    others = [nvml - held for run, (nvml, held) in OUTSIDE_READINGS.items() if run != of]
    return int(sum(others) / len(others) * GIB)
