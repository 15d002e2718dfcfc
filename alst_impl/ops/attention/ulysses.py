"""Ulysses sequence parallelism: all-to-alls turn sequence shards into head shards for attention, and back.

Source: DeepSpeed-Ulysses (arXiv:2309.14509), ALST (arXiv:2506.13996, section 3.2).
Legend: B batch, S sequence, P sequence-parallel degree, H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from alst_impl.layout import Layout, reached
from alst_impl.ops.attention.cores.base import Core
from alst_impl.ops.attention.pages import PagedAttention
from alst_impl.ops.attention.ring import RingAttention
from alst_impl.ops.attention.variant import Variant
from alst_impl.ops.autograd import apply
from alst_impl.placement import Evidence


def _all_to_all(send: Tensor, group: ProcessGroup) -> Tensor:
    """Block i of `send` ([P, ...], contiguous) goes to rank i; returns the blocks received."""
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=group)
    return received


def _heads_for_sequence(x: Tensor, group: ProcessGroup) -> Tensor:
    """[B, H, S/P, D] -> [B, H/P, S, D]."""
    batch, heads, local, dim = x.shape
    degree = group.size()
    # [B, H, S/P, D] -> [P, S/P, B, H/P, D]: one copy, straight into send order
    send = x.view(batch, degree, heads // degree, local, dim).permute(1, 3, 0, 2, 4).contiguous()
    # [P, S/P, B, H/P, D] = [S, B, H/P, D] -> [B, H/P, S, D]: a view, because attention takes any strides
    return _all_to_all(send, group).flatten(0, 1).permute(1, 2, 0, 3)


def _sequence_for_heads(x: Tensor, group: ProcessGroup) -> Tensor:
    """[B, H/P, S, D] -> [B, H, S/P, D], laid out as [B, S/P, H, D]."""
    batch, heads, seqlen, dim = x.shape
    degree = group.size()
    # [B, H/P, S, D] -> [P, S/P, B, H/P, D]
    send = x.view(batch, heads, degree, seqlen // degree, dim).permute(2, 3, 0, 1, 4).contiguous()
    # [P, S/P, B, H/P, D] -> [B, S/P, H, D] -> [B, H, S/P, D]
    received = _all_to_all(send, group).permute(2, 1, 0, 3, 4).flatten(2, 3)
    return received.transpose(1, 2)


class _Exchange(torch.autograd.Function):
    """An all-to-all whose backward is the all-to-all in the other direction."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup, to_heads: bool) -> Tensor:
        ctx.group, ctx.to_heads = group, to_heads
        return _heads_for_sequence(x, group) if to_heads else _sequence_for_heads(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        exchange = _sequence_for_heads if ctx.to_heads else _heads_for_sequence
        return exchange(grad, ctx.group), None, None


def sequence_to_heads(x: Tensor, group: ProcessGroup) -> Tensor:
    """[B, H, S/P, D] -> [B, H/P, S, D]. Differentiable. Collective over `group`."""
    return apply(_Exchange, x, group, True)


def heads_to_sequence(x: Tensor, group: ProcessGroup) -> Tensor:
    """[B, H/P, S, D] -> [B, H, S/P, D]. Differentiable. Collective over `group`."""
    return apply(_Exchange, x, group, False)


def replicate_kv_heads(x: Tensor, degree: int) -> Tensor:
    """[B, K, S, D] -> [B, K', S, D] with K' the least multiple of K that `degree` divides.

    Copies are adjacent, so each contiguous slice of query heads still has its kv heads. The gradient of a
    head is the sum over its copies.
    """
    copies = math.lcm(x.shape[1], degree) // x.shape[1]
    return x if copies == 1 else x.repeat_interleave(copies, dim=1)


def _of_heads(variant: Variant, group: ProcessGroup) -> Variant:
    """The variant of this rank's query heads."""
    if variant.sinks is None:
        return variant
    return replace(variant, sinks=variant.sinks.chunk(group.size())[group.rank()])


WholeSequence = Core | RingAttention | PagedAttention


@dataclass(frozen=True)
class UlyssesAttention:
    """Attention over sequences that are sharded along axis `sp` of their layout; without shards, the core itself."""

    core: WholeSequence
    """Attends over the tokens of the ranks along `sp`. A ring attends over those of all ranks along `cp`, too, and pages
    over those of earlier chunks."""
    evidence: Evidence
    shards: int | None = 1
    """Ranks that share a sample. If there are several, a call without its layout is refused. None: as many as its layout
    says, which may change from batch to batch."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layout: Layout | None,
        variant: Variant,
    ) -> Tensor:
        """query [B, H, S/P, D], key and value [B, K, S/P, D] -> [B, H, S/P, D]. Collective.

        `variant` refers to the whole sequence and all heads. `layout` may be None for whole samples of one document.
        """
        layout = reached(layout, query.shape[2], self.shards)
        group = layout.group("sp")
        if group is None:
            return self.core(query, key, value, layout=layout, variant=variant)
        key, value = (replicate_kv_heads(x, group.size()) for x in (key, value))
        query, key, value = (sequence_to_heads(x, group) for x in (query, key, value))
        out = self.core(query, key, value, layout=layout, variant=_of_heads(variant, group))
        self.evidence["exchanges"] += 4
        return heads_to_sequence(out, group)
