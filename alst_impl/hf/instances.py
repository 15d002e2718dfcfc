"""Changes on instances of a Hugging Face model: no class and no other model is touched."""

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn


def bound(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward(module, ...)` as a method of this instance with the signature of the class's own forward.

    `copy.deepcopy` binds a method to the copy, and callers that look for a model's arguments
    (transformers' Trainer) find them.
    """

    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    vars(method)["__signature__"] = inspect.signature(type(module).forward)
    return MethodType(method, module)


def set_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Make `module(...)` call `forward(module, ...)`, on this instance alone."""
    vars(module)["forward"] = bound(module, forward)
