"""All-gather of a sequence's shards, in the order of its tokens.

Legend: S sequence, s = S/P, P ranks that share it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from alst_impl.layout import Layout
from alst_impl.ops.autograd import apply


class _Gather(torch.autograd.Function):
    """[s, ...] of each rank -> [P, s, ...]; backward sums the gradients of all ranks for this rank's tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        parts = x.new_empty(group.size(), *x.shape)
        dist.all_gather(list(parts.unbind()), x, group=group)
        return parts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        send = grads[0].contiguous()
        received = torch.empty_like(send)
        dist.all_to_all_single(received, send, group=ctx.group)
        wide = torch.promote_types(send.dtype, torch.float32)
        return received.sum(dim=0, dtype=wide).to(send.dtype), None


def gather(x: Tensor, layout: Layout, dim: int) -> Tensor:
    """The whole sequence along `dim`, padding included, from this rank's tokens `x`. Differentiable. Collective.

    Gradients of all ranks are summed, in fp32 (or wider).
    """
    parts = x.movedim(dim, 0).contiguous()
    for axis in ("sp", "cp"):
        group = layout.group(axis)
        if group is not None:
            parts = apply(_Gather, parts, group).flatten(0, 1)
    positions = torch.cat([layout.positions(shard) for shard in range(layout.shards)])
    order = positions.argsort()
    if not torch.equal(order, torch.arange(len(order))):
        parts = parts[order.to(parts.device)]
    return parts.movedim(0, dim)
