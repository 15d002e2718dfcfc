"""The last keys (Mistral), every few of them (dilated), and the first tokens for all (Longformer, StreamingLLM)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from alst_impl.ops.attention.patterns.base import Pattern, Run, merged

if TYPE_CHECKING:
    from torch import Tensor, device

    from alst_impl.ops.attention.patterns.base import Sees


class Window(Pattern):
    """Longformer (arXiv:2004.05150) under a causal mask; StreamingLLM's sinks (arXiv:2309.17453) are global tokens."""

    window: int = Field(ge=1)
    """Number of keys that a query sees, itself included, beside the global ones."""
    dilation: int = Field(default=1, ge=1)
    """Distance of two neighbouring keys of the window."""
    global_tokens: int = Field(default=0, ge=0)
    """First tokens of a document that all later ones see."""

    def check(self, seqlen: int) -> None:
        for name, value in (("dilation", self.dilation), ("global_tokens", self.global_tokens)):
            if value > max(seqlen - 1, 1):
                raise ValueError(
                    f"{name} ({value}) of pattern 'window' must be less than seqlen ({seqlen}), else it reaches beyond "
                    f"the sequence; use {name} up to {max(seqlen - 1, 1)}"
                )

    def sees(self, length: int, device: device) -> Sees:
        step, reach, first = self.dilation, self.window * self.dilation, self.global_tokens

        def seen(query: Tensor, key: Tensor) -> Tensor:
            near = query - key < reach
            if step > 1:
                near = near & ((query - key) % step == 0)
            return near | (key < first) if first else near

        return seen

    def runs(self, first: int, stop: int) -> list[Run]:
        least = max(first - (self.window - 1) * self.dilation, 0)
        near = [(least, stop)]
        if self.dilation > stop - first:  # else the keys of neighbouring queries fill the gaps
            shifts = range(0, self.window * self.dilation, self.dilation)
            near = [(max(first - by, 0), stop - by) for by in shifts if by < stop]
        return merged([(0, min(self.global_tokens, stop)), *near])

    def whole_runs(self, first: int, stop: int) -> list[Run]:
        near = [(max(stop - self.window, 0), first + 1)] if self.dilation == 1 else []
        return merged([(0, min(self.global_tokens, first + 1)), *near])

    def pairs(self, length: int) -> int:
        query = np.arange(length)
        near = np.minimum(query // self.dilation + 1, self.window)
        # Of the window's keys, those from `global_tokens` on come first.
        beyond = -(-(query + 1 - self.global_tokens) // self.dilation)
        both = near - np.clip(beyond, 0, near)
        return int((near + np.minimum(query + 1, self.global_tokens) - both).sum())

    def strided(self) -> tuple[int, Pattern]:
        # Global tokens are seen from all.
        return (1, self) if self.global_tokens else (self.dilation, Window(window=self.window))

    def as_window(self) -> tuple[int, int] | None:
        return (self.window, self.global_tokens) if self.dilation == 1 else None
