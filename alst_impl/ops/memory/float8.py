"""Rows of a tensor in eight bits: `float8_e4m3fn` with a scale of its own for each row.

Four bits of exponent and three of mantissa: a value is off by at most 1/16 of itself, or, where it is
small beside the largest of its row, by 2^-10 of 1/448 of that one (Micikevicius et al., arXiv:2209.05433).
Legend: E features.
"""

from __future__ import annotations

import torch
from torch import Tensor

DTYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(DTYPE).max
_SMALLEST = 1e-30
"""A row of zeros has a scale, too."""


def pack(x: Tensor) -> tuple[Tensor, Tensor]:
    """[..., E] -> the same in eight bits, and its scales [..., 1] in fp32."""
    scale = x.abs().amax(dim=-1, keepdim=True).float().clamp_(min=_SMALLEST).div_(LARGEST)
    return (x / scale).to(DTYPE), scale


def unpack(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., E] in `dtype`, as near to what was packed as eight bits are."""
    return packed.to(dtype).mul_(scale)
