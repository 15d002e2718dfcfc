"""Ring attention: each rank keeps its queries while keys and values rotate, and merges the result per block.

Source: Ring Self-Attention (arXiv:2105.13120), in blockwise form (arXiv:2310.01889) on a fused kernel.
A block is attention of this rank's queries to one rank's keys: an output and its log-sum-exp. Blocks merge
into attention over all keys. The backward of a block needs only the merged output and log-sum-exp, so blocks
are recomputed. Gradients of keys and values travel with them, and end on the rank that they belong to.
Under a window or with documents, keys and values skip ranks that see none of them (`meetings`). Global tokens, which
queries see beyond a window, are the last block, of all ranks at once. Sinks join in once, after it.

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
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from alst_impl.layout import Layout
from alst_impl.ops.attention import flash
from alst_impl.ops.attention.cores.base import Core
from alst_impl.ops.attention.meetings import Meeting, Shape, Sight
from alst_impl.ops.attention.variant import Variant
from alst_impl.ops.autograd import apply
from alst_impl.placement import Evidence

GLOBAL = -1
"""The place of global keys and values, which all ranks get at once."""


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
    core: Core | None = None
    """What attends where there is no ring. Its pattern may be a window; None has none."""

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
        global_tokens = 0
        if self.core is not None:
            variant, global_tokens = self.core.narrowed(layout, variant)
        group = layout.group("cp")
        assert group is not None, "a ring has several ranks"
        if variant.softcap is not None:
            raise ValueError(
                f"the ring of {layout.cp} ranks does not support {variant.says(['softcap'])}: it merges what PyTorch's "
                "flash kernel returns, which has no soft-cap; use method 'alst'"
            )
        sight = Sight.of(layout, variant, query.shape[0], global_tokens)
        ring = Ring(group, sight, self.evidence)
        return attend(ring, query, key, value, variant)


def _of_equal_dims(*tensors: Tensor) -> list[Tensor]:
    """The tensors with zeros up to the longest last dim. Scores and sums of values stay the same."""
    dim = max(x.shape[-1] for x in tensors)
    return [
        x if x.shape[-1] == dim else torch.nn.functional.pad(x, (0, dim - x.shape[-1]))
        for x in tensors
    ]


class Sums(Protocol):
    """Gradients of keys and values in fp32 (or wider), added up block by block in the order of `Carrier.blocks`."""

    def so_far(self, source: int) -> Tensor:
        """Sum of the gradients that queries elsewhere found for the keys and values of `source`, to be added to."""
        ...

    def leave(self, source: int, total: Tensor | None) -> None:
        """Take the sum of `source`, if any of the queries saw its keys."""
        ...

    def own(self) -> Tensor:
        """The sum of the queries' own keys and values, after the last block."""
        ...


class Carrier(Protocol):
    """Brings keys and values to the queries of one place, block by block."""

    @property
    def place(self) -> int:
        """The place of the queries, whose keys every query sees some of."""
        ...

    def meetings(self, source: int) -> list[Meeting]:
        """Calls for the queries and the keys of `source`."""
        ...

    def blocks(self, own: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield (place, keys and values [2, B, K, s, D]) for every place that is needed, `own` first.

        The next one arrives while one is used. The caller must drop each before it asks for the next, so that
        there are never more than two.
        """
        ...

    def sums(self, own: Tensor) -> Sums:
        """Where the gradients go during one backward; `own` gives shape and device."""
        ...


@dataclass(frozen=True)
class Ring:
    """The ranks of a ring, and how keys and values travel between them."""

    group: ProcessGroup
    sight: Sight
    evidence: Evidence

    @property
    def place(self) -> int:
        """This rank."""
        return self.group.rank()

    def meetings(self, source: int) -> list[Meeting]:
        """Calls for this rank's queries and the keys of `source`."""
        if source == GLOBAL:
            return list(self.sight.global_meetings(self.place))
        return list(self.sight.meetings(self.place, source))

    def shared(self, own: Tensor) -> Tensor:
        """Global keys and values [2, B, K, G, D] from their owners, whose `own` they are in part. Collective."""
        found = own.new_zeros(*own.shape[:3], self.sight.num_global, own.shape[4])
        for sample, into, held in self.sight.global_places(self.place):
            found[:, sample, :, into] = own[:, sample, :, held]
        dist.all_reduce(found, group=self.group)
        return found

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

    def blocks(self, own: Tensor) -> Iterator[tuple[int, Tensor]]:
        """As `Carrier.blocks`, from every rank whose keys any rank sees so far away. Collective."""
        held, offsets = own, self.sight.offsets()
        for offset, by in zip(offsets, self.steps(), strict=True):
            passing = self.pass_on(held, by) if offset != offsets[-1] else None
            yield (self.place - offset) % self.group.size(), held
            if passing is not None:
                held = passing.wait()
            del passing
        del held
        if self.sight.num_global:
            yield GLOBAL, self.shared(own)

    def steps(self) -> list[int]:
        """How many places each block goes on after its use. Gradients that follow it end at its owner."""
        offsets = self.sight.offsets()
        following = [*offsets[1:], self.group.size()]
        return [after - offset for offset, after in zip(offsets, following, strict=True)]

    def sums(self, own: Tensor) -> Sums:
        """Gradients that travel behind the keys and values."""
        return _Travelling(self, own)


class _Travelling:
    """Gradients of keys and values on their way round the ring. Collective."""

    def __init__(self, ring: Ring, own: Tensor) -> None:
        self._ring, self._own = ring, own
        self._steps = ring.steps()
        self._passing: _Passing | None = None

    def so_far(self, source: int) -> Tensor:
        if source == GLOBAL:
            shape = *self._own.shape[:3], self._ring.sight.num_global, self._own.shape[4]
            return zeros(self._own.new_empty(shape))
        return zeros(self._own) if self._passing is None else self._passing.wait()

    def _leave_global(self, total: Tensor | None) -> None:
        """Sum the gradients of global keys that the ranks found, and add those of this rank's."""
        found = self.so_far(GLOBAL) if total is None else total
        dist.all_reduce(found, group=self._ring.group)
        own = self.own()
        for sample, into, held in self._ring.sight.global_places(self._ring.place):
            own[:, sample, :, held] += found[:, sample, :, into]
        self._passing = _Passing([], None, own)

    def leave(self, source: int, total: Tensor | None) -> None:
        if source == GLOBAL:
            self._leave_global(total)
            return
        going = self.so_far(source) if total is None else total
        self._passing = self._ring.pass_on(going, self._steps.pop(0))

    def own(self) -> Tensor:
        assert self._passing is not None, "own keys and values are a block"
        return self._passing.wait()


def zeros(like: Tensor) -> Tensor:
    """Zeros to add gradients of `like` to, in fp32 (or wider)."""
    return torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))


def _forward(
    carrier: Carrier, query: Tensor, pair: Tensor, scale: float, sinks: Tensor | None
) -> tuple[Tensor, Tensor, dict[Shape, flash.Rest]]:
    """Output [B,H,s,D] in the dtype of `query`, log-sum-exp [B,H,s], and the kernel's `Rest` by shape.

    `pair` [2,B,K,s,D] holds keys and values.
    """
    forward = flash.operators(query.device).forward
    wide = torch.promote_types(query.dtype, torch.float32)
    rests: dict[Shape, flash.Rest] = {}
    out = logsumexp = query.new_empty(0)
    for source, (key, value) in carrier.blocks(pair):
        met = carrier.meetings(source)
        own = source == carrier.place
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
    carrier: Carrier,
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
    grad_query = zeros(query)
    sums = carrier.sums(pair)
    for source, (key, value) in carrier.blocks(pair):
        total: Tensor | None = None
        for each in carrier.meetings(source):
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
            total = sums.so_far(source) if total is None else total
            for into, found in zip(total, grads[1:], strict=True):
                into[each.samples, :, each.keys] += each.restored(found)
            del grads, into, found
        del key, value
        sums.leave(source, total)
        del total
    return grad_query, sums.own()


def attend(carrier: Carrier, query: Tensor, key: Tensor, value: Tensor, variant: Variant) -> Tensor:
    """query [B, H, s, D], key [B, K, s, D], value [B, K, s, V] -> [B, H, s, V] over all that `carrier` brings.

    Differentiable. `variant` has no soft-cap, and its limits are those of the carrier's meetings.
    """
    dim = value.shape[3]
    query, key, value = _of_equal_dims(query, key, value)
    out = apply(_Blockwise, carrier, variant.scale, query, key, value, variant.sinks)
    return out if out.shape[3] == dim else out[..., :dim]


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        carrier: Carrier,
        scale: float,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
    ) -> Tensor:
        pair = torch.stack([key, value])  # one message; and the copies can outlive what they are of
        out, logsumexp, ctx.rests = _forward(carrier, query, pair, scale, sinks)
        ctx.carrier, ctx.scale = carrier, scale
        ctx.save_for_backward(query, pair, out, logsumexp, sinks)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, pair, out, logsumexp, sinks = ctx.saved_tensors
        grad_query, grad_pair = _backward(
            ctx.carrier, grads[0], query, pair, out, logsumexp, ctx.rests, ctx.scale
        )
        grad_key, grad_value = grad_pair.to(pair.dtype)
        of_sinks = None
        if sinks is not None:  # of this rank's queries
            of_sinks = flash.sinks_gradient(grads[0], out, logsumexp, sinks)
        return None, None, grad_query.to(query.dtype), grad_key, grad_value, of_sinks
