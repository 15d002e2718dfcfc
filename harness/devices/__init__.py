"""Devices of this machine: NVML, who watches them, what they hold outside an allocator."""
