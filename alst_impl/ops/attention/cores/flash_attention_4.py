"""FlashAttention-4, of package flash-attn-4."""

from __future__ import annotations

from typing import ClassVar

from alst_impl.ops.attention.cores.base import FlashAttention


class FlashAttention4(FlashAttention):
    """GPU only."""

    module: ClassVar[str] = "flash_attn.cute"
    in_pytorch: ClassVar[str | None] = "FA4"
    source: ClassVar[str] = "package flash-attn-4"
