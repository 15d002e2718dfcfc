"""A decoder layer as its attention, what comes before and what comes after; inputs and results of its attention.

Legend as in `layer`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from alst_impl.layout import Layout
from alst_impl.ops.attention.flash import Rest
from alst_impl.ops.attention.variant import Variant
from alst_impl.ops.layerwise.arguments import rows_of
from alst_impl.ops.layerwise.exchange import Arriving
from alst_impl.ops.memory.parked import Rows, Slots
from alst_impl.ops.memory.tiling import TokenWise


@dataclass(frozen=True)
class Call:
    """Arguments of a layer's call besides its input."""

    layout: Layout
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def tile(self, rows: slice) -> Call:
        """The arguments for some rows; their tensors are views."""
        local = self.layout.local
        args, kwargs = (rows_of(x, rows, local) for x in (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs)


Projection = Callable[[Tensor, Call], tuple[Tensor, Tensor | None, Tensor | None]]
"""(tile [B, s, E], its arguments) -> query [B, n, s, D] of some heads, key and value of some kv heads, if wanted."""


class Decoder(Protocol):
    """A decoder layer that mixes tokens only in one call of attention.

    Query, key, value and output of attention have the same head dim here.
    """

    @property
    def module(self) -> nn.Module:
        """The layer, which owns all parameters."""

    @property
    def num_heads(self) -> int:
        """H."""

    @property
    def num_kv_heads(self) -> int:
        """K."""

    @property
    def dim(self) -> int:
        """D."""

    @property
    def variant(self) -> Variant:
        """What attention computes. Known once something has been projected; its sinks have the graph of that."""

    @property
    def prepare(self) -> TokenWise | None:
        """What a layer computes of its input before it projects, [B, s, E] -> [B, s, E]. None if that is not known."""

    @property
    def output_weight(self) -> Tensor | None:
        """Weight [E, H D] of the output projection.

        None if the layer does more between attention and the first tensor of `finish_with_graph` than to add a
        linear projection.
        """

    def projection(self, heads: Sequence[int], kv_heads: Sequence[int] | None) -> Projection:
        """Projects a prepared tile to the given heads, without a graph; to queries alone if there are no `kv_heads`."""

    def qkv(self, tile: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """Tile [B, s, E] -> query [B, H, s, D], key and value [B, K, s, D]. `call` is the tile's."""

    def finish(self, x: Rows, rows: slice, out: Slots, call: Call) -> Tensor:
        """Output of the layer for some rows, [B, rows, E], from its input and attention's output. No graph."""

    def finish_with_graph(
        self, x: Rows, rows: slice, attended: Tensor, call: Call
    ) -> tuple[Tensor, Tensor]:
        """As `finish`, from `attended` [B, rows, H D]. Returns a tensor whose gradient is that of the rows of x, and y."""


@dataclass(frozen=True)
class Inputs:
    """What a layer projects to heads, again for each head group."""

    rows: Rows
    """Prepared, where the layer's `prepare` is known."""
    wide: bool
    """Whether a projection makes no more of a tile than the features of its heads, so that tiles may have more rows."""


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


def pieces(x: Tensor, starts: Sequence[int], size: int) -> Tensor:
    """`size` rows of x from each of `starts` on, [len(starts) * size, ...]; a view if they are adjacent."""
    if list(starts) == list(range(starts[0], starts[0] + len(starts) * size, size)):
        return x[starts[0] : starts[0] + len(starts) * size]
    return torch.cat([x[start : start + size] for start in starts])
