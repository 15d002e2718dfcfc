"""A decoder layer in tiles around attention in head groups, with a backward of two passes by hand.

One operation of a decoder layer couples tokens; all others work token by token. So forward is:
for each head group, project tile by tile and attend; then, tile by tile, output projection and MLP.
Backward, from the layer's input x, the incoming gradient dY, and attention's output, kept or recomputed:

1. by tile: rebuild what follows attention and go back through it. dY becomes the gradient of the
   residual, the gradient of attention's output goes to a buffer of its own;
2. by head group: project again and run attention's backward. dQ takes the place of the group's output,
   dK and dV that of its gradient;
3. by tile: go back through projections and norm into dY, which is now the gradient of x.

Of full length there are x, dY, and two buffers [S, H D], beside what one group needs; with `stream` there
is dY alone, and the rest waits on the host by tile. Weight gradients add up over tiles in fp32 (or wider)
and leave as one gradient per parameter.
Legend: B batch, S sequence, s = S/P, P sequence-parallel degree, E hidden size, H query heads, K kv heads,
D head dim, G head groups, h query and k kv heads of a group on one rank; send order as in `exchange`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alst_impl.ops import tiling
from alst_impl.ops.exchange import Arriving, Exchange
from alst_impl.ops.flash import Documents, Rest, attend_backward, attend_with_logsumexp
from alst_impl.ops.headgroups import HeadGroups
from alst_impl.ops.offload import HostOffload
from alst_impl.ops.parked import DeviceSlots, HostSlots, Parked, Resident, Rows, Slots
from alst_impl.ops.recompute import FirstRun
from alst_impl.ops.segment import Segment, Segments
from alst_impl.ops.tiling import GradientSum, TokenWise, accumulation_dtype, parameters_of
from alst_impl.placement import Placement


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
class _Attended:
    """What attention's backward needs of all groups."""

    out: Slots
    logsumexp: Tensor
    """[G, B, h, S], of this rank's heads; fp32 (or wider)."""
    rests: list[Rest]
    """Of any group: they are of equal shapes."""


@dataclass(frozen=True)
class _Begun:
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
class _Group:
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


@dataclass(frozen=True)
class Layerwise:
    """One decoder layer, ready to run."""

    decoder: Decoder
    groups: HeadGroups
    exchange: Exchange
    blocks: int | None
    """Parts of the sequence whose queries meet the keys of one part at a time; None for all at once."""
    rows: int
    """Tokens of a tile."""
    keep_attention: bool
    """Keep attention's output and statistics for backward instead of computing them again."""
    offload: HostOffload | None
    """Where what is kept waits for backward; None leaves it on the device."""
    stream: bool
    """Hold the layer's input, attention's output and its gradient on the host, and fetch what is needed by
    tile or head group; once its tiles are there, the layer's output takes the input's place."""
    eight_bits: bool
    """Keep the layer's input rounded to eight bits: backward computes with that one."""
    segments: Segments | None
    """Which layer inputs are kept, where not all are; shared by all layers of the model."""
    placement: Placement

    def __call__(self, x: Tensor, call: Call) -> Tensor:
        """x [B, s, E] -> [B, s, E]. Collective under sequence parallelism.

        The output must have one consumer: backward overwrites its gradient. So must the input of a layer
        that streams, which becomes the output. Raises `ValueError` under autocast.
        """
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            raise ValueError(
                f"method 'layerwise' keeps what it computes in the model's dtype ({x.dtype}), but runs under "
                f"autocast ({dtype}); leave autocast and convert the model, or use method 'alst'"
            )
        if not torch.is_grad_enabled():
            return self.forward(x, call, into=x if self.stream else None)[0]
        parameters = parameters_of(self.decoder.module)
        return _Layer.apply(self, call, x, *parameters)  # type: ignore[no-any-return, no-untyped-call]

    def keep(self, x: Tensor) -> Rows:
        """The layer's input, to be asked for as often as needed: in tiles on the host, or as it is."""
        if self.offload is None:
            return Resident(x.detach())
        return Parked(x, self.size(x.shape[1]), self.offload, eight_bits=self.eight_bits)

    def join(self, x: Tensor, call: Call) -> Segment | None:
        """The segment that the layer is part of, which keeps its input x if it is the first one there."""
        if self.segments is None:
            return None

        def again(hidden: Tensor) -> Tensor:
            # Through the module: in the backward of another layer an engine has to gather this one's weights.
            out: Tensor = self.decoder.module(
                hidden, position_embeddings=(call.cos, call.sin), documents=call.documents
            )
            return out

        return self.segments.join(x, again, self.keep, stays=not self.stream)

    # -- forward ----------------------------------------------------------------------------------

    def forward(
        self, x: Tensor, call: Call, into: Tensor | None = None
    ) -> tuple[Tensor, _Attended]:
        """The layer's output, in `into` if given, which may be x itself, and attention's."""
        self.placement.on_layer()
        attended = self.attend(Resident(x), call)
        if self.offload is not None:
            self.offload.settle()
        y = torch.empty_like(x) if into is None else into
        for rows in self._tiles(x.shape[1]):
            residual = x[:, rows] + self.decoder.output(_by_token(attended.out.tile(rows)))
            y[:, rows] = residual.add_(self.decoder.feed_forward(residual))
            self.placement.evidence.tiles += 1
        return y, attended

    def attend(self, x: Rows, call: Call) -> _Attended:
        """Attention of layer input x [B, s, E], one head group at a time. No graph."""
        out = self._slots(x)
        batch, local, _ = x.shape
        shape = self.groups.num_groups, batch, self.groups.heads, local * self.groups.degree
        logsumexp = x.like.new_empty(shape, dtype=accumulation_dtype(x.like))
        rests: list[Rest] = []
        for each in self._by_group(x, call):
            found, logsumexp[each.group], rests = attend_with_logsumexp(
                each.query, each.key, each.value, **self._attention(x, call)
            )
            self._to_slot(found, out, each.group)
            del found, each  # before the next group's are made
        return _Attended(out, logsumexp, rests)

    def _attention(self, x: Rows, call: Call) -> dict[str, Any]:
        """What attention is told beside tensors."""
        decoder, seqlen = self.decoder, x.shape[1] * self.groups.degree
        return {
            "scale": decoder.scale,
            "window": decoder.window,
            "documents": call.documents,
            "block": None if self.blocks is None else -(-seqlen // self.blocks),
        }

    def _to_slot(self, x: Tensor, slots: Slots, group: int) -> None:
        """[B, h, S, D], this rank's heads of `group`, to the ranks of their tokens. Collective."""
        room = slots.room(group)
        self.exchange.to_sequence(x, room)
        slots.put(group, room)

    def _by_group(self, x: Rows, call: Call, *slots: Slots) -> Iterator[_Group]:
        """What attention takes of each head group, with whole sequences of this rank's heads.

        Queries, keys and values are projected from x; `slots` [G, P, s, B, h, D] are in send order, and
        a group's part of them is not to be read afterwards: its room is used again.
        """
        begun = self._begun(x, call, slots)
        pair = x.like.new_empty(0)
        for each in _one_ahead(begun) if self.exchange.overlap else begun:
            if each.pair is not None:
                pair = each.pair.arrive()
            key, value = pair.chunk(2, dim=1)
            arrived = [one.arrive() for one in each.slots]
            yield _Group(each.group, each.kv_group, each.query.arrive(), key, value, arrived)
            del key, value, arrived
            if each.last:
                pair = x.like.new_empty(0)  # before the next kv group's is made
            del each

    def _begun(self, x: Rows, call: Call, slots: Sequence[Slots]) -> Iterator[_Begun]:
        """The exchanges of each group, begun; keys and values for the first one that shares them."""
        groups = self.groups
        shared = groups.num_groups // groups.num_kv_groups
        for kv_group, _ in tiling.tile_bounds(groups.num_kv_groups, groups.num_kv_groups):
            members = tiling.tile_bounds(shared, shared)
            for index, (member, _) in enumerate(members):
                fresh, last = index == 0, index == len(members) - 1
                yield self._begin(x, call, slots, kv_group * shared + member, fresh, last)

    def _begin(
        self, x: Rows, call: Call, slots: Sequence[Slots], group: int, fresh: bool, last: bool
    ) -> _Begun:
        """Begins the exchanges of `group`; what was sent is gone when it returns, unless they overlap."""
        kv_group, arriving = self.groups.kv_group(group), []
        room: Tensor | None = None
        for slot in slots:
            sending = slot.group(group)
            arriving.append(self.exchange.start(sending, room))
            room = sending
            del sending
        query, sent = self._project(x, call, group, kv_group if fresh else None)
        pair = None if sent is None else self.exchange.start(sent)
        return _Begun(group, kv_group, last, self.exchange.start(query, room), pair, arriving)

    def _project(
        self, x: Rows, call: Call, group: int, kv_group: int | None
    ) -> tuple[Tensor, Tensor | None]:
        """Queries of `group` [P, s, B, h, D], keys beside values of `kv_group` [P, s, B, 2 k, D]."""
        decoder, groups = self.decoder, self.groups
        batch, local, _ = x.shape
        shape = groups.degree, local, batch
        query = x.like.new_empty(*shape, groups.heads, decoder.query.dim)
        of_query = decoder.query.select(groups.query_heads(group))
        sent = None
        if kv_group is not None:
            sent = x.like.new_empty(*shape, 2 * groups.kv_heads, decoder.key.dim)
            heads = groups.key_heads(kv_group)
            of_key, of_value = decoder.key.select(heads), decoder.value.select(heads)
        for rows in self._tiles(x.shape[1]):
            hidden = decoder.before(x.tile(rows))
            q = decoder.query.split(F.linear(hidden, *of_query))
            if sent is None:
                q, _ = decoder.rotate(q, q[:, :0], *call.tile(rows))
            else:
                k = decoder.key.split(F.linear(hidden, *of_key))
                q, k = decoder.rotate(q, k, *call.tile(rows))
                v = decoder.value.split(F.linear(hidden, *of_value))
                sent[:, rows, :, : groups.kv_heads] = self._in_send_order(k)
                sent[:, rows, :, groups.kv_heads :] = self._in_send_order(v)
            query[:, rows] = self._in_send_order(q)
        return query, sent

    # -- backward ---------------------------------------------------------------------------------

    def backward(
        self, x: Rows, call: Call, grad: Tensor, attended: _Attended
    ) -> list[Tensor | None]:
        """Turns `grad`, of the output [B, s, E], into that of x in place; returns the parameters'."""
        parameters = parameters_of(self.decoder.module)
        sums = GradientSum(parameters)
        grad_out = self._after_attention(x, grad, attended.out, parameters, sums)
        grad_key_value = self._through_attention(x, call, attended, grad_out)
        self._before_attention(x, call, grad, attended.out, grad_key_value, parameters, sums)
        return sums.take()

    def _after_attention(
        self,
        x: Rows,
        grad: Tensor,
        out: Slots,
        parameters: list[nn.Parameter],
        sums: GradientSum,
    ) -> Slots:
        """First pass: `grad` becomes the gradient of the residual; returns that of `out`, as `out`."""
        grad_out = out.another()
        for rows in self._tiles(x.shape[1]):
            attended = _by_token(out.tile(rows)).requires_grad_()
            with torch.enable_grad():
                residual = x.tile(rows) + self.decoder.output(attended)
                y = residual + self.decoder.feed_forward(residual)
            edge = torch.autograd.graph.get_gradient_edge(y)
            del y
            of_residual, of_attended, *gradients = torch.autograd.grad(
                edge, [residual, attended, *parameters], grad[:, rows], allow_unused=True
            )
            grad[:, rows] = of_residual
            grad_out.put_tile(rows, self._in_slots(of_attended))
            sums.add(tuple(gradients))
            del of_residual, of_attended, gradients, residual, attended, edge
        return grad_out

    def _through_attention(
        self, x: Rows, call: Call, attended: _Attended, grad_out: Slots
    ) -> Slots:
        """Second pass: dQ replaces `attended.out`; returns dK beside dV [G', P, s, B, 2 k, D]."""
        out = attended.out
        slots: Slots | None = None
        pair: Tensor | None = None
        done = 0
        for each in self._by_group(x, call, out, grad_out):
            if pair is not None and each.kv_group != done:
                slots = self._give_back(pair, done, grad_out, slots)
                pair = None
            whole_out, whole_grad = each.slots
            of_query, *of_pair = attend_backward(
                whole_grad,
                each.query,
                each.key,
                each.value,
                whole_out,
                attended.logsumexp[each.group],
                attended.rests,
                **self._attention(x, call),
            )
            group, done = each.group, each.kv_group
            del each, whole_out, whole_grad
            self._to_slot(of_query, out, group)
            del of_query
            pair = self._summed(pair, *of_pair)
            del of_pair
        assert pair is not None, "there is at least one group"
        return self._give_back(pair, done, grad_out, slots)

    def _summed(self, total: Tensor | None, key: Tensor, value: Tensor) -> Tensor:
        """[S, B, 2 k, D]: `total` with dK and dV [B, k, S, D] of one more group that shares them."""
        batch, heads, seqlen, dim = key.shape
        pair = key.new_empty(seqlen, batch, 2 * heads, dim) if total is None else total
        for part, one in zip(pair.chunk(2, dim=2), (key, value), strict=True):
            by_token = one.permute(2, 0, 1, 3)
            if total is None:
                part.copy_(by_token)
            else:
                part.add_(by_token)
        return pair

    def _give_back(
        self, pair: Tensor, kv_group: int, grad_out: Slots, slots: Slots | None
    ) -> Slots:
        """Sends dK and dV of `kv_group` to the ranks of their tokens; returns the slots of all."""
        groups = self.groups
        # The slots of the group's output gradients are free once all that share its heads are through.
        slots = (
            grad_out.pairs(groups.num_kv_groups, 2 * groups.kv_heads) if slots is None else slots
        )
        self._to_slot(pair.permute(1, 2, 0, 3), slots, kv_group)
        return slots

    def _before_attention(
        self,
        x: Rows,
        call: Call,
        grad: Tensor,
        grad_query: Slots,
        grad_key_value: Slots,
        parameters: list[nn.Parameter],
        sums: GradientSum,
    ) -> None:
        """Third pass: adds to `grad`, of the residual, what comes through the projections."""
        for rows in self._tiles(x.shape[1]):
            tile = x.tile(rows).detach().requires_grad_()
            with torch.enable_grad():
                outputs = self.decoder.qkv(self.decoder.before(tile), *call.tile(rows))
            of_outputs = self._of_qkv(grad_query.tile(rows), grad_key_value.tile(rows))
            of_tile, *gradients = torch.autograd.grad(
                outputs, [tile, *parameters], of_outputs, allow_unused=True
            )
            grad[:, rows] += of_tile
            sums.add(tuple(gradients))
            del of_tile, gradients, outputs, of_outputs, tile

    # -- layouts ----------------------------------------------------------------------------------

    def _tiles(self, local: int) -> Iterator[slice]:
        for start, stop in tiling.tile_bounds(local, -(-local // self.rows)):
            yield slice(start, stop)

    def size(self, local: int) -> int:
        """Rows of every tile of `local` but the last."""
        return -(-local // -(-local // self.rows))

    def _slots(self, x: Rows) -> Slots:
        """A contiguous slot in send order for each group."""
        groups = self.groups
        batch, local, _ = x.shape
        shape = groups.num_groups, groups.degree, local, batch, groups.heads, self.decoder.query.dim
        if self.stream:
            assert self.offload is not None, "tiles wait on the host"
            return HostSlots(torch.Size(shape), self.size(local), x.like.new_empty(0), self.offload)
        return DeviceSlots(x.like.new_empty(shape))

    def _in_send_order(self, x: Tensor) -> Tensor:
        """[B, P h, s, D] -> [P, s, B, h, D]."""
        by_rank: Tensor = x.unflatten(1, (self.groups.degree, -1))
        return by_rank.permute(1, 3, 0, 2, 4)

    def _in_slots(self, x: Tensor) -> Tensor:
        """[B, rows, H D] -> [G, P, rows, B, h, D]."""
        groups = self.groups
        shape = groups.degree, groups.num_groups, groups.heads, self.decoder.query.dim
        by_head: Tensor = x.unflatten(-1, shape)
        return by_head.permute(3, 2, 1, 0, 4, 5)

    def _of_qkv(self, grad_query: Tensor, grad_key_value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of a tile of slots, as `Decoder.qkv` returns the tensors themselves."""
        query = _by_token(grad_query).unflatten(-1, (-1, self.decoder.query.dim))
        # [G', P, s, B, 2 k, D] -> [B, P, G', 2 k, s, D] -> 2 x [B, P, G', k, s, D]
        pair = grad_key_value.permute(3, 1, 0, 4, 2, 5).chunk(2, dim=3)
        # -> [B, K, copies, s, D]: the gradient of a head is the sum over its copies
        key, value = (
            x.flatten(1, 3).unflatten(1, (-1, self.groups.copies)).sum(dim=2) for x in pair
        )
        return query.transpose(1, 2), key, value


def _by_token(slots: Tensor) -> Tensor:
    """A tile [G, P, rows, B, h, D] -> [B, rows, H D], a copy."""
    # heads of a rank stand together: [G, P, s, B, h, D] -> [B, s, P, G, h, D]
    return slots.permute(3, 2, 1, 0, 4, 5).flatten(2).contiguous()


def _one_ahead(items: Iterator[_Begun]) -> Iterator[_Begun]:
    """`items`, each handed on when the next one has been made."""
    before: _Begun | None = None
    for item in items:
        if before is not None:
            yield before
        before = item
    if before is not None:
        yield before


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, layer: Layerwise, call: Call, x: Tensor, *parameters: nn.Parameter
    ) -> Tensor:
        ctx.layer, ctx.call = layer, call
        ctx.segment = layer.join(x, call)
        in_tiles = ctx.segment is None and (layer.stream or layer.eight_bits)
        ctx.tiles = layer.keep(x) if in_tiles else None
        # Under its own name: for autograd the output is a tensor of its own, which nobody has saved.
        y, attended = layer.forward(x, call, into=x.data if layer.stream else None)
        # Parameters are not saved: an engine may free and gather them again in between. They are looked
        # up again in backward.
        kept = [x] if ctx.tiles is None and ctx.segment is None else []
        if layer.keep_attention:
            kept.append(attended.logsumexp)
            if isinstance(attended.out, DeviceSlots):
                kept.append(attended.out.slots)
            else:
                ctx.out = attended.out
            ctx.rests = attended.rests
        if layer.offload is None:
            ctx.save_for_backward(*kept)
        else:
            ctx.parked = [layer.offload.store(tensor) for tensor in kept]
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layer: Layerwise = ctx.layer
        layer.placement.on_layer()
        if layer.offload is None:
            kept = list(ctx.saved_tensors)
        else:
            kept = [layer.offload.load(parked) for parked in reversed(ctx.parked)][::-1]
            ctx.parked = None
        tiles = ctx.tiles if ctx.segment is None else ctx.segment.take()
        ctx.tiles = ctx.segment = None
        x: Rows
        if tiles is None:
            x = Resident(kept.pop(0).detach())
        else:
            x = tiles if layer.stream else Resident(tiles.whole())
        del tiles
        if layer.keep_attention:
            logsumexp, *slots = kept
            attended = _Attended(DeviceSlots(*slots) if slots else ctx.out, logsumexp, ctx.rests)
            ctx.out = None
        else:
            attended = layer.attend(x, ctx.call)
        grad = grads[0].contiguous()
        gradients = layer.backward(x, ctx.call, grad, attended)
        return None, None, grad, *gradients


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        fn: TokenWise,
        size: int,
        offload: HostOffload,
        x: Tensor,
        *parameters: nn.Parameter,
    ) -> Tensor:
        ctx.fn, ctx.size = fn, size
        ctx.tiles = Parked(x, size, offload, eight_bits=False)
        offload.settle()
        y = x.data
        with FirstRun(x.device) as ctx.first:
            for part in y.split(size, dim=1):
                part.copy_(fn(part))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tiles, ctx.tiles = ctx.tiles, None
        parameters = parameters_of(ctx.fn)
        sums = GradientSum(parameters)
        grad = grads[0].contiguous()
        again = ctx.first.again()
        for start, stop in tiling.tile_bounds(grad.shape[1], -(-grad.shape[1] // ctx.size)):
            tile = tiles.tile(slice(start, stop)).requires_grad_()
            with torch.enable_grad(), again.part():
                out = ctx.fn(tile)
            of_tile, *gradients = torch.autograd.grad(
                out, [tile, *parameters], grad[:, start:stop], allow_unused=True
            )
            grad[:, start:stop] = of_tile
            sums.add(tuple(gradients))
        return None, None, None, grad, *sums.take()


def in_place(fn: TokenWise, x: Tensor, size: int, offload: HostOffload) -> Tensor:
    """`fn(x)` in tiles of `size` rows, in the place of x, which waits on the host for backward.

    `fn` maps [B, s, E] to the same shape token by token. Backward overwrites the incoming gradient: like x,
    the output must have one consumer. Local.
    """
    if not torch.is_grad_enabled():
        return fn(x)
    return _InPlace.apply(fn, size, offload, x, *parameters_of(fn))  # type: ignore[no-any-return, no-untyped-call]
