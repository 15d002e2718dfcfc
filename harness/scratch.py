"""Bytes that CUDA kernels allocate and free inside one operator call, invisible to fake tensors.

A table operator -> bytes, read from the kernels' sources. Operators that are not listed work in
registers and shared memory, or in a few kilobytes.
Legend: B batch, H query heads, K kv heads, S queries, T keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from harness.calibration import backward_scratch, committed_path, read

FP32 = 4
"""Bytes of one fp32 element."""


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def flash2_backward(query: Tensor, key: Tensor) -> dict[str, int]:
    """FlashAttention-2 backward; query [B, H, S, D], key [B, K, T, D].

    Source: `mha_bwd` in Dao-AILab/flash-attention v2.7.4, csrc/flash_attn/flash_api.cpp: `dq_accum`
    fp32 [B, S', H, D'], `softmax_d` fp32 [B, H, S'], and where K < H `dk_expanded` and `dv_expanded`
    [B, T, H, D] in the dtype of the gradients. S' rounds up to 128, D' to 32.
    """
    batch, heads, seqlen, dim = query.shape
    rows = _round_up(seqlen, 128)
    tensors = {
        "softmax_d": batch * heads * rows * FP32,
        "dq_accum": batch * heads * rows * _round_up(dim, 32) * FP32,
    }
    if key.shape[1] != heads:
        expanded = batch * heads * key.shape[2] * dim * key.element_size()
        tensors |= {"dk_expanded": expanded, "dv_expanded": expanded}
    return tensors


def flash3_backward(query: Tensor, key: Tensor) -> dict[str, int]:
    """FlashAttention-3 backward; query [B, H, S, D], key [B, K, T, D].

    Source: `mha_bwd` in Dao-AILab/flash-attention, hopper/flash_api.cpp: `dq_accum` fp32
    [B, H, S' x D'], `softmax_d` and `softmax_lse_log2` fp32 [B, H, S'], and where K < H `dk_accum`
    and `dv_accum` fp32 [B, K, T' x D']. S' and T' round up to 128, D' to 32.
    """
    batch, heads, seqlen, dim = query.shape
    rows, columns, width = _round_up(seqlen, 128), _round_up(key.shape[2], 128), _round_up(dim, 32)
    statistics = batch * heads * rows * FP32
    tensors = {
        "softmax_d": statistics,
        "softmax_lse_log2": statistics,
        "dq_accum": batch * heads * rows * width * FP32,
    }
    if key.shape[1] != heads:
        accumulator = batch * key.shape[1] * columns * width * FP32
        tensors |= {"dk_accum": accumulator, "dv_accum": accumulator}
    return tensors


ATTENTION_BACKWARD: dict[str, Callable[[Tensor, Tensor], dict[str, int]]] = {
    "flash_attention_2": flash2_backward,
    "flash_attention_3": flash3_backward,
}
"""Kernel -> its scratch, tensor by tensor in the order of allocation; PyTorch's own is version 2."""


def calibrated(kernel: str, hardware: str) -> Callable[[Tensor, Tensor], dict[str, int]]:
    """Scratch of a kernel whose source is not in the table, as it was measured on `hardware`.

    Raises `ValueError` where it was not.
    """
    path = committed_path(hardware)
    if not path.is_file():
        raise ValueError(
            f"kernel '{kernel}' is not in the table of scratch ({', '.join(ATTENTION_BACKWARD)}), and there "
            f"is no {path}; run `alst calibrate` on '{hardware}', or use a kernel of the table"
        )
    found = read(path)

    def backward(query: Tensor, key: Tensor) -> dict[str, int]:
        batch, heads, tokens, dim = query.shape
        sizes = {"tokens": tokens, "heads": heads, "kv_heads": key.shape[1], "head_dim": dim}
        return {"measured": batch * backward_scratch(found, kernel, sizes)}

    return backward


def cuda_scratch(
    kernel: str, hardware: str = ""
) -> Callable[[Any, tuple[Any, ...], Mapping[str, Any]], dict[str, int]]:
    """The table, with core attention done by `kernel`, as `harness.tracker.Tracker` takes it."""
    backward = ATTENTION_BACKWARD.get(kernel) or calibrated(kernel, hardware)

    def scratch(operator: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, int]:
        if operator._name == "aten::_scaled_dot_product_flash_attention_backward":
            _, query, key, *_ = args
            return backward(query, key)
        return {}

    return scratch
