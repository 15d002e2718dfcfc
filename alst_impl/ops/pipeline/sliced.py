"""Attention of one sequence slice over its own keys and values and those of earlier slices.

Slices run one after another, as in pipelines (`alst_impl.ops.pipeline.schedule`). Keys and values of a slice
are kept for later slices. Gradients that later slices compute for them are added in the slice's own backward.
If a layer's forward runs again in backward, it reuses the kept keys and values.
Legend: B batch, S sequence, s tokens of the slice, T tokens up to its end, H query heads, K kv heads, D head
dim.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alst_impl.ops.attention.attend import attend
from alst_impl.ops.attention.flash import Documents, Rest, merge_, operators


class _Range(NamedTuple):
    """Keys that a block of queries sees: all of them, or, if causal, those up to each query."""

    keys: slice
    causal: bool


class _Block(NamedTuple):
    """Queries of some samples, and one or two disjoint ranges of keys in sequence order."""

    samples: slice
    queries: slice
    ranges: list[_Range]


def _blocks(batch: int, start: int, stop: int, documents: Documents) -> list[_Block]:
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
        ctx: Any, documents: Documents, scale: float, query: Tensor, *keys_values: Tensor
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
    documents: Documents = None,
) -> Tensor:
    """Causal attention of a slice: query [B, H, s, D], key and value [B, K, s, D] -> [B, H, s, D].

    `earlier` holds keys and values of all earlier slices, in order; gradients reach them, too. `documents`
    are lengths over the whole sequence. Parts merge in fp32 (or wider). Local.
    """
    keys_values = [x for pair in [*earlier, (key, value)] for x in pair]
    return _Sliced.apply(documents, scale, query, *keys_values)  # type: ignore[no-any-return, no-untyped-call]


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


@dataclass
class Current:
    """The current slice, out of `parts`; the pipeline sets it before each forward and backward."""

    parts: int
    micro_batch: int = 0
    part: int = 0

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Context in which sequences are not sliced, and no keys and values are kept."""
        parts, self.parts = self.parts, 1
        try:
            yield
        finally:
            self.parts = parts


class SliceAttention:
    """One layer's attention over the current slice of the current micro-batch.

    The backwards of a micro-batch run last slice first.
    """

    def __init__(self, current: Current, backend: str) -> None:
        self._current, self._backend = current, backend
        self._kept: dict[tuple[int, int], _Kept] = {}

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        documents: tuple[tuple[int, ...], ...] | None,
    ) -> Tensor:
        """query [B, H, s, D], key and value [B, K, s, D] -> [B, H, s, D]; the rest as in `attend`."""
        at = self._current
        if at.parts == 1:
            return attend(
                query,
                key,
                value,
                scale=scale,
                window=window,
                documents=documents,
                backend=self._backend,
            )
        kept = [self._kept[at.micro_batch, part] for part in range(at.part)]
        earlier = [(pair.key, pair.value) for pair in kept]
        _refuse_window(window, sum(pair.key.shape[2] for pair in kept) + key.shape[2])
        if at.part < at.parts - 1:
            key, value = self._shared(key, value)
        return sliced_attention(query, key, value, earlier, scale=scale, documents=documents)

    def _shared(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values whose gradients include those from later slices."""
        place = self._current.micro_batch, self._current.part
        if place not in self._kept:  # it is when forward runs again
            self._kept[place] = _Kept(key, value)
        kept = self._kept[place]
        return (
            _WithLater.apply(key, lambda: kept.key.grad),  # type: ignore[no-untyped-call]
            _WithLater.apply(value, lambda: kept.value.grad),  # type: ignore[no-untyped-call]
        )

    def forget(self) -> None:
        """Drop the current slice's keys and values, after its backward."""
        self._kept.pop((self._current.micro_batch, self._current.part), None)


def _refuse_window(window: int | None, seen: int) -> None:
    if window is not None and window < seen:
        raise ValueError(
            f"a sliding window ({window}) shorter than the sequence is not supported by attention over "
            "slices; use slices: 1"
        )
