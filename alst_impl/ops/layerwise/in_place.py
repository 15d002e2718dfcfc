"""A token-wise function that overwrites its input, with a copy of the input on the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from alst_impl.ops.autograd import apply
from alst_impl.ops.memory import tiling
from alst_impl.ops.memory.offload import HostOffload
from alst_impl.ops.memory.parked import Parked
from alst_impl.ops.memory.recompute import FirstRun
from alst_impl.ops.memory.tiling import GradientSum, TokenWise, parameters_of


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
    """`fn(x)` in tiles of `size` rows, written over x. A copy of x is kept on the host for backward.

    `fn` maps [B, s, E] to the same shape token by token. Backward overwrites the incoming gradient. So the
    output must have a single consumer, and so must x. Local.
    """
    if not torch.is_grad_enabled():
        return fn(x)
    return apply(_InPlace, fn, size, offload, x, *parameters_of(fn))
