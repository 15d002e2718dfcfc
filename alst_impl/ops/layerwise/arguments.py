"""Arguments of a decoder layer's call beside its hidden states, and their rows for a tile.

Legend: B batch, s tokens of one rank.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

PLAIN = (type(None), bool, int, float, str)
"""Classes of arguments that are the same for all tokens."""


def rows_of(value: Any, rows: slice, local: int) -> Any:
    """`value` for some of `local` tokens: each tensor in it is sliced along its axis of tokens, as a view."""
    if isinstance(value, dict):
        return {name: rows_of(each, rows, local) for name, each in value.items()}
    if type(value) in {tuple, list}:
        return type(value)(rows_of(each, rows, local) for each in value)
    axis = _axis(value, local) if isinstance(value, Tensor) else None
    return value if axis is None else value[(slice(None),) * axis + (rows,)]


def unsliceable(name: str, value: Any, local: int) -> str | None:
    """Why argument `name` cannot be sliced for some of `local` tokens, in words; None if it can."""
    if isinstance(value, dict):
        named = [(f"{name}[{key!r}]", each) for key, each in value.items()]
    elif type(value) in {tuple, list}:
        named = [(f"{name}[{i}]", each) for i, each in enumerate(value)]
    elif not isinstance(value, Tensor):
        return None if isinstance(value, PLAIN) else f"'{name}' is a {type(value).__name__}"
    elif value.requires_grad:
        return f"'{name}' is a tensor that requires a gradient"
    elif value.numel() > 1 and _axis(value, local) is None:
        return f"'{name}' has shape {list(value.shape)}, in which no single axis is that of the {local} tokens"
    else:
        return None
    found = (unsliceable(each, part, local) for each, part in named)
    return next((reason for reason in found if reason is not None), None)


def _axis(x: Tensor, local: int) -> int | None:
    """The axis of tokens: the second one of [B, s, ...], or else the only one with `local` entries."""
    found = [axis for axis, size in enumerate(x.shape) if size == local]
    if x.dim() > 2 and found[:1] == [1]:
        return 1  # a feature axis may have as many entries
    return found[0] if len(found) == 1 else None
