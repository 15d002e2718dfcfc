"""FlashAttention-3 (arXiv:2407.08608), built from the sources of flash-attention."""

from __future__ import annotations

from typing import ClassVar

from alst_impl.ops.attention.cores.base import FlashAttention


class FlashAttention3(FlashAttention):
    """GPU only."""

    module: ClassVar[str] = "flash_attn_interface"
    in_pytorch: ClassVar[str | None] = "FA3"
    source: ClassVar[str] = "FlashAttention-3, built from the folder hopper of flash-attention"
