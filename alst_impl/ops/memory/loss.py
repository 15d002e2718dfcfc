"""Logits and loss tile by tile: the whole logits tensor never exists.

Source: ALST (arXiv:2506.13996, section 3.1.2). The loss is a sum over tokens divided by a count that the
caller gives, so tiles, ranks and micro-batches simply add up.
Legend: B batch, S sequence, E features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from alst_impl.ops.autograd import apply
from alst_impl.ops.memory.recompute import without_autocast
from alst_impl.ops.memory.tiling import GradientSum, parameters_of, tile_bounds

TokenLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden [B, s, E], labels [B, s] int64, count) -> sum of token losses / count, scalar."""


class _TiledLoss(torch.autograd.Function):
    """Computes gradients in forward, while a tile's logits exist, and scales them in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        fn: TokenLoss,
        num_tiles: int,
        overwrite: bool,
        hidden: Tensor,
        labels: Tensor,
        count: Tensor,
        *parameters: nn.Parameter,
    ) -> Tensor:
        needs_hidden = ctx.needs_input_grad[3]
        needs_grad = any(ctx.needs_input_grad)
        sums = GradientSum(list(parameters))
        grad_hidden: Tensor | None = None
        if needs_hidden:
            grad_hidden = hidden.detach() if overwrite else torch.empty_like(hidden)
        loss: Tensor | None = None
        for start, stop in tile_bounds(hidden.shape[1], num_tiles):
            tile = hidden[:, start:stop].contiguous().detach().requires_grad_(needs_hidden)
            with torch.set_grad_enabled(needs_grad):
                tile_loss = fn(tile, labels[:, start:stop].contiguous(), count)
            if needs_grad:
                inputs = [tile, *parameters] if needs_hidden else list(parameters)
                with without_autocast(hidden.device):
                    gradients = torch.autograd.grad(tile_loss, inputs, allow_unused=True)
                if grad_hidden is not None:
                    grad_hidden[:, start:stop] = gradients[0]
                    gradients = gradients[1:]
                sums.add(gradients)
                del gradients
            tile_loss = tile_loss.detach()
            loss = tile_loss if loss is None else loss + tile_loss
        ctx.grad_hidden, ctx.sums = grad_hidden, sums
        assert loss is not None
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        if ctx.sums is None:
            raise RuntimeError("tiled loss: backward a second time; its gradients are used up")
        grad_hidden, sums = ctx.grad_hidden, ctx.sums
        ctx.grad_hidden = ctx.sums = None
        if grad_hidden is not None:
            grad_hidden.mul_(grad)
        return None, None, None, grad_hidden, None, None, *sums.take(grad)


def tiled_loss(
    fn: TokenLoss,
    hidden: Tensor,
    labels: Tensor,
    count: Tensor,
    num_tiles: int,
    *,
    overwrite: bool = False,
) -> Tensor:
    """`fn(hidden, labels, count)` in `num_tiles` tiles of the sequence, forward and backward.

    hidden [B, S, E], labels int64 [B, S], count a scalar; returns a scalar in `fn`'s dtype. `hidden` and
    every parameter that `fn` can reach get one gradient each, scaled by the incoming one. Parameter gradients
    are summed over tiles in fp32 (or wider). No gradient is computed if PyTorch's are off. With `overwrite`,
    the gradient of `hidden` overwrites `hidden`, so nothing else may need it any more. Local.
    """
    if not torch.is_grad_enabled():
        bounds = tile_bounds(hidden.shape[1], num_tiles)
        tiles = ((hidden[:, a:b].contiguous(), labels[:, a:b].contiguous()) for a, b in bounds)
        return torch.stack([fn(*tile, count) for tile in tiles]).sum()
    parameters = parameters_of(fn)
    return apply(_TiledLoss, fn, num_tiles, overwrite, hidden, labels, count, *parameters)
