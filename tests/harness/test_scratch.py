"""Kernel scratch is what the kernels' sources allocate."""

from __future__ import annotations

import torch

from harness.scratch import flash2_backward, flash3_backward


def heads(count: int, seqlen: int) -> torch.Tensor:
    """[1, count, seqlen, 128] in bf16, without data."""
    return torch.empty(1, count, seqlen, 128, dtype=torch.bfloat16, device="meta")


def test_flash2_expands_kv_gradients_only_for_grouped_queries() -> None:
    """fp32 dQ and row sums always, dK and dV per query head only where kv heads are shared."""
    dq, sums, expanded = 4 * 1024 * 128 * 4, 4 * 1024 * 4, 2 * 4 * 1000 * 128 * 2
    assert sum(flash2_backward(heads(4, 1000), heads(4, 1000)).values()) == dq + sums
    grouped = flash2_backward(heads(4, 1000), heads(1, 1000))
    assert sum(grouped.values()) == dq + sums + expanded
    assert grouped["dk_expanded"] == grouped["dv_expanded"] == expanded / 2


def test_flash3_accumulates_kv_gradients_per_kv_head() -> None:
    """fp32 accumulators of the kv heads' own size."""
    dq, sums, accumulators = 4 * 1024 * 128 * 4, 2 * 4 * 1024 * 4, 2 * 1 * 1024 * 128 * 4
    grouped = flash3_backward(heads(4, 1000), heads(1, 1000))
    assert sum(grouped.values()) == dq + sums + accumulators
