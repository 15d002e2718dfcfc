"""Devices of this machine: NVML, the sampler process, memory outside PyTorch's allocator."""
