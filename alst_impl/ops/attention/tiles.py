"""Attention in plain PyTorch, one block of queries at a time, for what fused kernels do not compute.

It supports windows, soft-caps and sinks on every device and in every dtype. Backward computes each block again,
so only query, key and value are saved. Scores and sums are in fp32 (or wider).
Legend: B batch, S sequence, H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from alst_impl.ops.attention.variant import Variant
from alst_impl.ops.autograd import apply
from alst_impl.ops.memory.recompute import without_autocast

ROWS = 512
"""Maximum number of queries of a block."""


def attend(query: Tensor, key: Tensor, value: Tensor, variant: Variant) -> Tensor:
    """query [B, H, S, D], key and value [B, K, S, D] -> [B, H, S, D] in their dtype, causal. Local.

    Takes memory for the scores of `ROWS` queries, and O(S * window) or O(S * S) time.
    """
    plain = replace(variant, sinks=None)
    return apply(_Tiles, plain, query, key, value, variant.sinks)


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, variant: Variant, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None
    ) -> Tensor:
        ctx.variant = variant
        ctx.save_for_backward(query, key, value, sinks)
        out = query.new_empty(*query.shape[:3], value.shape[-1])
        with without_autocast(query.device):
            for queries, keys in _blocks(query.shape[2], variant.window):
                q, k, v = query[:, :, queries], key[:, :, keys], value[:, :, keys]
                out[:, :, queries] = _block(q, k, v, sinks, variant, queries.start - keys.start)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks = ctx.saved_tensors
        wide = torch.promote_types(query.dtype, torch.float32)
        of_query = torch.empty_like(query)
        of_key, of_value = (torch.zeros_like(x, dtype=wide) for x in (key, value))
        of_sinks = None if sinks is None else torch.zeros_like(sinks, dtype=wide)
        for queries, keys in _blocks(query.shape[2], ctx.variant.window):
            parts = query[:, :, queries], key[:, :, keys], value[:, :, keys]
            q, k, v = (x.detach().requires_grad_() for x in parts)
            s = None if sinks is None else sinks.detach().requires_grad_()
            with torch.enable_grad(), without_autocast(query.device):
                out = _block(q, k, v, s, ctx.variant, queries.start - keys.start)
            inputs = [q, k, v] if s is None else [q, k, v, s]
            found = torch.autograd.grad(out, inputs, grads[0][:, :, queries])
            of_query[:, :, queries] = found[0]
            of_key[:, :, keys] += found[1]
            of_value[:, :, keys] += found[2]
            if of_sinks is not None:
                of_sinks += found[3]
        rounded = None if sinks is None or of_sinks is None else of_sinks.to(sinks.dtype)
        return None, of_query, of_key.to(key.dtype), of_value.to(value.dtype), rounded


def _blocks(seqlen: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Blocks of queries, each with the keys that any of its queries sees."""
    for start in range(0, seqlen, ROWS):
        stop = min(start + ROWS, seqlen)
        first = 0 if window is None else max(start - window + 1, 0)
        yield slice(start, stop), slice(first, stop)


def _block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    variant: Variant,
    ahead: int,
) -> Tensor:
    """Attention of queries [B, H, s, D] to keys and values [B, K, t, D], of which the first query is key `ahead`."""
    wide = torch.promote_types(query.dtype, torch.float32)
    copies = query.shape[1] // key.shape[1]
    key, value = (x.to(wide).repeat_interleave(copies, dim=1) for x in (key, value))
    scores = query.to(wide) @ key.transpose(2, 3) * variant.scale
    if variant.softcap is not None:
        scores = torch.tanh(scores / variant.softcap) * variant.softcap
    distance = (
        torch.arange(ahead, ahead + query.shape[2], device=query.device)[:, None]
        - torch.arange(key.shape[2], device=query.device)[None, :]
    )
    hidden = distance < 0
    if variant.window is not None:
        hidden = hidden | (distance >= variant.window)
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        column = sinks.to(wide).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=3)
    weights = scores.softmax(dim=3)[..., : key.shape[2]]
    return (weights @ value).to(query.dtype)
