"""Attention with a pattern in plain PyTorch: only over tiles that hold keys that a query sees, with an online softmax.

Forward keeps the output and its log-sum-exp, from which backward computes each tile again. Scores and sums are in fp32
(or wider), and no tensor but those of all queries or all keys is larger than a tile.
Legend: B batch, S tokens of a document, H query heads, K kv heads, D head dim, V head dim of values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alst_impl.ops.attention import flash
from alst_impl.ops.attention.patterns.base import Pattern
from alst_impl.ops.attention.variant import Variant
from alst_impl.ops.autograd import apply
from alst_impl.ops.memory.recompute import without_autocast

if TYPE_CHECKING:
    from alst_impl.ops.attention.patterns.base import Sees

ROWS = 64
"""Maximum number of queries of a tile, and of keys."""


def attend(query: Tensor, key: Tensor, value: Tensor, variant: Variant, pattern: Pattern) -> Tensor:
    """query [B, H, S, D], key [B, K, S, D], value [B, K, S, V] -> [B, H, S, V] in their dtype. One document. Local."""
    step, pattern = pattern.strided()
    tensors = query, key, value
    if step == 1:
        return apply(_Sparse, variant, pattern, *tensors, variant.sinks)
    starts = range(min(step, query.shape[2]))
    parts = [
        apply(_Sparse, variant, pattern, *(x[:, :, first::step] for x in tensors), variant.sinks)
        for first in starts
    ]
    places = torch.cat([torch.arange(first, query.shape[2], step) for first in starts])
    return torch.cat(parts, dim=2)[:, :, places.argsort().to(query.device)]


class _Sparse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        variant: Variant,
        pattern: Pattern,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
    ) -> Tensor:
        wide = torch.promote_types(query.dtype, torch.float32)
        out = query.new_empty(*query.shape[:3], value.shape[3])
        logsumexp = query.new_empty(query.shape[:3], dtype=wide)
        sees = pattern.sees(query.shape[2], query.device)
        with without_autocast(query.device):
            for queries, tiles in _rows(pattern, query.shape[2]):
                q = query[:, :, queries].to(wide)
                total, of_total = _forward(q, key, value, variant, sees, queries, tiles)
                if sinks is not None:
                    total, of_total = flash.add_sinks(total, of_total, sinks)
                out[:, :, queries], logsumexp[:, :, queries] = total, of_total
        ctx.variant, ctx.pattern = variant, pattern
        ctx.save_for_backward(query, key, value, sinks, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, out, logsumexp = ctx.saved_tensors
        wide = logsumexp.dtype
        of_query = torch.empty_like(query)
        of_key, of_value = (torch.zeros_like(x, dtype=wide) for x in (key, value))
        sees = ctx.pattern.sees(query.shape[2], query.device)
        with without_autocast(query.device):
            for queries, tiles in _rows(ctx.pattern, query.shape[2]):
                q, o, g = (x[:, :, queries].to(wide) for x in (query, out, grads[0]))
                found = torch.zeros_like(q)
                heads = key.shape[1], -1
                # [B, H, s, ...] -> [B, K, H/K, s, ...]
                g = g.unflatten(1, heads)
                delta = (g * o.unflatten(1, heads)).sum(-1, keepdim=True)
                for keys in tiles:
                    k, v = (x[:, :, None, keys].to(wide) for x in (key, value))
                    scores, slope = _scores(q, k, ctx.variant, sees, queries, keys)
                    weights = (
                        scores - logsumexp[:, :, queries].unflatten(1, heads)[..., None]
                    ).exp()
                    of_value[:, :, keys] += (weights.mT @ g).sum(2)
                    of_scores = weights * (g @ v.mT - delta) * ctx.variant.scale
                    if slope is not None:
                        of_scores = of_scores * slope
                    found += (of_scores @ k).flatten(1, 2)
                    of_key[:, :, keys] += (of_scores.mT @ q.unflatten(1, heads)).sum(2)
                of_query[:, :, queries] = found
        of_sinks = None if sinks is None else flash.sinks_gradient(grads[0], out, logsumexp, sinks)
        return None, None, of_query, of_key.to(key.dtype), of_value.to(value.dtype), of_sinks


def _rows(pattern: Pattern, seqlen: int) -> Iterator[tuple[slice, list[slice]]]:
    """Blocks of queries, each with the tiles of keys that any of its queries sees. The first tile holds their own."""
    for start in range(0, seqlen, ROWS):
        stop = min(start + ROWS, seqlen)
        tiles = []
        for first, end in reversed(pattern.runs(start, stop)):
            tiles += [slice(max(last - ROWS, first), last) for last in range(end, first, -ROWS)]
        yield slice(start, stop), tiles


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    variant: Variant,
    sees: Sees,
    queries: slice,
    tiles: list[slice],
) -> tuple[Tensor, Tensor]:
    """Output [B, H, s, V] and log-sum-exp [B, H, s] of `queries`, which are `query` [B, H, s, D], in its dtype."""
    out = total = query.new_zeros(())
    most = query.new_full((), float("-inf"))
    for keys in tiles:
        k, v = (x[:, :, None, keys].to(query.dtype) for x in (key, value))
        scores, _ = _scores(query, k, variant, sees, queries, keys)
        # Every query sees a key of the first tile, its own: the maximum is finite.
        highest = torch.maximum(most, scores.amax(-1, keepdim=True))
        weights, before = (scores - highest).exp(), (most - highest).exp()
        total = total * before + weights.sum(-1, keepdim=True)
        out = out * before + weights @ v
        most = highest
    logsumexp = (most + total.log()).squeeze(-1)
    return (out / total).flatten(1, 2), logsumexp.flatten(1, 2)


def _scores(
    query: Tensor, key: Tensor, variant: Variant, sees: Sees, queries: slice, keys: slice
) -> tuple[Tensor, Tensor | None]:
    """Scores [B, K, H/K, s, t] of query [B, H, s, D] and key [B, K, 1, t, D], and the slope of their soft-cap, if any.

    Those of keys that a query does not see are -inf.
    """
    scores = query.unflatten(1, (key.shape[1], -1)) @ key.mT * variant.scale
    slope = None
    if variant.softcap is not None:
        share = torch.tanh(scores / variant.softcap)
        scores, slope = share * variant.softcap, 1 - share**2
    rows, columns = (
        torch.arange(each.start, each.stop, device=query.device) for each in (queries, keys)
    )
    seen = sees(rows[:, None], columns) & (columns <= rows[:, None])
    return scores.masked_fill(~seen, float("-inf")), slope
