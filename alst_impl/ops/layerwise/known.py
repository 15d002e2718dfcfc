"""A decoder layer whose parts are known: norm, attention, residual, norm and MLP, residual.

Some heads are projected with their rows of the weights alone. Legend as in `layer`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from alst_impl.ops.attention.variant import Variant
from alst_impl.ops.layerwise.parts import Call, Projection, by_token, pieces
from alst_impl.ops.memory.parked import Rows, Slots
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
            pieces(self.linear.weight, starts, self.dim),
            None if bias is None else pieces(bias, starts, self.dim),
        )

    def split(self, x: Tensor) -> Tensor:
        """[B, s, n D] -> [B, n, s, D], with each head normalized if there is a norm."""
        x = x.unflatten(-1, (-1, self.dim))
        return (x if self.norm is None else self.norm(x)).transpose(1, 2)


Rotate = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(query [B,H,s,D], key [B,K,s,D], cos, sin [B,s,R]) -> query and key, rotated by position."""


@dataclass(frozen=True)
class Known:
    """The parts of a decoder layer, as a `Decoder`. Its calls have the argument `position_embeddings`."""

    module: nn.Module
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
    variant: Variant

    @property
    def num_heads(self) -> int:
        """H."""
        return self.query.num_heads

    @property
    def num_kv_heads(self) -> int:
        """K."""
        return self.key.num_heads

    @property
    def dim(self) -> int:
        """D."""
        return self.query.dim

    @property
    def prepare(self) -> TokenWise:
        """As `Decoder.prepare`."""
        return self.before

    @property
    def output_weight(self) -> Tensor | None:
        """As `Decoder.output_weight`."""
        # An adapter or a quantized projection computes something else.
        return self.output.weight if type(self.output) is nn.Linear else None

    def projection(self, heads: Sequence[int], kv_heads: Sequence[int] | None) -> Projection:
        """As `Decoder.projection`."""
        of_query = self.query.select(heads)
        if kv_heads is None:

            def queries(tile: Tensor, call: Call) -> tuple[Tensor, None, None]:
                q = self.query.split(F.linear(tile, *of_query))
                return self.rotate(q, q[:, :0], *_positions(call))[0], None, None

            return queries
        of_key, of_value = self.key.select(kv_heads), self.value.select(kv_heads)

        def all_three(tile: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
            q = self.query.split(F.linear(tile, *of_query))
            k = self.key.split(F.linear(tile, *of_key))
            q, k = self.rotate(q, k, *_positions(call))
            return q, k, self.value.split(F.linear(tile, *of_value))

        return all_three

    def qkv(self, tile: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """As `Decoder.qkv`."""
        hidden = self.before(tile)
        parts = self.query, self.key, self.value
        if self.query.linear is self.key.linear:
            widths = [part.num_heads * part.dim for part in parts]
            features = self.query.linear(hidden).split(widths, dim=-1)
        else:
            features = [part.linear(hidden) for part in parts]
        query, key, value = (part.split(x) for part, x in zip(parts, features, strict=True))
        return *self.rotate(query, key, *_positions(call)), value

    def finish(self, x: Rows, rows: slice, out: Slots, call: Call) -> Tensor:
        """As `Decoder.finish`."""
        residual = x.tile(rows) + self.output(by_token(out.tile(rows)))
        return residual.add_(self.feed_forward(residual))

    def finish_with_graph(
        self, x: Rows, rows: slice, attended: Tensor, call: Call
    ) -> tuple[Tensor, Tensor]:
        """As `Decoder.finish_with_graph`; the gradient of the residual is that of x."""
        residual = x.tile(rows) + self.output(attended)
        if not residual.requires_grad:  # a frozen projection
            residual.requires_grad_()
        return residual, residual + self.feed_forward(residual)


def _positions(call: Call) -> tuple[Tensor, Tensor]:
    cos, sin = call.kwargs["position_embeddings"]
    return cos, sin
