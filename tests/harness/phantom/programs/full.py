"""Allocates more than a device has."""

import torch


def grow() -> list[torch.Tensor]:
    """Allocate one GiB after the other."""
    return [torch.empty(2**30, dtype=torch.uint8, device="cuda") for _ in range(100)]


grow()
