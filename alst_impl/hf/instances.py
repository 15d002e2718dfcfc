"""Changes to instances of Hugging Face modules. Classes and other models are untouched."""

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn


def bound(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward(module, ...)` as a method of this instance, with the signature of the class's own forward.

    `copy.deepcopy` binds the method to the copy. Callers that inspect a model's arguments (transformers'
    Trainer) see the signature of the class.
    """

    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    vars(method)["__signature__"] = inspect.signature(type(module).forward)
    return MethodType(method, module)


def set_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Make `module(...)` call `forward(module, ...)`, on this instance only."""
    vars(module)["forward"] = bound(module, forward)
