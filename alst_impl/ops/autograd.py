"""Typed access to `torch.autograd.Function`."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function


def apply(function: type[Function], *args: Any) -> Tensor:
    """`function.apply(*args)` of a function with one output."""
    out: Tensor = function.apply(*args)
    return out
