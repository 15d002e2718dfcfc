"""Attention of one sequence slice over its own keys and values and those of earlier slices.

Slices run one after another, as in pipelines (`alst_impl.ops.pipeline.schedule`). Keys and values of a slice
are kept for later slices. Gradients that later slices compute for them are added in the slice's own backward.
If a layer's forward runs again in backward, it reuses the kept keys and values.
Legend: B batch, S sequence, s tokens of the slice, T tokens up to its end, H query heads, K kv heads, D head
dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alst_impl.layout import Documents, Layout, Part, reached
from alst_impl.ops.attention.cores.base import Core
from alst_impl.ops.attention.flash import Rest, merge_, operators
from alst_impl.ops.attention.variant import Variant
from alst_impl.ops.autograd import apply


class _Range(NamedTuple):
    """Keys that a block of queries sees: all of them, or, if causal, those up to each query."""

    keys: slice
    causal: bool


class _Block(NamedTuple):
    """Queries of some samples, and one or two disjoint ranges of keys in sequence order."""

    samples: slice
    queries: slice
    ranges: list[_Range]


def _blocks(batch: int, start: int, stop: int, documents: Documents | None) -> list[_Block]:
    """Blocks that cover each visible (query, key) pair once, for queries in `start` to `stop`."""
    if documents is None:
        return [_block(slice(0, batch), start, start, stop, 0)]
    blocks = []
    for sample, lengths in enumerate(documents):
        first = 0
        for length in lengths:
            low, high = max(first, start), min(first + length, stop)
            if low < high:
                blocks.append(_block(slice(sample, sample + 1), start, low, high, first))
            first += length
    return blocks


def _block(samples: slice, start: int, low: int, high: int, first: int) -> _Block:
    """Queries `low` to `high` of a slice that starts at `start`; the keys they see begin at `first`."""
    own = _Range(slice(low, high), causal=True)
    earlier = [_Range(slice(first, low), causal=False)] if first < low else []
    return _Block(samples, slice(low - start, high - start), [*earlier, own])


def _merged(parts: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Output [B, H, s, D] in `dtype` and log-sum-exp [B, H, s] over disjoint keys, merged in fp32 or wider."""
    (out, logsumexp), *more = parts
    if more:
        out = out.to(logsumexp.dtype)
    for part in more:
        merge_(out, logsumexp, *part)
    return out.to(dtype), logsumexp


class _Sliced(torch.autograd.Function):
    """Saves keys and values slice by slice, so that no backward holds a concatenated copy of earlier slices."""

    @staticmethod
    def forward(
        ctx: Any, documents: Documents | None, scale: float, query: Tensor, *keys_values: Tensor
    ) -> Tensor:
        key, value = torch.cat(keys_values[::2], dim=2), torch.cat(keys_values[1::2], dim=2)
        stop, forward = key.shape[2], operators(query.device).forward
        ctx.blocks = _blocks(query.shape[0], stop - query.shape[2], stop, documents)
        ctx.scale, ctx.rests = scale, []
        found = []
        for samples, queries, ranges in ctx.blocks:
            parts = []
            for keys, causal in ranges:
                *part, rest = forward(
                    query[samples, :, queries],
                    key[samples, :, keys],
                    value[samples, :, keys],
                    None,
                    causal,
                    scale,
                )
                parts.append((part[0], part[1]))
                ctx.rests.append(rest)
            found.append(_merged(parts, query.dtype))
        out, logsumexp = _assembled(query, ctx.blocks, found)
        ctx.save_for_backward(query, out, logsumexp, *keys_values)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, out, logsumexp, *keys_values = ctx.saved_tensors
        key, value = torch.cat(keys_values[::2], dim=2), torch.cat(keys_values[1::2], dim=2)
        backward = operators(query.device).backward
        of_query = torch.zeros_like(query, dtype=logsumexp.dtype)  # fp32 or wider
        of_key, of_value = torch.zeros_like(key), torch.zeros_like(value)
        rests: list[Rest] = list(ctx.rests)
        for samples, queries, ranges in ctx.blocks:
            for keys, causal in ranges:
                # With the output and log-sum-exp over all keys, each range of keys gives its exact part of
                # the gradients.
                dq, dk, dv = backward(
                    grads[0][samples, :, queries],
                    query[samples, :, queries],
                    key[samples, :, keys],
                    value[samples, :, keys],
                    out[samples, :, queries],
                    logsumexp[samples, :, queries],
                    rests.pop(0),
                    None,
                    causal,
                    ctx.scale,
                )
                of_query[samples, :, queries] += dq
                of_key[samples, :, keys] = dk
                of_value[samples, :, keys] = dv
        lengths = [part.shape[2] for part in keys_values[::2]]
        pairs = zip(of_key.split(lengths, dim=2), of_value.split(lengths, dim=2), strict=True)
        return None, None, of_query.to(query.dtype), *(x for pair in pairs for x in pair)


def _assembled(
    query: Tensor, blocks: list[_Block], found: list[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of all queries, assembled from those of each block."""
    if len(blocks) == 1:
        return found[0]
    out, logsumexp = torch.empty_like(query), found[0][1].new_empty(query.shape[:3])
    for (samples, queries, _), (part, part_sum) in zip(blocks, found, strict=True):
        out[samples, :, queries], logsumexp[samples, :, queries] = part, part_sum
    return out, logsumexp


def sliced_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    earlier: Sequence[tuple[Tensor, Tensor]],
    *,
    scale: float,
    documents: Documents | None = None,
) -> Tensor:
    """Causal attention of a slice: query [B, H, s, D], key and value [B, K, s, D] -> [B, H, s, D].

    `earlier` holds keys and values of all earlier slices, in order; gradients reach them, too. `documents`
    are lengths over the whole sequence. Parts merge in fp32 (or wider). Local.
    """
    keys_values = [x for pair in [*earlier, (key, value)] for x in pair]
    return apply(_Sliced, documents, scale, query, *keys_values)


# -- keys and values of earlier slices ------------------------------------------------------------


class _Kept:
    """Keys and values of one slice in one layer, kept for later slices, which accumulate gradients in `.grad`."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.key, self.value = (x.detach().requires_grad_() for x in (key, value))


class _WithLater(torch.autograd.Function):
    """Identity whose backward adds the gradient from later slices, which have run backward by then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, later: Callable[[], Tensor | None]) -> Tensor:
        ctx.later = later
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        later = ctx.later()
        return grads[0] if later is None else grads[0] + later, None


class SliceAttention:
    """One layer's attention over the slice that `Layout.part` names.

    The backwards of a micro-batch run last slice first.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self._kept: dict[tuple[int, int], _Kept] = {}

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        layout: Layout | None,
        variant: Variant,
    ) -> Tensor:
        """query [B, H, s, D], key and value [B, K, s, D] -> [B, H, s, D]; whole sequences go to the core."""
        layout = reached(layout, query.shape[2], shards=1)
        at = layout.part
        if at is None:
            return self._core(query, key, value, layout=layout, variant=variant)
        kept = [self._kept[at.micro_batch, index] for index in range(at.index)]
        earlier = [(pair.key, pair.value) for pair in kept]
        _refuse(variant, sum(pair.key.shape[2] for pair in kept) + key.shape[2])
        if at.index < at.count - 1:
            key, value = self._shared(at, key, value)
        documents = layout.documents
        return sliced_attention(
            query, key, value, earlier, scale=variant.scale, documents=documents
        )

    def _shared(self, at: Part, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values whose gradients include those from later slices."""
        if not self.holds(at):  # it does when forward runs again
            self._kept[at.micro_batch, at.index] = _Kept(key, value)
        kept = self._kept[at.micro_batch, at.index]
        return (
            apply(_WithLater, key, lambda: kept.key.grad),
            apply(_WithLater, value, lambda: kept.value.grad),
        )

    def holds(self, at: Part) -> bool:
        """Whether the keys and values of the slice are kept."""
        return (at.micro_batch, at.index) in self._kept

    def forget(self, at: Part) -> None:
        """Drop the slice's keys and values, after its backward."""
        self._kept.pop((at.micro_batch, at.index), None)


def _refuse(variant: Variant, seen: int) -> None:
    variant = variant.over(seen)
    if variant.chunk is not None or variant.needs():
        raise ValueError(f"attention over slices does not support {variant.says()}; use slices: 1")
