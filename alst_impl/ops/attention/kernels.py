"""Attention kernels from separate packages, by name. Imports no torch."""

from __future__ import annotations

MODULES = {
    "flash_attention_2": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
    "flash_attention_4": "flash_attn.cute",
}
"""Attention -> the module that provides it."""

SOURCES = {
    "flash_attention_2": "package flash-attn (pip install 'alst-bench[flash]')",
    "flash_attention_3": "FlashAttention-3, built from the folder hopper of flash-attention",
    "flash_attention_4": "package flash-attn-4",
}
"""Attention -> the package or build that contains its module."""


def missing(name: str) -> str:
    """Error message for attention `name` if its module cannot be imported."""
    return f"attention '{name}' needs {SOURCES[name]}, which is not installed; or use 'sdpa_flash'"
