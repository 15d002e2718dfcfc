"""FlexAttention, compiled by PyTorch: every variant in one kernel, where `sdpa` uses tiles of plain PyTorch on a GPU."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, ClassVar

from alst_impl.ops.attention.cores.base import Core

if TYPE_CHECKING:
    from torch import Tensor

    from alst_impl.layout import Layout
    from alst_impl.ops.attention.variant import Variant

SMALLEST = 16
"""The smallest head dim of the kernel's matrix products."""


class Flex(Core):
    """GPU only. The first calls of a process take the time of a compiler."""

    compiled: ClassVar[bool] = True
    patterned: ClassVar[bool] = True

    def missing(self) -> str | None:
        if importlib.util.find_spec("triton") is not None:
            return None
        return "attention 'flex' needs package triton, which is not installed; or use 'sdpa'"

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *, layout: Layout, variant: Variant
    ) -> Tensor:
        from alst_impl.ops.attention import flex

        _check(query, value)
        batch, _, seqlen, _ = query.shape
        if self.pattern is not None:
            pattern, variant = self.limits(layout, variant)
            return flex.attend(query, key, value, variant, layout.documents, pattern)
        variant = variant.over(seqlen)
        documents = variant.documents(batch, seqlen, layout.documents)
        return flex.attend(query, key, value, variant, documents)


def _check(query: Tensor, value: Tensor) -> None:
    """Raise `ValueError` for tensors that the kernel does not compute."""
    import torch

    dim, dtype = min(query.shape[-1], value.shape[-1]), query.dtype
    if query.device.type != "cuda":
        raise ValueError(
            f"attention 'flex' has no backward on {query.device.type}; use attention 'sdpa'"
        )
    if dim < SMALLEST or dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"attention 'flex' does not support a head dim of {dim} in {str(dtype).removeprefix('torch.')}: it "
            f"needs {SMALLEST} or more, in bfloat16, float16 or float32; use attention 'sdpa'"
        )
