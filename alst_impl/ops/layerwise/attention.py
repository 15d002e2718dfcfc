"""Attention of some heads without a graph, and its backward: PyTorch's flash kernel, or tiles for what it does not know.

Legend: B batch, S sequence, h query and k kv heads of a group on one rank, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alst_impl.layout import Documents
from alst_impl.ops.attention import flash, tiles
from alst_impl.ops.attention.cores.base import each_document
from alst_impl.ops.attention.flash import Grads, Rest
from alst_impl.ops.attention.variant import Variant
from alst_impl.ops.memory.tiling import accumulation_dtype


@dataclass(frozen=True)
class HeadAttention:
    """Attention of some heads of whole sequences."""

    variant: Variant
    """Its sinks, if any, are those of the heads, [h]."""
    documents: Documents | None
    """Parts of each sample that do not see each other."""
    block: int | None
    """The kernel computes so many queries against so many keys at a time; None for all at once."""

    @classmethod
    def of(
        cls,
        variant: Variant,
        batch: int,
        seqlen: int,
        documents: Documents | None,
        blocks: int | None,
    ) -> HeadAttention:
        """Attention over `batch` samples of `seqlen` tokens with the given documents, in `blocks` blocks."""
        parts = variant.over(seqlen).documents(batch, seqlen, documents)
        longest = seqlen if parts is None else max(max(lengths) for lengths in parts)
        block = None if blocks is None else -(-seqlen // blocks)
        return cls(replace(variant, chunk=None).over(longest), parts, block)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, list[Rest]]:
        """query [B, h, S, D], key and value [B, k, S, D] -> output [B, h, S, D], and what `backward` needs."""
        if not self._by_kernel(query, value):
            unused = query.new_zeros(query.shape[:3], dtype=accumulation_dtype(query))
            return self._in_tiles(query, key, value, self.variant), unused, []
        out, logsumexp, rests = flash.attend_with_logsumexp(
            query,
            key,
            value,
            scale=self.variant.scale,
            window=self.variant.window,
            documents=self.documents,
            block=self.block,
        )
        if self.variant.sinks is not None:
            out, logsumexp = flash.add_sinks(out, logsumexp, self.variant.sinks)
        return out, logsumexp, rests

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        rests: list[Rest],
    ) -> tuple[Grads, Tensor | None]:
        """Gradients of query, key and value, and of the sinks [h] if there are any.

        Takes the output's gradient, and what `forward` took and returned.
        """
        sinks, of_sinks = self.variant.sinks, None
        if not self._by_kernel(query, value):
            return self._through_tiles(grad, query, key, value)
        if sinks is not None:
            of_sinks = flash.sinks_gradient(grad, out, logsumexp, sinks)
        grads = flash.attend_backward(
            grad,
            query,
            key,
            value,
            out,
            logsumexp,
            rests,
            scale=self.variant.scale,
            window=self.variant.window,
            documents=self.documents,
            block=self.block,
        )
        return grads, of_sinks

    def _by_kernel(self, query: Tensor, value: Tensor) -> bool:
        windowed = self.variant.window is not None and query.device.type == "cuda"
        return self.variant.softcap is None and not windowed and flash.supports(query, value)

    def _in_tiles(self, query: Tensor, key: Tensor, value: Tensor, variant: Variant) -> Tensor:
        if self.documents is None:
            return tiles.attend(query, key, value, variant)
        return each_document(tiles.attend, query, key, value, variant, self.documents)

    def _through_tiles(
        self, grad: Tensor, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Grads, Tensor | None]:
        query, key, value = (x.detach().requires_grad_() for x in (query, key, value))
        sinks = self.variant.sinks
        given = [] if sinks is None else [sinks.detach().requires_grad_()]
        variant = replace(self.variant, sinks=given[0] if given else None)
        with torch.enable_grad():
            out = self._in_tiles(query, key, value, variant)
        of_query, of_key, of_value, *of_sinks = torch.autograd.grad(
            out, [query, key, value, *given], grad
        )
        return (of_query, of_key, of_value), of_sinks[0] if of_sinks else None
