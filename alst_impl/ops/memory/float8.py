"""Tensors in eight bits: `float8_e4m3fn` with one scale per row.

The format has four exponent bits and three mantissa bits. A value is off by at most 1/16 of itself. A value
that is small compared with its row's largest value is off by at most 2^-10 / 448 of that largest value
(Micikevicius et al., arXiv:2209.05433).
Legend: E features.
"""

from __future__ import annotations

import torch
from torch import Tensor

DTYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(DTYPE).max
_SMALLEST = 1e-30
"""Lower limit of a row's maximum, so that a row of zeros has a non-zero scale."""


def pack(x: Tensor) -> tuple[Tensor, Tensor]:
    """[..., E] -> the same in float8, and its scales [..., 1] in fp32."""
    scale = x.abs().amax(dim=-1, keepdim=True).float().clamp_(min=_SMALLEST).div_(LARGEST)
    return (x / scale).to(DTYPE), scale


def unpack(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `pack`, up to its rounding: [..., E] in `dtype`."""
    return packed.to(dtype).mul_(scale)
