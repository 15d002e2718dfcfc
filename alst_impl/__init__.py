"""Arctic Long Sequence Training (arXiv:2506.13996) for unmodified Hugging Face models.

The public API is `enable`, which returns a `LongSequence`, and `LongSequenceTrainer`; see `alst_impl.library`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from alst_impl.library import LongSequence, LongSequenceTrainer, enable

__all__ = ["LongSequence", "LongSequenceTrainer", "enable"]


def __getattr__(name: str) -> object:
    """A name of the public API, imported at its first use: much of this package imports no torch."""
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module("alst_impl.library"), name)
