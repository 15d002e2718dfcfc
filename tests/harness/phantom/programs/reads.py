"""Decides by a value that a kernel made."""

import torch

if torch.randn(4, device="cuda").sum().item() > 0:
    torch.empty(2**20, device="cuda")
