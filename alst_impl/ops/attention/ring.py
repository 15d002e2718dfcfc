"""Ring attention: each rank keeps its queries while keys and values rotate, and merges the result per block.

Source: Ring Self-Attention (arXiv:2105.13120), in blockwise form (arXiv:2310.01889) on a fused kernel.
A block is attention of this rank's queries to one rank's keys: an output and its log-sum-exp. Blocks merge
into attention over all keys. The backward of a block needs only the merged output and log-sum-exp, so blocks
are recomputed. Gradients of keys and values travel with them, and end on the rank that they belong to.

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
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from alst_impl.layout import Layout
from alst_impl.ops.attention import flash
from alst_impl.ops.attention.variant import Variant
from alst_impl.ops.autograd import apply
from alst_impl.placement import Evidence

Shape = tuple[int, int]


class Meeting(NamedTuple):
    """Which of one rank's s queries attend to which of another rank's s keys."""

    queries: slice
    keys: slice
    causal: bool
    """Whether each query sees only the keys up to its own position; else it sees all of these."""

    @property
    def shape(self) -> Shape:
        """Numbers of queries and keys."""
        return self.queries.stop - self.queries.start, self.keys.stop - self.keys.start


def meeting(rank: int, source: int, local: int, *, zigzag: bool) -> Meeting | None:
    """The queries of `rank` that attend to keys of `source`; None if every query comes before every key."""
    whole, half = slice(0, local), local // 2
    if source == rank:
        return Meeting(whole, whole, causal=True)
    if source < rank:
        return Meeting(whole, slice(0, half) if zigzag else whole, causal=False)
    return Meeting(slice(half, local), whole, causal=False) if zigzag else None


@dataclass
class _Passing:
    """A started exchange: a tensor to the next rank, and one from the previous rank."""

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
        """query [B, H, s, D], key and value [B, K, s, D] -> [B, H, s, D] in their dtype. Collective.

        Raises `ValueError` for packed documents and for a window shorter than the sequence: the ring supports
        no mask but the causal one.
        """
        documents, group = layout.documents is not None, layout.group("cp")
        variant = variant.over(layout.length)
        if documents or variant.chunk or variant.needs():
            hidden = "packed documents" if documents else variant.says()
            raise ValueError(
                f"ring attention over {layout.length} tokens does not support {hidden}; use method 'alst' or "
                "'baseline'"
            )
        assert group is not None, "a ring has several ranks"
        return apply(
            _RingFunction,
            Ring(group, layout.order == "zigzag", self.evidence),
            variant.scale,
            query,
            key,
            value,
        )


@dataclass(frozen=True)
class Ring:
    """The ranks of a ring, and how keys and values travel between them."""

    group: ProcessGroup
    zigzag: bool
    evidence: Evidence

    def meeting(self, source: int, local: int) -> Meeting | None:
        """`meeting` of this rank's queries with the keys of `source`."""
        return meeting(self.group.rank(), source, local, zigzag=self.zigzag)

    def pass_on(self, x: Tensor) -> _Passing:
        """Start to send `x` to the next rank and to receive a tensor of its shape from the previous one. Collective."""
        size, rank = self.group.size(), self.group.rank()
        received = torch.empty_like(x)
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, x, group=self.group, group_peer=(rank + 1) % size),
                dist.P2POp(dist.irecv, received, group=self.group, group_peer=(rank - 1) % size),
            ]
        )
        self.evidence["rotations"] += 1
        return _Passing(works, x, received)

    def rotate(self, mine: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield (rank, its tensor) for every rank, this one first. The next tensor arrives while one is used.

        The caller must drop each tensor before it asks for the next, so that there are never more than two.
        """
        size, rank = self.group.size(), self.group.rank()
        held, order = mine, range(size)
        for step in order:
            passing = None if step == order[-1] else self.pass_on(held)
            yield (rank - step) % size, held
            if passing is not None:
                held = passing.wait()
            del passing


def _forward(
    ring: Ring, query: Tensor, pair: Tensor, scale: float
) -> tuple[Tensor, Tensor, dict[Shape, flash.Rest]]:
    """Output [B,H,s,D] in the dtype of `query`, log-sum-exp [B,H,s], and the kernel's `Rest` by shape.

    `pair` [2,B,K,s,D] holds keys and values.
    """
    forward = flash.operators(query.device).forward
    wide = torch.promote_types(query.dtype, torch.float32)
    rests: dict[Shape, flash.Rest] = {}
    out = logsumexp = query.new_empty(0)
    for source, (key, value) in ring.rotate(pair):
        met = ring.meeting(source, query.shape[2])
        if met is not None:
            queries, keys, causal = met
            block, of_block, rest = forward(
                query[:, :, queries], key[:, :, keys], value[:, :, keys], None, causal, scale
            )
            rests.setdefault(met.shape, rest)
            if source == ring.group.rank():  # the first one: its own keys, which every query sees
                out, logsumexp = block.to(wide), of_block
            else:
                flash.merge_(out[:, :, queries], logsumexp[:, :, queries], block, of_block)
            del block, of_block, rest
        del key, value
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
    for source, (key, value) in ring.rotate(pair):
        met = ring.meeting(source, query.shape[2])
        grads: flash.Grads | None = None
        if met is not None:
            queries, keys, causal = met
            grads = backward(
                grad[:, :, queries],
                query[:, :, queries],
                key[:, :, keys],
                value[:, :, keys],
                out[:, :, queries],
                logsumexp[:, :, queries],
                rests[met.shape],
                None,
                causal,
                scale,
            )
            grad_query[:, :, queries] += grads[0]
        del key, value
        # Gradients of these keys from the previous ranks arrive here, and go on to the next rank.
        totals = torch.zeros_like(pair, dtype=wide) if passing is None else passing.wait()
        if met is not None and grads is not None:
            totals[0][:, :, met.keys] += grads[1]
            totals[1][:, :, met.keys] += grads[2]
        del grads
        passing = ring.pass_on(totals)
        del totals
    assert passing is not None
    return grad_query, passing.wait()


class _RingFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ring: Ring, scale: float, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        pair = torch.stack([key, value])  # one message; and the copies can outlive what they are of
        out, logsumexp, ctx.rests = _forward(ring, query, pair, scale)
        ctx.ring, ctx.scale = ring, scale
        ctx.save_for_backward(query, pair, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, pair, out, logsumexp = ctx.saved_tensors
        grad_query, grad_pair = _backward(
            ctx.ring, grads[0], query, pair, out, logsumexp, ctx.rests, ctx.scale
        )
        grad_key, grad_value = grad_pair.to(pair.dtype)
        return None, None, grad_query.to(query.dtype), grad_key, grad_value
