"""A decoder layer in tiles around attention in head groups, with a hand-written backward of three passes.

Only attention couples tokens; all other operations work token by token. So forward projects tile by tile and
attends, for each head group. Then it computes output projection and MLP tile by tile.

Backward starts from the layer's input x, the incoming gradient dY, and attention's output, which is kept or
recomputed:

1. By tile: recompute what follows attention, and run its backward. dY becomes the gradient of the residual.
2. By head group: project again and run attention's backward, with the gradient of its output, which is projected
   from that of the residual. dQ overwrites the group's output. dK and dV go to a separate buffer.
   Where the output projection is not known, the first pass writes the gradient of attention's output to a
   separate buffer, and dK and dV overwrite that.
3. By tile: run the backward of projections and norm, and add it to dY, which is then the gradient of x.

The full-length tensors are dY, what is projected of x, one buffer [S, H D] and another [S, 2 K D] (or a second
[S, H D]), besides what one group needs. x is on the host; what is projected is its norm where that is known, so it
is computed once for all groups. With `stream`, only dY is full-length, and the rest is on the host by tile. Weight
gradients are summed over tiles in fp32 (or wider) and returned as one gradient per parameter.
Legend: B batch, S sequence, s = S/P, P sequence-parallel degree, E hidden size, H query heads, K kv heads, D
head dim, G head groups, h query and k kv heads of a group on one rank; send order as in `exchange`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alst_impl.ops.autograd import apply
from alst_impl.ops.layerwise.backward import backward
from alst_impl.ops.layerwise.groups import GroupedAttention
from alst_impl.ops.layerwise.parts import Attended, Call, Inputs
from alst_impl.ops.memory.parked import DeviceSlots, Parked, Resident, Rows
from alst_impl.ops.memory.segment import Segment, Segments
from alst_impl.ops.memory.tiling import parameters_of
from alst_impl.placement import Placement


@dataclass(frozen=True)
class Layerwise(GroupedAttention):
    """One decoder layer, ready to run."""

    keep_attention: bool
    """Keep attention's output and log-sum-exp for backward instead of recomputing them."""
    eight_bits: bool
    """Keep the layer's input rounded to eight bits; backward computes with the rounded values."""
    segments: Segments | None
    """Checkpoint segments, shared by all layers of the model; None keeps the input of every layer."""
    placement: Placement

    def __call__(self, x: Tensor, call: Call) -> Tensor:
        """x [B, s, E] -> [B, s, E]. Collective under sequence parallelism.

        The output must have a single consumer, because backward overwrites its gradient. With `stream`, x
        must have a single consumer too, because the output overwrites it. Raises `ValueError` under autocast.
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
        return apply(_Layer, self, call, x, *parameters)

    def keep(self, x: Tensor) -> Rows:
        """Store the layer's input, which can then be read any number of times: in tiles on the host, or as it is."""
        if self.offload is None:
            return Resident(x.detach())
        return Parked(x, self.size(x.shape[1]), self.offload, eight_bits=self.eight_bits)

    def for_backward(self, x: Rows) -> tuple[Rows, Inputs]:
        """The layer's input in backward, and what is projected of it.

        An input on the host stays there if what is projected is not the input itself.
        """
        if self.stream or isinstance(x, Resident):
            return x, self.inputs(x, None)
        if self.decoder.prepare is None:
            x = Resident(x.whole())
            return x, self.inputs(x, None)
        return x, self.inputs(x, x.like.new_empty(x.shape))

    def join(self, x: Tensor, call: Call) -> Segment | None:
        """Add the layer to its segment, which keeps x if the layer is its first. None without segments."""
        if self.segments is None:
            return None

        def again(hidden: Tensor) -> Tensor:
            # Calls the module, so that an engine gathers this layer's weights during another layer's backward.
            out = self.decoder.module(hidden, *call.args, layout=call.layout, **call.kwargs)
            found: Tensor = out if isinstance(out, Tensor) else out[0]
            return found

        return self.segments.join(x, again, self.keep, stays=self.offload is None)

    def forward(self, x: Tensor, call: Call, into: Tensor | None = None) -> tuple[Tensor, Attended]:
        """The layer's output and attention's. `into`, if given, receives the layer's output and may be x itself."""
        self.placement.on_layer()
        resident = Resident(x)
        y = torch.empty_like(x) if into is None else into
        # The output's memory holds what is projected until attention is done.
        attended = self.attend(self.inputs(resident, y if into is None else None), call)
        if self.offload is not None:
            self.offload.settle()
        for rows in self.tiles(x.shape[1]):
            y[:, rows] = self.decoder.finish(resident, rows, attended.out, call.tile(rows))
            self.placement.evidence["tiles"] += 1
        return y, attended


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, layer: Layerwise, call: Call, x: Tensor, *parameters: nn.Parameter
    ) -> Tensor:
        ctx.layer, ctx.call = layer, call
        ctx.segment = layer.join(x, call)
        in_tiles = ctx.segment is None and layer.offload is not None
        ctx.tiles = layer.keep(x) if in_tiles else None
        # `x.data`, so that autograd sees the output as a new tensor, which has not been saved.
        y, attended = layer.forward(x, call, into=x.data if layer.stream else None)
        # Parameters are not saved: an engine may free and gather them again before backward. Backward looks
        # them up again.
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
        x, inputs = layer.for_backward(Resident(kept.pop(0).detach()) if tiles is None else tiles)
        del tiles
        if layer.keep_attention:
            logsumexp, *slots = kept
            attended = Attended(DeviceSlots(*slots) if slots else ctx.out, logsumexp, ctx.rests)
            ctx.out = None
        else:
            attended = layer.attend(inputs, ctx.call)
        grad = grads[0].contiguous()
        gradients = backward(layer, x, inputs, ctx.call, grad, attended)
        return None, None, grad, *gradients
