"""Branches on values that a kernel made, at two places."""

import torch


def reviewed() -> bool:
    """The place that the test lists as reviewed."""
    return torch.randn(4, device="cuda").sum().item() > 0


if reviewed():
    torch.empty(2**20, device="cuda")
if torch.randn(4, device="cuda").sum().item() > 0:
    torch.empty(2**30, device="cuda")
