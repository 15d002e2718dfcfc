"""Causal attention by PyTorch's flash kernel, whose backward works on some heads at a time.

The kernel's backward has scratch for each query head: its gradient in fp32, and gradients of the key and value heads
before they are summed over the query heads that share them. For all heads of a layer that is up to four times the
queries. Long sequences fill a GPU with few heads, so only those few need scratch.
Legend: B batch, S sequence, H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from alst_impl.ops.attention import flash
from alst_impl.ops.attention.flash import Grads, Rest
from alst_impl.ops.attention.variant import Variant
from alst_impl.ops.autograd import apply, as_it_stands
from alst_impl.ops.memory.tiling import accumulation_dtype

TOKENS = 2**18
"""Minimum number of tokens of a call of the kernel's backward, each counted once for every head: 2,048 blocks of 128."""
ALIGNED = 8
"""The CUDA kernel takes head dims that are multiples of it."""


def in_parts(query: Tensor, key: Tensor, value: Tensor, scale: float) -> bool:
    """Whether backward of such a call has several parts: a long one, which PyTorch would give to its flash kernel."""
    batch, heads, seqlen, dim = query.shape
    if batch * seqlen * heads <= TOKENS or not torch.is_grad_enabled():
        return False
    if not flash.supports(query, value) or (query.device.type == "cuda" and dim % ALIGNED):
        return False
    return _chosen(query, key, value, scale) == SDPBackend.FLASH_ATTENTION


@as_it_stands
def _chosen(query: Tensor, key: Tensor, value: Tensor, scale: float) -> SDPBackend:
    """The kernel that PyTorch would choose."""
    chosen: int = torch.ops.aten._fused_sdp_choice(
        query, key, value, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    return SDPBackend(chosen)


@as_it_stands
def attend(query: Tensor, key: Tensor, value: Tensor, variant: Variant) -> Tensor:
    """query [B, H, S, D], key and value [B, K, S, D] -> [B, H, S, D], causal, with the scale and sinks of `variant`."""
    return apply(_Fused, variant.scale, query, key, value, variant.sinks)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, scale: float, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None
    ) -> Tensor:
        out, logsumexp, ctx.rests = flash.attend_with_logsumexp(query, key, value, scale=scale)
        if sinks is not None:
            out, logsumexp = flash.add_sinks(out, logsumexp, sinks)
        ctx.scale = scale
        ctx.save_for_backward(query, key, value, out, logsumexp, sinks)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, logsumexp, sinks = ctx.saved_tensors
        (grad,) = grads
        found = gradients(grad, query, key, value, out, logsumexp, ctx.rests, scale=ctx.scale)
        of_sinks = None if sinks is None else flash.sinks_gradient(grad, out, logsumexp, sinks)
        return None, *found, of_sinks


def gradients(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    rests: list[Rest],
    *,
    scale: float,
) -> Grads:
    """As `flash.attend_backward` of whole samples, some heads at a time; sums over query heads are in fp32 (or wider)."""
    if len(divided := list(_parts(query, key))) == len(divided[0][1]) == 1:
        return flash.attend_backward(
            grad, query, key, value, out, logsumexp, rests, scale=scale
        )  # nothing to put together, so no gradient is held twice
    wide = accumulation_dtype(query)
    of_query = torch.empty_like(query)
    of_pair: tuple[Tensor, Tensor] | None = None
    for kv_heads, parts in divided:
        sums: list[Tensor] = []
        for heads in parts:
            of_heads, *found = flash.attend_backward(
                grad[:, heads],
                query[:, heads],
                key[:, kv_heads],
                value[:, kv_heads],
                out[:, heads],
                logsumexp[:, heads],
                rests,
                scale=scale,
            )
            of_query[:, heads] = of_heads
            if sums:
                sums = [total.add_(addend) for total, addend in zip(sums, found, strict=True)]
            else:
                sums = found if len(parts) == 1 else [x.to(wide) for x in found]
            del of_heads, found  # before the next part's are made
        if of_pair is None:
            of_pair = torch.empty_like(key), torch.empty_like(value)
        of_pair[0][:, kv_heads], of_pair[1][:, kv_heads] = sums
    assert of_pair is not None, "there are kv heads"
    return of_query, *of_pair


def _parts(query: Tensor, key: Tensor) -> Iterator[tuple[slice, list[slice]]]:
    """kv heads, and the query heads that attend to them, in parts of at least `TOKENS` tokens where there are so many.

    A part has whole kv heads, or some of the query heads of one.
    """
    batch, heads, seqlen, _ = query.shape
    shared = heads // key.shape[1]
    at_once = -(-TOKENS // (batch * seqlen))
    if at_once < shared:
        for kv_head in range(key.shape[1]):
            first, stop = kv_head * shared, (kv_head + 1) * shared
            bounds = range(first, stop, at_once)
            yield (
                slice(kv_head, kv_head + 1),
                [slice(start, min(start + at_once, stop)) for start in bounds],
            )
        return
    step = -(-at_once // shared)
    for kv_head in range(0, key.shape[1], step):
        last = min(kv_head + step, key.shape[1])
        yield slice(kv_head, last), [slice(kv_head * shared, last * shared)]
