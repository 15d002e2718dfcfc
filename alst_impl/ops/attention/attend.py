"""The single entry point to core attention: causal, grouped-query, windowed or packed, never an S x S mask."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from alst_impl.ops.attention.kernels import MODULES, missing

Causal = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""(query [B,H,S,D], key [B,K,S,D], value [B,K,S,D], scale) -> [B,H,S,D], causal, same dtype."""


def _sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """PyTorch's fused attention; PyTorch chooses the kernel for the device and dtype."""
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )


def _sdpa_by(kernel: SDPBackend) -> Causal:
    """PyTorch's attention with `kernel` only: inputs that it does not support are an error."""

    def causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        with sdpa_kernel(kernel):
            return _sdpa(query, key, value, scale)

    return causal


Varlen = Callable[[Tensor, Tensor, Tensor, Tensor, int, float], Tensor]
"""(query [T,H,D], key [T,K,D], value [T,K,D], int32 document offsets [N+1], longest document, scale) -> [T,H,D].
Causal within each document. T counts the tokens of all samples."""


def _module(name: str) -> Any:
    """Import `MODULES[name]`. Raises `ValueError` if it is missing: there is no fallback."""
    try:
        return importlib.import_module(MODULES[name])
    except ImportError as error:
        raise ValueError(f"{missing(name)} ({' '.join(str(error).split())})") from None


def _output(result: Any) -> Tensor:
    """The attention output; some versions return it together with its statistics."""
    out: Tensor = result[0] if isinstance(result, tuple) else result
    return out


def _flash_attn(name: str) -> Causal:
    """The dense function of a flash-attn package. Its layout is [B, S, H, D], and it supports grouped queries."""

    def causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        # [B, H, S, D] -> [B, S, H, D]: views; the kernel takes any strides as long as D is contiguous
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        attention = _module(name).flash_attn_func
        return _output(attention(query, key, value, softmax_scale=scale, causal=True)).transpose(
            1, 2
        )

    return causal


def _flash_attn_varlen(name: str) -> Varlen:
    def varlen(
        query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, longest: int, scale: float
    ) -> Tensor:
        attention = _module(name).flash_attn_varlen_func
        result = attention(
            query,
            key,
            value,
            cu_seqlens_q=offsets,
            cu_seqlens_k=offsets,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            softmax_scale=scale,
            causal=True,
        )
        return _output(result)

    return varlen


def _torch_varlen(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, longest: int, scale: float
) -> Tensor:
    """PyTorch's flash kernel over packed documents."""
    from torch.nn.attention.varlen import varlen_attn

    grouped: dict[str, Any] = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    causal = (-1, 0)  # every key before a query, none after it
    result = varlen_attn(
        query,
        key,
        value,
        offsets,
        offsets,
        longest,
        longest,
        scale=scale,
        window_size=causal,
        **grouped,
    )
    return _output(result)


BACKENDS: dict[str, Causal] = {
    "sdpa": _sdpa,
    "sdpa_flash": _sdpa_by(SDPBackend.FLASH_ATTENTION),
    "sdpa_cudnn": _sdpa_by(SDPBackend.CUDNN_ATTENTION),
    **{name: _flash_attn(name) for name in MODULES},
}
"""Core attention functions by the name in `TrainConfig.attention`."""

VARLEN: Mapping[str, Varlen] = {
    "sdpa_flash": _torch_varlen,
    **{name: _flash_attn_varlen(name) for name in MODULES},
}
"""Backends that take packed documents in one call; the others compute one document after another."""


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

    query [B, H, S, D], key and value [B, K, S, D] with K dividing H; returns [B, H, S, D] in their dtype.
    `window` is the number of keys that a query sees, itself included. `documents` holds each sample's
    document lengths, which add up to S: no query sees a key of another document. Raises `ValueError` if
    `backend` is not installed or does not support the window.
    """
    causal = BACKENDS[backend]
    if backend != "sdpa" and window is not None and window < query.shape[2]:
        raise ValueError(
            f"attention '{backend}' is not called with a window, and {window} keys are fewer than the "
            f"{query.shape[2]} tokens; use attention 'sdpa'"
        )
    if documents is not None and window is None and backend in VARLEN:
        return _packed(VARLEN[backend], query, key, value, scale, documents)
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


def _packed(
    varlen: Varlen,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    documents: Sequence[Sequence[int]],
) -> Tensor:
    """All documents of all samples in one call."""
    batch, _, seqlen, _ = query.shape
    lengths = [length for sample in documents for length in sample]
    offsets = torch.tensor([0, *lengths], device=query.device).cumsum(0).to(torch.int32)
    # [B, H, S, D] -> [B * S, H, D]
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
    out = varlen(flat[0], flat[1], flat[2], offsets, max(lengths), scale)
    # [B * S, H, D] -> [B, H, S, D]
    whole: Tensor = out.unflatten(0, (batch, seqlen))
    return whole.transpose(1, 2)


def _windowed(
    causal: Causal, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
) -> Tensor:
    """Attention within one document; with a shorter window, block by block of queries, in O(S * window) memory."""
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
