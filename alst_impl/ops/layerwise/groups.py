"""Attention of a decoder layer, one head group at a time, with the exchanges between ranks.

Legend as in `layer`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alst_impl.ops.attention.flash import Rest
from alst_impl.ops.layerwise.attention import HeadAttention
from alst_impl.ops.layerwise.exchange import Exchange
from alst_impl.ops.layerwise.headgroups import HeadGroups
from alst_impl.ops.layerwise.parts import (
    Attended,
    Begun,
    Call,
    Decoder,
    Group,
    Inputs,
    by_token,
)
from alst_impl.ops.memory import tiling
from alst_impl.ops.memory.offload import HostOffload
from alst_impl.ops.memory.parked import (
    ByGroup,
    DeviceSlots,
    HostSlots,
    Prepared,
    Resident,
    Rows,
    Slots,
)
from alst_impl.ops.memory.tiling import accumulation_dtype


@dataclass(frozen=True)
class GroupedAttention:
    """Attention of one decoder layer in head groups, for forward and backward."""

    decoder: Decoder
    groups: HeadGroups
    exchange: Exchange
    blocks: int | None
    """Number of sequence blocks: queries of one block attend to keys of one block at a time; None is one block."""
    rows: int
    """Tokens of a tile."""
    offload: HostOffload | None
    """Stores on the host what is kept for backward; None keeps it on the device."""
    stream: bool
    """Keep the layer's input, attention's output and its gradient on the host, and fetch them by tile or head group.
    The layer's output overwrites its input, once that is on the host."""

    def inputs(self, x: Rows, into: Tensor | None) -> Inputs:
        """What is projected of the layer's input x [B, s, E]: `into`, after it has been written, or made of x by tile."""
        prepare = self.decoder.prepare
        if prepare is None:
            return Inputs(x, wide=False)
        if into is None:
            return Inputs(Prepared(x, prepare), wide=False)
        for rows in self.tiles(x.shape[1]):
            into[:, rows] = prepare(x.tile(rows))
        return Inputs(Resident(into), wide=True)

    def attend(self, inputs: Inputs, call: Call) -> Attended:
        """Attention of a layer's inputs, one head group at a time. No graph."""
        x = inputs.rows
        out = self.room(x, self.groups.num_groups, self.groups.heads)
        shape = self.groups.num_groups, x.shape[0], self.groups.heads, call.layout.padded
        logsumexp = x.like.new_empty(shape, dtype=accumulation_dtype(x.like))
        rests: list[Rest] = []
        for each in self.by_group(inputs, call):
            attention = self.attention(each.group, call, x.shape[0])
            found, logsumexp[each.group], rests = attention.forward(
                each.query, each.key, each.value
            )
            self.to_slot(found, out, each.group)
            del found, each  # before the next group's are made
        return Attended(out, logsumexp, rests)

    def attention(self, group: int, call: Call, batch: int) -> HeadAttention:
        """Attention of this rank's heads of `group`, after they have been projected."""
        variant = self.decoder.variant
        if variant.sinks is not None:
            variant = replace(variant, sinks=variant.sinks.detach()[self.heads(group)])
        layout = call.layout
        return HeadAttention.of(variant, batch, layout.padded, layout.documents, self.blocks)

    def heads(self, group: int) -> list[int]:
        """This rank's query heads of `group`."""
        first = self.exchange.rank * self.groups.heads
        return self.groups.query_heads(group)[first : first + self.groups.heads]

    def to_slot(self, x: Tensor, slots: Slots, group: int) -> None:
        """Send this rank's heads of `group` [B, h, S, D] to the ranks of their tokens. Collective."""
        room = slots.room(group)
        self.exchange.to_sequence(x, room)
        slots.put(group, room)

    def by_group(self, inputs: Inputs, call: Call, *slots: ByGroup) -> Iterator[Group]:
        """Yield attention's inputs for each head group, with whole sequences of this rank's heads.

        Queries, keys and values are projected from a layer's inputs. `slots` [G, P, s, B, h, D] are in send order. A group's
        part of them must not be read afterwards, because its memory is reused.
        """
        begun = self._begun(inputs, call, slots)
        pair = inputs.rows.like.new_empty(0)
        for each in _one_ahead(begun) if self.exchange.overlap else begun:
            if each.pair is not None:
                pair = each.pair.arrive()
            key, value = pair.chunk(2, dim=1)
            arrived = [one.arrive() for one in each.slots]
            yield Group(each.group, each.kv_group, each.query.arrive(), key, value, arrived)
            del key, value, arrived
            if each.last:
                pair = pair.new_empty(0)  # before the next kv group's is made
            del each

    def _begun(self, inputs: Inputs, call: Call, slots: Sequence[ByGroup]) -> Iterator[Begun]:
        """Start the exchanges of each group; keys and values only with the first group that shares them."""
        groups = self.groups
        shared = groups.num_groups // groups.num_kv_groups
        for kv_group, _ in tiling.tile_bounds(groups.num_kv_groups, groups.num_kv_groups):
            members = tiling.tile_bounds(shared, shared)
            for index, (member, _) in enumerate(members):
                fresh, last = index == 0, index == len(members) - 1
                yield self._begin(inputs, call, slots, kv_group * shared + member, fresh, last)

    def _begin(
        self,
        inputs: Inputs,
        call: Call,
        slots: Sequence[ByGroup],
        group: int,
        fresh: bool,
        last: bool,
    ) -> Begun:
        """Start the exchanges of `group`. Sent tensors are freed before it returns, unless exchanges overlap."""
        kv_group, arriving = self.groups.kv_group(group), []
        room: Tensor | None = None
        for slot in slots:
            sending = slot.group(group)
            arriving.append(self.exchange.start(sending, room))
            room = sending
            del sending
        query, sent = self._project(inputs, call, group, kv_group if fresh else None)
        pair = None if sent is None else self.exchange.start(sent)
        return Begun(group, kv_group, last, self.exchange.start(query, room), pair, arriving)

    def _project(
        self, inputs: Inputs, call: Call, group: int, kv_group: int | None
    ) -> tuple[Tensor, Tensor | None]:
        """Queries of `group` [P, s, B, h, D]; keys and values of `kv_group`, concatenated: [P, s, B, 2 k, D]."""
        decoder, groups, x = self.decoder, self.groups, inputs.rows
        batch, local, width = x.shape
        shape = groups.degree, local, batch
        query = x.like.new_empty(*shape, groups.heads, decoder.dim)
        sent = kv_heads = None
        if kv_group is not None:
            sent = x.like.new_empty(*shape, 2 * groups.kv_heads, decoder.dim)
            kv_heads = groups.key_heads(kv_group)
        project = decoder.projection(groups.query_heads(group), kv_heads)
        features = query[0, 0].numel() + (0 if sent is None else sent[0, 0].numel())
        times = width * batch // (groups.degree * features) if inputs.wide else 1
        for rows in self.tiles(local, times):
            q, k, v = project(x.tile(rows), call.tile(rows))
            if sent is not None and k is not None and v is not None:
                sent[:, rows, :, : groups.kv_heads] = self.in_send_order(k)
                sent[:, rows, :, groups.kv_heads :] = self.in_send_order(v)
            query[:, rows] = self.in_send_order(q)
            del q, k, v
        return query, sent

    def tiles(self, local: int, times: int = 1) -> Iterator[slice]:
        """Tiles of `local` rows, each `times` as large as a tile of the layer."""
        for start, stop in tiling.tile_bounds(local, -(-local // (self.rows * max(times, 1)))):
            yield slice(start, stop)

    def size(self, local: int) -> int:
        """Rows of a tile, if `local` rows are tiled; the last tile may be shorter."""
        return -(-local // -(-local // self.rows))

    def room(self, x: Rows, num_groups: int, heads: int) -> Slots:
        """Uninitialized slots in send order, a contiguous one of `heads` heads for each of `num_groups` groups."""
        batch, local, _ = x.shape
        shape = num_groups, self.groups.degree, local, batch, heads, self.decoder.dim
        if self.stream:
            assert self.offload is not None, "tiles wait on the host"
            return HostSlots(torch.Size(shape), self.size(local), x.like.new_empty(0), self.offload)
        return DeviceSlots(x.like.new_empty(shape))

    def in_send_order(self, x: Tensor) -> Tensor:
        """[B, P h, s, D] -> [P, s, B, h, D]."""
        by_rank: Tensor = x.unflatten(1, (self.groups.degree, -1))
        return by_rank.permute(1, 3, 0, 2, 4)

    def in_slots(self, x: Tensor) -> Tensor:
        """[B, rows, H D] -> [G, P, rows, B, h, D]."""
        groups = self.groups
        shape = groups.degree, groups.num_groups, groups.heads, self.decoder.dim
        by_head: Tensor = x.unflatten(-1, shape)
        return by_head.permute(3, 2, 1, 0, 4, 5)

    def of_qkv(self, grad_query: Tensor, grad_key_value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of a tile of slots, in the layout in which `Decoder.qkv` returns query, key and value."""
        query = by_token(grad_query).unflatten(-1, (-1, self.decoder.dim))
        # [G', P, s, B, 2 k, D] -> [B, P, G', 2 k, s, D] -> 2 x [B, P, G', k, s, D]
        pair = grad_key_value.permute(3, 1, 0, 4, 2, 5).chunk(2, dim=3)
        # -> [B, K, copies, s, D]: the gradient of a head is the sum over its copies
        key, value = (
            x.flatten(1, 3).unflatten(1, (-1, self.groups.copies)).sum(dim=2) for x in pair
        )
        return query.transpose(1, 2), key, value


def _one_ahead(items: Iterator[Begun]) -> Iterator[Begun]:
    """`items`, each yielded after the next one has been made."""
    before: Begun | None = None
    for item in items:
        if before is not None:
            yield before
        before = item
    if before is not None:
        yield before
