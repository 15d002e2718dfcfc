"""FlashAttention's forward and backward passes, called one by one.

B batch, S tokens of queries, H heads, K key-value heads, D size of a head.
"""

from typing import Any

import torch
from torch import Tensor

KERNELS = torch.ops.aten


def flash_attn_func(*_: object, **__: object) -> Tensor:
    """Is imported, and not called by the ring of attention."""
    raise NotImplementedError("only single passes over dense samples; use _flash_attn_forward")


_flash_attn_varlen_forward = _flash_attn_varlen_backward = flash_attn_func


def _flash_attn_forward(
    q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, causal: bool, **_: object
) -> tuple[Tensor, Tensor, None, None]:
    """[B, S, H, D] of attention and float32 [B, H, S] logarithms of its sums; `k` and `v` have K heads."""
    if q.is_cuda:
        out, sums, *_ = KERNELS._flash_attention_forward(
            *(q, k, v, None, None, q.shape[1], k.shape[1]),
            dropout_p=0.0,
            is_causal=causal,
            return_debug_mask=False,
            scale=softmax_scale,
        )
        return out, sums, None, None
    out, sums = KERNELS._scaled_dot_product_flash_attention_for_cpu(
        q.transpose(1, 2), *_repeated(q, k, v), is_causal=causal, scale=softmax_scale
    )
    return out.transpose(1, 2), sums, None, None


def _flash_attn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, *rest: Any
) -> None:
    """Write the gradients of `q`, `k` and `v` into the first three of `rest`: they, dropout, scale, causality, options."""
    *held, dropout, scale, causal = rest[:6]
    if q.is_cuda:
        state = torch.empty(2, dtype=torch.uint64, device=q.device)  # of dropout, not read without
        made = KERNELS._flash_attention_backward(
            *(grad, q, k, v, out, softmax_lse, None, None, q.shape[1], k.shape[1]),
            *(dropout, causal, state, state),
            scale=scale,
        )
    else:
        wide = KERNELS._scaled_dot_product_flash_attention_for_cpu_backward(
            *(grad.transpose(1, 2), q.transpose(1, 2), *_repeated(q, k, v)),
            *(out.transpose(1, 2), softmax_lse, dropout, causal),
            scale=scale,
        )
        made = [
            each.transpose(1, 2).unflatten(2, (like.shape[2], -1)).sum(3)
            for each, like in zip(wide, (q, k, v), strict=True)
        ]
    for buffer, gradient in zip(held, made, strict=True):
        buffer.copy_(gradient)


def _repeated(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """`k` and `v`, with as many heads as `q`, which come before tokens."""
    times = q.shape[2] // k.shape[2]
    return [each.transpose(1, 2).repeat_interleave(times, dim=1) for each in (k, v)]
