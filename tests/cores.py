"""Core attention over whole sequences, in one call."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from alst_impl.layout import Documents, Layout
from alst_impl.ops.attention.cores.base import load_core
from alst_impl.ops.attention.variant import Variant


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    window: int | None = None,
    documents: Documents | None = None,
    backend: str = "sdpa",
    **more: Any,
) -> Tensor:
    """query [B, H, S, D], key and value [B, K, S, D] -> [B, H, S, D], through the core `backend`.

    `more` are further fields of `Variant`.
    """
    layout = Layout(query.shape[2], documents=documents)
    variant = Variant(scale, window, **more)
    return load_core(backend)(query, key, value, layout=layout, variant=variant)
