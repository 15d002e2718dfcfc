"""The one seam to core attention: causal, grouped-query, windowed or packed, never an S x S mask.

Legend: B batch, S sequence, H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Causal = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""(query [B,H,S,D], key [B,K,S,D], value [B,K,S,D], scale) -> [B,H,S,D], causal, same dtype."""


def _sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """PyTorch's fused kernels; which one runs is PyTorch's choice for the device and dtype."""
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )


BACKENDS: dict[str, Causal] = {"sdpa": _sdpa}
"""Core attention by the name that stands in a cell."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    window: int | None = None,
    documents: Sequence[Sequence[int]] | None = None,
    backend: str = "sdpa",
) -> Tensor:
    """Causal attention over whole sequences.

    query [B, H, S, D], key and value [B, K, S, D] with K dividing H; returns [B, H, S, D] in their
    dtype. `window` counts the keys a query sees, itself included. `documents` holds each sample's
    document lengths, adding up to S: no query sees a key of another document.
    """
    causal = BACKENDS[backend]
    if documents is not None:
        samples = []
        for index, lengths in enumerate(documents):
            sample = [x[index : index + 1].split(list(lengths), dim=2) for x in (query, key, value)]
            parts = [
                _windowed(causal, q, k, v, scale, window) for q, k, v in zip(*sample, strict=True)
            ]
            samples.append(torch.cat(parts, dim=2))
        return torch.cat(samples)
    return _windowed(causal, query, key, value, scale, window)


def _windowed(
    causal: Causal, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
) -> Tensor:
    """One document, block by block of queries if the window is shorter: O(S * window) memory."""
    seqlen = query.shape[2]
    if window is None or window >= seqlen:
        return causal(query, key, value, scale)
    blocks = []
    for start in range(0, seqlen, window):
        stop = min(start + window, seqlen)
        first = max(start - window + 1, 0)
        distance = (
            torch.arange(start, stop, device=query.device)[:, None]
            - torch.arange(first, stop, device=query.device)[None, :]
        )
        blocks.append(
            F.scaled_dot_product_attention(
                query[:, :, start:stop],
                key[:, :, first:stop],
                value[:, :, first:stop],
                attn_mask=(distance >= 0) & (distance < window),
                scale=scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )
    return torch.cat(blocks, dim=2)
