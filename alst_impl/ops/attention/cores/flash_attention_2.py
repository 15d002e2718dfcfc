"""FlashAttention-2 (arXiv:2307.08691), of package flash-attn."""

from __future__ import annotations

from typing import ClassVar

from alst_impl.ops.attention.cores.base import FlashAttention


class FlashAttention2(FlashAttention):
    """GPU only."""

    module: ClassVar[str] = "flash_attn"
    source: ClassVar[str] = "package flash-attn (pip install 'alst-bench[flash]')"
