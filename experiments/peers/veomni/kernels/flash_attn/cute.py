"""The function of FlashAttention that is called for packed documents.

T tokens of all documents, H heads, K key-value heads, D size of a head.
"""

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """[T, H, D] of attention within each document, from `q` [T, H, D], `k` and `v` [T, K, D] and int32 document bounds."""
    if q.is_cuda:
        return varlen_attn(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            int(max_seqlen_q),
            int(max_seqlen_k),
            scale=softmax_scale,
            window_size=(-1, 0 if causal else -1),
            enable_gqa=q.shape[1] != k.shape[1],
        )
    sizes = cu_seqlens_q.diff().tolist()
    documents = zip(*(each.split(sizes) for each in (q, k, v)), strict=True)
    return torch.cat(
        [
            scaled_dot_product_attention(
                *(each.transpose(0, 1)[None] for each in document),
                is_causal=causal,
                scale=softmax_scale,
                enable_gqa=True,
            )[0].transpose(0, 1)
            for document in documents
        ]
    )


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None = None, causal: bool = False
) -> Tensor:
    """[1, T, H, D] of attention within one document."""
    tokens = q.shape[1]
    bounds = torch.tensor([0, tokens], dtype=torch.int32, device=q.device)
    out = flash_attn_varlen_func(
        q[0],
        k[0],
        v[0],
        cu_seqlens_q=bounds,
        cu_seqlens_k=bounds,
        max_seqlen_q=tokens,
        max_seqlen_k=tokens,
        softmax_scale=softmax_scale,
        causal=causal,
    )
    return out[None]
