"""Ring attention: each rank keeps its queries while keys and values rotate, and merges the result per block.

Source: Ring Self-Attention (arXiv:2105.13120), in blockwise form (arXiv:2310.01889) on a fused kernel.
A block is attention of this rank's queries to one rank's keys: an output and its log-sum-exp. Blocks merge
into attention over all keys. The backward of a block needs only the merged output and log-sum-exp, so blocks
are recomputed. Gradients of keys and values travel with them, and end on the rank that they belong to.
Under a window or with documents, keys and values skip ranks that see none of them (`meetings`). Sinks join in once,
after the last block.

The error does not grow with the ring. The kernel rounds each block to the dtype once. The output is a convex
combination of blocks, formed in fp32 (or wider) and rounded once more at the end, so its error is at most
that of the worst block and one rounding, whatever P is. Gradients are sums of blocks in fp32: each addend
brings its own rounding, relative to its own size, and the sum brings none. P matters only as far as addends
cancel. Sums in bf16 would round P times, relative to the whole sum.
Legend: B batch, S sequence, P ranks of the ring, s = S/P, H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from alst_impl.layout import Layout
from alst_impl.ops.attention import flash
from alst_impl.ops.attention.meetings import Meeting, Shape, Sight
from alst_impl.ops.attention.variant import Variant
from alst_impl.ops.autograd import apply
from alst_impl.placement import Evidence


@dataclass
class _Passing:
    """A started exchange: a tensor to one rank, and one of the same shape from another."""

    works: Sequence[Work]
    sent: Tensor | None
    """Must stay alive and unchanged until the exchange is over."""
    received: Tensor

    def wait(self) -> Tensor:
        """Wait, release the sent tensor, and return the received one."""
        for work in self.works:
            work.wait()
        self.sent = None
        return self.received


@dataclass(frozen=True)
class RingAttention:
    """Causal attention over a sequence that is sharded along axis `cp` of its layout."""

    evidence: Evidence

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layout: Layout,
        variant: Variant,
    ) -> Tensor:
        """query [B, H, s, D], key [B, K, s, D], value [B, K, s, V] -> [B, H, s, V] in their dtype. Collective.

        Raises `ValueError` for soft-capped scores.
        """
        group, dim = layout.group("cp"), value.shape[3]
        assert group is not None, "a ring has several ranks"
        if variant.softcap is not None:
            raise ValueError(
                f"the ring of {layout.cp} ranks does not support {variant.says(['softcap'])}: it merges what PyTorch's "
                "flash kernel returns, which has no soft-cap; use method 'alst'"
            )
        ring = Ring(group, Sight.of(layout, variant, query.shape[0]), self.evidence)
        query, key, value = _of_equal_dims(query, key, value)
        out = apply(_RingFunction, ring, variant.scale, query, key, value, variant.sinks)
        return out if out.shape[3] == dim else out[..., :dim]


def _of_equal_dims(*tensors: Tensor) -> list[Tensor]:
    """The tensors with zeros up to the longest last dim. Scores and sums of values stay the same."""
    dim = max(x.shape[-1] for x in tensors)
    return [
        x if x.shape[-1] == dim else torch.nn.functional.pad(x, (0, dim - x.shape[-1]))
        for x in tensors
    ]


@dataclass(frozen=True)
class Ring:
    """The ranks of a ring, and how keys and values travel between them."""

    group: ProcessGroup
    sight: Sight
    evidence: Evidence

    def meetings(self, source: int) -> list[Meeting]:
        """Calls for this rank's queries and the keys of `source`."""
        return list(self.sight.meetings(self.group.rank(), source))

    def pass_on(self, x: Tensor, by: int) -> _Passing:
        """Start to send `x` to the rank `by` places ahead, and to receive such a tensor from as far behind. Collective."""
        size, rank = self.group.size(), self.group.rank()
        if by % size == 0:
            return _Passing([], None, x)
        received = torch.empty_like(x)
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, x, group=self.group, group_peer=(rank + by) % size),
                dist.P2POp(dist.irecv, received, group=self.group, group_peer=(rank - by) % size),
            ]
        )
        self.evidence["rotations"] += 1
        return _Passing(works, x, received)

    def rotate(self, mine: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """Yield (rank, places to go, its tensor) for every rank whose keys any rank sees so far away, this one first.

        The next tensor arrives while one is used. Gradients that follow it by as many places end at its owner.
        The caller must drop each tensor before it asks for the next, so that there are never more than two.
        """
        size, rank = self.group.size(), self.group.rank()
        held, offsets = mine, self.sight.offsets()
        for offset, following in zip(offsets, [*offsets[1:], size], strict=True):
            passing = self.pass_on(held, following - offset) if following < size else None
            yield (rank - offset) % size, following - offset, held
            if passing is not None:
                held = passing.wait()
            del passing


def _forward(
    ring: Ring, query: Tensor, pair: Tensor, scale: float, sinks: Tensor | None
) -> tuple[Tensor, Tensor, dict[Shape, flash.Rest]]:
    """Output [B,H,s,D] in the dtype of `query`, log-sum-exp [B,H,s], and the kernel's `Rest` by shape.

    `pair` [2,B,K,s,D] holds keys and values.
    """
    forward = flash.operators(query.device).forward
    wide = torch.promote_types(query.dtype, torch.float32)
    rests: dict[Shape, flash.Rest] = {}
    out = logsumexp = query.new_empty(0)
    for source, _, (key, value) in ring.rotate(pair):
        met = ring.meetings(source)
        own = source == ring.group.rank()  # the first one, whose keys every query sees some of
        if own and len(met) > 1:
            out = query.new_zeros(query.shape, dtype=wide)
            logsumexp = query.new_full(query.shape[:3], float("-inf"), dtype=wide)
        for each in met:
            block, of_block, rest = forward(
                each.of_queries(query),
                each.of_keys(key),
                each.of_keys(value),
                None,
                each.causal,
                scale,
            )
            rests.setdefault(each.shape, rest)
            block, of_block = each.restored(block), each.restored(of_block)
            if own and len(met) == 1:
                out, logsumexp = block.to(wide), of_block
            else:
                place = each.samples, slice(None), each.queries
                flash.merge_(out[place], logsumexp[place], block, of_block)
            del block, of_block, rest
        del key, value
    if sinks is not None:
        out, logsumexp = flash.add_sinks(out, logsumexp, sinks)
    return out.to(query.dtype), logsumexp, rests


def _backward(
    ring: Ring,
    grad: Tensor,
    query: Tensor,
    pair: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    rests: dict[Shape, flash.Rest],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of `query` [B,H,s,D] and `pair` [2,B,K,s,D] in fp32 (or wider)."""
    backward = flash.operators(query.device).backward
    wide = torch.promote_types(query.dtype, torch.float32)
    grad_query = torch.zeros_like(query, dtype=wide)
    passing: _Passing | None = None

    def arrived() -> Tensor:
        """Gradients of the keys and values at hand from the ranks that had them before."""
        return torch.zeros_like(pair, dtype=wide) if passing is None else passing.wait()

    for source, by, (key, value) in ring.rotate(pair):
        totals: Tensor | None = None
        for each in ring.meetings(source):
            grads = backward(
                each.of_queries(grad),
                each.of_queries(query),
                each.of_keys(key),
                each.of_keys(value),
                each.of_queries(out),
                each.of_queries(logsumexp),
                rests[each.shape],
                None,
                each.causal,
                scale,
            )
            grad_query[each.samples, :, each.queries] += each.restored(grads[0])
            totals = arrived() if totals is None else totals
            for total, found in zip(totals, grads[1:], strict=True):
                total[each.samples, :, each.keys] += each.restored(found)
            del grads, total, found
        del key, value
        passing = ring.pass_on(arrived() if totals is None else totals, by)
        del totals
    assert passing is not None
    return grad_query, passing.wait()


class _RingFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ring: Ring,
        scale: float,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
    ) -> Tensor:
        pair = torch.stack([key, value])  # one message; and the copies can outlive what they are of
        out, logsumexp, ctx.rests = _forward(ring, query, pair, scale, sinks)
        ctx.ring, ctx.scale = ring, scale
        ctx.save_for_backward(query, pair, out, logsumexp, sinks)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, pair, out, logsumexp, sinks = ctx.saved_tensors
        grad_query, grad_pair = _backward(
            ctx.ring, grads[0], query, pair, out, logsumexp, ctx.rests, ctx.scale
        )
        grad_key, grad_value = grad_pair.to(pair.dtype)
        of_sinks = None
        if sinks is not None:  # of this rank's queries
            of_sinks = flash.sinks_gradient(grads[0], out, logsumexp, sinks)
        return None, None, grad_query.to(query.dtype), grad_key, grad_value, of_sinks
