"""The parts of a decoder layer, and what its attention takes and leaves.

Legend as in `layer`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alst_impl.ops.attention.flash import Documents, Rest
from alst_impl.ops.layerwise.exchange import Arriving
from alst_impl.ops.memory.parked import Slots
from alst_impl.ops.memory.tiling import TokenWise


@dataclass(frozen=True)
class Heads:
    """A linear map of features to heads: rows `first` to `first + num_heads * dim` of `linear`."""

    linear: nn.Linear
    first: int
    num_heads: int
    dim: int
    norm: nn.Module | None = None
    """Applied to each head by itself, before the rotary embedding."""

    def select(self, heads: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Weight [len(heads) D, E] and bias of some heads; a view where they stand side by side."""
        starts = [self.first + head * self.dim for head in heads]
        bias: Tensor | None = self.linear.bias
        return (
            self._rows(self.linear.weight, starts),
            None if bias is None else self._rows(bias, starts),
        )

    def _rows(self, x: Tensor, starts: list[int]) -> Tensor:
        if starts == list(range(starts[0], starts[0] + len(starts) * self.dim, self.dim)):
            return x[starts[0] : starts[0] + len(starts) * self.dim]
        return torch.cat([x[start : start + self.dim] for start in starts])

    def split(self, x: Tensor) -> Tensor:
        """[B, s, n D] -> [B, n, s, D], each head normed."""
        x = x.unflatten(-1, (-1, self.dim))
        return (x if self.norm is None else self.norm(x)).transpose(1, 2)


Rotate = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(query [B,H,s,D], key [B,K,s,D], cos, sin [B,s,R]) -> both, rotated by position."""


@dataclass(frozen=True)
class Decoder:
    """The parts of a decoder layer: norm, attention, residual, norm and MLP, residual."""

    module: nn.Module
    """The layer: owner of all parameters."""
    before: TokenWise
    """Norm before attention."""
    query: Heads
    key: Heads
    value: Heads
    rotate: Rotate
    output: TokenWise
    """Output projection: [B, s, H D] -> [B, s, E]."""
    feed_forward: TokenWise
    """Norm and MLP, without the residual."""
    scale: float
    """Of the attention logits."""
    window: int | None
    """Keys that a query sees, itself included; None for all before it."""

    def qkv(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normed input [B, s, E] -> query [B, H, s, D], key and value [B, K, s, D]."""
        parts = self.query, self.key, self.value
        if self.query.linear is self.key.linear:
            widths = [part.num_heads * part.dim for part in parts]
            features = self.query.linear(hidden).split(widths, dim=-1)
        else:
            features = [part.linear(hidden) for part in parts]
        query, key, value = (part.split(x) for part, x in zip(parts, features, strict=True))
        return *self.rotate(query, key, cos, sin), value


@dataclass(frozen=True)
class Call:
    """What one call of a layer is given beside its input."""

    cos: Tensor
    """[1 or B, s, R], of this rank's positions."""
    sin: Tensor
    documents: Documents
    """Over the whole sequence."""

    def tile(self, rows: slice) -> tuple[Tensor, Tensor]:
        """cos and sin of some rows."""
        return self.cos[:, rows], self.sin[:, rows]


@dataclass(frozen=True)
class Attended:
    """What attention's backward needs of all groups."""

    out: Slots
    logsumexp: Tensor
    """[G, B, h, S], of this rank's heads; fp32 (or wider)."""
    rests: list[Rest]
    """Of any group: they are of equal shapes."""


@dataclass(frozen=True)
class Begun:
    """A head group whose tensors may still travel."""

    group: int
    kv_group: int
    last: bool
    """Whether it is the last one that attends to its kv group."""
    query: Arriving
    pair: Arriving | None
    """Keys beside values; None where a group before it brought them."""
    slots: list[Arriving]


@dataclass(frozen=True)
class Group:
    """What attention takes of a head group."""

    group: int
    kv_group: int
    query: Tensor
    """[B, h, S, D]."""
    key: Tensor
    """[B, k, S, D]."""
    value: Tensor
    slots: list[Tensor]
    """As `query`, each."""


def by_token(slots: Tensor) -> Tensor:
    """A tile [G, P, rows, B, h, D] -> [B, rows, H D], a copy."""
    # heads of a rank stand together: [G, P, s, B, h, D] -> [B, s, P, G, h, D]
    return slots.permute(3, 2, 1, 0, 4, 5).flatten(2).contiguous()
