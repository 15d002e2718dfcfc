"""Typed access to functions of PyTorch that have no types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import Function

F = TypeVar("F", bound=Callable[..., Any])


def apply(function: type[Function], *args: Any) -> Tensor:
    """`function.apply(*args)` of a function with one output."""
    out: Tensor = function.apply(*args)
    return out


def as_it_stands(function: F) -> F:
    """`function`, which torch.compile leaves alone."""
    return cast("F", torch.compiler.disable(function))
