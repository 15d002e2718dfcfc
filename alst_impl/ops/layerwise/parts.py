"""The parts of a decoder layer, and the inputs and results of its attention.

Legend as in `layer`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alst_impl.layout import Layout
from alst_impl.ops.attention.flash import Rest
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
    """Applied to each head separately, before the rotary embedding."""

    def select(self, heads: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Weight [len(heads) D, E] and bias of some heads; views if the heads are adjacent."""
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
        """[B, s, n D] -> [B, n, s, D], with each head normalized if there is a norm."""
        x = x.unflatten(-1, (-1, self.dim))
        return (x if self.norm is None else self.norm(x)).transpose(1, 2)


Rotate = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(query [B,H,s,D], key [B,K,s,D], cos, sin [B,s,R]) -> query and key, rotated by position."""


@dataclass(frozen=True)
class Decoder:
    """The parts of a decoder layer: norm, attention, residual, norm and MLP, residual."""

    module: nn.Module
    """The layer, which owns all parameters."""
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
    """Scale of the attention logits."""
    window: int | None
    """Number of keys that a query sees, itself included; None without a sliding window."""

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
    """Arguments of a layer's call besides its input."""

    cos: Tensor
    """[1 or B, s, R], at this rank's positions."""
    sin: Tensor
    layout: Layout

    def tile(self, rows: slice) -> tuple[Tensor, Tensor]:
        """cos and sin of some rows."""
        return self.cos[:, rows], self.sin[:, rows]


@dataclass(frozen=True)
class Attended:
    """What attention's backward needs, for all groups."""

    out: Slots
    logsumexp: Tensor
    """[G, B, h, S], of this rank's heads; fp32 (or wider)."""
    rests: list[Rest]
    """The same for every group, because all have the same shapes."""


@dataclass(frozen=True)
class Begun:
    """A head group whose exchanges have started."""

    group: int
    kv_group: int
    last: bool
    """Whether this is the last group that attends to its kv group."""
    query: Arriving
    pair: Arriving | None
    """Keys and values, concatenated; None if an earlier group has brought them."""
    slots: list[Arriving]


@dataclass(frozen=True)
class Group:
    """Attention's inputs for one head group."""

    group: int
    kv_group: int
    query: Tensor
    """[B, h, S, D]."""
    key: Tensor
    """[B, k, S, D]."""
    value: Tensor
    slots: list[Tensor]
    """Each [B, h, S, D], like `query`."""


def by_token(slots: Tensor) -> Tensor:
    """A tile [G, P, rows, B, h, D] -> [B, rows, H D], a copy."""
    # a rank's heads are adjacent: [G, P, s, B, h, D] -> [B, s, P, G, h, D]
    return slots.permute(3, 2, 1, 0, 4, 5).flatten(2).contiguous()
