"""A decoder layer in tiles around attention in head groups, with a hand-written backward of three passes.

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

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alst_impl.ops.layerwise.backward import backward
from alst_impl.ops.layerwise.groups import GroupedAttention
from alst_impl.ops.layerwise.parts import Attended, Call, by_token
from alst_impl.ops.memory.parked import DeviceSlots, Parked, Resident, Rows
from alst_impl.ops.memory.segment import Segment, Segments
from alst_impl.ops.memory.tiling import parameters_of
from alst_impl.placement import Placement


@dataclass(frozen=True)
class Layerwise(GroupedAttention):
    """One decoder layer, ready to run."""

    keep_attention: bool
    """Keep attention's output and statistics for backward instead of computing them again."""
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

    def forward(self, x: Tensor, call: Call, into: Tensor | None = None) -> tuple[Tensor, Attended]:
        """The layer's output, in `into` if given, which may be x itself, and attention's."""
        self.placement.on_layer()
        attended = self.attend(Resident(x), call)
        if self.offload is not None:
            self.offload.settle()
        y = torch.empty_like(x) if into is None else into
        for rows in self.tiles(x.shape[1]):
            residual = x[:, rows] + self.decoder.output(by_token(attended.out.tile(rows)))
            y[:, rows] = residual.add_(self.decoder.feed_forward(residual))
            self.placement.evidence.tiles += 1
        return y, attended


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
            attended = Attended(DeviceSlots(*slots) if slots else ctx.out, logsumexp, ctx.rests)
            ctx.out = None
        else:
            attended = layer.attend(x, ctx.call)
        grad = grads[0].contiguous()
        gradients = backward(layer, x, ctx.call, grad, attended)
        return None, None, grad, *gradients
