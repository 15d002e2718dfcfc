"""Stock Hugging Face training: what ALST is measured against."""

from __future__ import annotations

from alst_impl.methods.base import Method


class Baseline(Method):
    """Data parallel, one whole sequence per rank, the model's own loss over all logits."""
