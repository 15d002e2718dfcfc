"""Attention that returns its log-sum-exp, and its backward, as direct calls of PyTorch's operators.

Saving the output and log-sum-exp is enough to run the backward later, without an autograd graph, also for
only some of the heads.
Legend: B batch, S sequence, H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alst_impl.layout import Documents
from alst_impl.ops.memory.tiling import accumulation_dtype

Rest = Sequence[Any]
"""Further values that a kernel's forward returns for its backward, the same for all calls of equal shapes.
They are lengths and a random state, which is unused without dropout."""
Grads = tuple[Tensor, Tensor, Tensor]
"""Gradients of query, key and value."""


class Operators(NamedTuple):
    """Forward and backward of one fused kernel; callers use `forward` and `backward`.

    `forward(query [B,H,S,D], key [B,K,T,D], value [B,K,T,D], mask [S,T] or None, causal, scale)` returns the
    output [B,H,S,D], its log-sum-exp [B,H,S] in fp32 (or wider), and the `Rest`. A mask must contain all that
    is hidden: `causal` is only for calls without a mask. With neither, queries see every key.
    """

    forward: Callable[
        [Tensor, Tensor, Tensor, Tensor | None, bool, float], tuple[Tensor, Tensor, Rest]
    ]
    gradients: Callable[..., Grads]
    """PyTorch's backward operator."""
    tail: Callable[[Rest, Tensor | None, bool], tuple[Sequence[Any], dict[str, Any]]]
    """(rest, mask, causal) -> its arguments after the log-sum-exp, but for `scale`."""

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        rest: Rest,
        mask: Tensor | None,
        causal: bool,
        scale: float,
    ) -> Grads:
        """Gradients of query, key and value, from what `forward` took and returned and the output's gradient."""
        more, named = self.tail(rest, mask, causal)
        return self.gradients(
            grad, query, key, value, out, logsumexp.contiguous(), *more, scale=scale, **named
        )


def _cpu_forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Rest]:
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, logsumexp = forward(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)
    return out, logsumexp, ()


def _cpu_tail(
    rest: Rest, mask: Tensor | None, causal: bool
) -> tuple[Sequence[Any], dict[str, Any]]:
    return (0.0, causal), {"attn_mask": mask}


def _cuda_forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Rest]:
    assert mask is None, "callers have no window on CUDA, where the kernel takes no mask"
    forward = torch.ops.aten._scaled_dot_product_flash_attention
    # out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, rng_state, unused, debug_attn_mask
    out, logsumexp, *rest, _ = forward(query, key, value, 0.0, causal, False, scale=scale)
    return out, logsumexp, rest


def _cuda_tail(
    rest: Rest, mask: Tensor | None, causal: bool
) -> tuple[Sequence[Any], dict[str, Any]]:
    assert mask is None, "forward has refused it"
    cum_seq_q, cum_seq_k, max_q, max_k, seed, offset = rest
    return (cum_seq_q, cum_seq_k, max_q, max_k, 0.0, causal, seed, offset), {}


CPU = Operators(
    _cpu_forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
    _cpu_tail,
)
CUDA = Operators(
    _cuda_forward, torch.ops.aten._scaled_dot_product_flash_attention_backward, _cuda_tail
)


def operators(device: torch.device) -> Operators:
    """The kernel for `device`."""
    return CUDA if device.type == "cuda" else CPU


class _Piece(NamedTuple):
    """Queries of some samples and the keys they see."""

    samples: slice
    queries: slice
    keys: slice
    masked: bool
    """Whether a window hides some of these keys, so that the piece needs a mask."""
    causal: bool
    """Whether queries and keys are the same positions, so that the causal mask applies."""


def _pieces(
    shape: Sequence[int], window: int | None, documents: Documents | None, block: int | None
) -> list[_Piece]:
    """Pieces that cover every visible (query, key) pair; with a window they cover O(S * window) pairs."""
    batch, _, seqlen, _ = shape
    if documents is None:
        return _of_document(slice(0, batch), 0, seqlen, window, block)
    pieces = []
    for sample, lengths in enumerate(documents):
        start = 0
        for length in lengths:
            samples = slice(sample, sample + 1)
            pieces += _of_document(samples, start, start + length, window, block)
            start += length
    return pieces


def _of_document(
    samples: slice, start: int, stop: int, window: int | None, block: int | None
) -> list[_Piece]:
    """Pieces of one document: `window` queries each if the window is shorter, else in blocks of `block` tokens."""
    if window is not None and window < stop - start:
        return [
            _Piece(
                samples,
                slice(first, min(first + window, stop)),
                slice(max(first - window + 1, start), min(first + window, stop)),
                masked=True,
                causal=False,
            )
            for first in range(start, stop, window)
        ]
    size = block or stop - start
    blocks = [slice(first, min(first + size, stop)) for first in range(start, stop, size)]
    return [
        _Piece(samples, queries, keys, masked=False, causal=keys is queries)
        for index, queries in enumerate(blocks)
        for keys in blocks[: index + 1]
    ]


def _mask(piece: _Piece, window: int | None, query: Tensor) -> Tensor | None:
    """Mask [queries, keys] in the query's dtype: 0 if visible, else minus infinity. None if none is needed."""
    if not piece.masked or window is None:
        return None
    rows = torch.arange(piece.queries.start, piece.queries.stop, device=query.device)
    columns = torch.arange(piece.keys.start, piece.keys.stop, device=query.device)
    distance = rows[:, None] - columns[None, :]
    hidden = (distance < 0) | (distance >= window)
    return query.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))


def merge_(out: Tensor, logsumexp: Tensor, block: Tensor, of_block: Tensor) -> None:
    """Merge attention over more keys into `out` [B, H, S, D] and `logsumexp` [B, H, S], in place.

    Both are in fp32 (or wider). `block` [B, H, S, D], in any dtype, and `of_block` [B, H, S] are the output
    and log-sum-exp over the added keys.
    """
    # Each weight is a sigmoid of its own: 1 minus the other weight would lose digits of the smaller one.
    kept, added = (logsumexp - of_block).sigmoid_(), (of_block - logsumexp).sigmoid_()
    out.mul_(kept[..., None]).addcmul_(block, added[..., None])
    torch.logaddexp(logsumexp, of_block, out=logsumexp)


def attend_with_logsumexp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    window: int | None = None,
    documents: Documents | None = None,
    block: int | None = None,
) -> tuple[Tensor, Tensor, list[Rest]]:
    """Causal attention as a core attention, with what `attend_backward` needs. No graph.

    query [B, H, S, D], key and value [B, K, S, D] with K dividing H, any strides with D contiguous. Returns
    the output [B, H, S, D] in their dtype, its log-sum-exp [B, H, S] in fp32 (or wider), and one `Rest` per
    piece. With `block`, it computes `block` queries against `block` keys at a time.
    """
    forward = operators(query.device).forward
    pieces = _pieces(query.shape, window, documents, block)
    if len(pieces) == 1:
        out, logsumexp, rest = forward(query, key, value, None, True, scale)
        return out, logsumexp, [rest]
    out = torch.empty_like(query)
    logsumexp = query.new_empty(query.shape[:3], dtype=accumulation_dtype(query))
    rests = []
    for (samples, queries), some in groupby(pieces, lambda piece: piece[:2]):
        of_queries: tuple[Tensor, Tensor] | None = None
        for piece in some:
            found, of_found, rest = forward(
                query[samples, :, queries],
                key[samples, :, piece.keys],
                value[samples, :, piece.keys],
                _mask(piece, window, query),
                piece.causal,
                scale,
            )
            if of_queries is None:
                of_queries = found.to(logsumexp.dtype) if block else found, of_found
            else:
                merge_(*of_queries, found, of_found)
            rests.append(rest)
        assert of_queries is not None, "queries come with keys"
        out[samples, :, queries], logsumexp[samples, :, queries] = of_queries
    return out, logsumexp, rests


def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    rests: Sequence[Rest],
    *,
    scale: float,
    window: int | None = None,
    documents: Documents | None = None,
    block: int | None = None,
) -> Grads:
    """Gradients of query [B, H, S, D], key and value [B, K, S, D], in their dtype; no graph.

    `grad` [B, H, S, D] is the output's gradient; `out`, `logsumexp` and `rests` are what forward returned for
    the same `block`. Sums over blocks are in fp32 (or wider).
    """
    backward = operators(query.device).backward
    pieces = _pieces(query.shape, window, documents, block)
    if len(pieces) == 1:
        return backward(grad, query, key, value, out, logsumexp, rests[0], None, True, scale)
    wide = accumulation_dtype(query) if block else query.dtype
    of_query = torch.zeros_like(query, dtype=wide)
    of_key, of_value = torch.zeros_like(key), torch.zeros_like(value)
    # Sorted by keys, so one block of keys is finished before the next one begins.
    in_order = sorted(
        zip(pieces, rests, strict=True),
        key=lambda pair: (pair[0].samples.start, pair[0].keys.start),
    )
    for (samples, keys), some in groupby(in_order, lambda pair: (pair[0].samples, pair[0].keys)):
        sums: list[Tensor] = []
        for piece, rest in some:
            queries = piece.queries
            found = backward(
                grad[samples, :, queries],
                query[samples, :, queries],
                key[samples, :, keys],
                value[samples, :, keys],
                out[samples, :, queries],
                logsumexp[samples, :, queries],
                rest,
                _mask(piece, window, query),
                piece.causal,
                scale,
            )
            of_query[samples, :, queries] += found[0]
            sums = [x.to(wide) for x in found[1:]] if not sums else _added(sums, found[1:])
        of_key[samples, :, keys] += sums[0]  # neighbouring windows see the same keys
        of_value[samples, :, keys] += sums[1]
    return of_query.to(query.dtype), of_key, of_value


def _added(sums: list[Tensor], more: Sequence[Tensor]) -> list[Tensor]:
    return [total.add_(addend) for total, addend in zip(sums, more, strict=True)]


def supports(query: Tensor, value: Tensor) -> bool:
    """Whether the kernel takes such tensors: equal head dims, and on CUDA a dtype of 16 bits."""
    dtypes = (torch.float16, torch.bfloat16)
    return query.shape[-1] == value.shape[-1] and (
        query.device.type != "cuda" or query.dtype in dtypes
    )


def add_sinks(out: Tensor, logsumexp: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """`out` [B, H, S, D] and `logsumexp` [B, H, S] with one more score per head, `sinks` [H], without a value.

    They are what `attend_backward` needs to be exact, because it forms the weights as exp(score - logsumexp).
    """
    total = torch.logaddexp(logsumexp, sinks.to(logsumexp.dtype)[:, None])
    return (out * (logsumexp - total).exp()[..., None]).to(out.dtype), total


def sinks_gradient(grad: Tensor, out: Tensor, logsumexp: Tensor, sinks: Tensor) -> Tensor:
    """Gradient of `sinks` [H], from the output's gradient [B, H, S, D] and what `add_sinks` returned."""
    weight = (sinks.to(logsumexp.dtype)[:, None] - logsumexp).exp()
    along = (grad * out).sum(dim=-1, dtype=logsumexp.dtype)
    return -(weight * along).sum(dim=(0, 2)).to(sinks.dtype)
