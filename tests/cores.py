"""Core attention over whole sequences, in one call."""

from __future__ import annotations

from torch import Tensor

from alst_impl.layout import Documents, Layout
from alst_impl.ops.attention.cores.base import load_core


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    window: int | None = None,
    documents: Documents | None = None,
    backend: str = "sdpa",
) -> Tensor:
    """query [B, H, S, D], key and value [B, K, S, D] -> [B, H, S, D], through the core `backend`."""
    layout = Layout(query.shape[2], documents=documents)
    return load_core(backend)(query, key, value, layout=layout, scale=scale, window=window)
