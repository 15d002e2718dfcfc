"""Attention of one chunk of a sequence after another, over pages of keys and values of the chunks before it.

A page holds the keys and values of one chunk in one layer. The chunks of a sample run forward in order, each of which
leaves its page, and then backward in reverse order: a chunk's queries find gradients for the keys and values of all
chunks before it, which add up in fp32 (or wider) beside the page until the chunk that owns it runs backward. This is
ring attention (`alst_impl.ops.attention.ring`) in which blocks come from memory instead of other ranks, so that
windows, documents, chunks and sinks are computed as there.

Source: SeCO (arXiv:2505.16710), whose order of chunks this is.
Legend: B batch, c tokens of a chunk, H query heads, K kv heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from alst_impl.layout import Layout, Part
from alst_impl.ops.attention.cores.base import Core
from alst_impl.ops.attention.meetings import Meeting, Sight
from alst_impl.ops.attention.ring import Sums, attend, zeros
from alst_impl.ops.attention.variant import Variant
from alst_impl.ops.memory.offload import Coming, HostOffload, Kept


@dataclass
class Pages:
    """Keys and values of one layer by chunk, and the gradients that later chunks found for them."""

    offload: HostOffload | None
    """Keeps both on the host; None leaves them on the device."""
    pairs: dict[int, Tensor | Kept] = field(default_factory=dict)
    """Keys and values [2, B, K, c, D]."""
    totals: dict[int, Tensor | Kept] = field(default_factory=dict)
    """Their gradients, in fp32 (or wider)."""
    leaving: bool = False
    """Whether the chunk that runs leaves its page. When it runs again, for backward, the page is there."""

    def put(self, held: dict[int, Tensor | Kept], chunk: int, x: Tensor) -> None:
        """Keep `x` for `chunk` in `held`, which is `pairs` or `totals`."""
        before = held.get(chunk)
        if self.offload is None:
            held[chunk] = x
        else:
            held[chunk] = self.offload.keep(x, before if isinstance(before, Kept) else None)

    def get(self, held: dict[int, Tensor | Kept], chunk: int) -> Coming:
        """Start to bring what `put` kept to the device."""
        found = held[chunk]
        if isinstance(found, Tensor):
            return Coming(found, None)
        assert self.offload is not None, "which put it there"
        return self.offload.fetch(found)

    def forget(self, chunk: int) -> None:
        """Drop the page of `chunk`."""
        self.pairs.pop(chunk, None)
        self.totals.pop(chunk, None)

    def clear(self) -> None:
        """Drop all pages, also those of a pass that an error ended."""
        self.leaving = False
        self.pairs.clear()
        self.totals.clear()


@dataclass(frozen=True)
class _Chunk:
    """Brings the pages of earlier chunks to the queries of one chunk, and takes their gradients (`Carrier`)."""

    at: Part
    sight: Sight
    pages: Pages

    @property
    def place(self) -> int:
        """Number of the chunk."""
        return self.at.index

    def meetings(self, source: int) -> list[Meeting]:
        """Calls for the queries of this chunk and the keys of chunk `source`."""
        return list(self.sight.meetings(self.place, source))

    def blocks(self, own: Tensor) -> Iterator[tuple[int, Tensor]]:
        """As `Carrier.blocks`, from the latest chunk to the earliest that a query sees. Local."""
        pages = self.pages
        if pages.leaving:
            if self.place in pages.pairs:
                raise ValueError(
                    "the model calls an attention module several times in a pass, and a chunk has one page in each "
                    "module; use method 'alst'"
                )
            pages.put(pages.pairs, self.place, own)
        chunk = self.sight.chunk
        earlier = range(self.place - 1, self.sight.first_seen(self.place * chunk) // chunk - 1, -1)
        source, held = self.place, own
        for following in earlier:
            coming = pages.get(pages.pairs, following)
            yield source, held
            source, held = following, coming.wait()
            del coming
        yield source, held

    def sums(self, own: Tensor) -> Sums:
        """Gradients that add up beside the pages."""
        return _Gradients(self, own)


class _Gradients:
    """Gradients of keys and values of this chunk and of those before it, as sums over the chunks that saw them."""

    def __init__(self, chunk: _Chunk, own: Tensor) -> None:
        self._chunk, self._like = chunk, own
        self._own: Tensor | None = None

    def so_far(self, source: int) -> Tensor:
        pages = self._chunk.pages
        return (
            pages.get(pages.totals, source).wait() if source in pages.totals else zeros(self._like)
        )

    def leave(self, source: int, total: Tensor | None) -> None:
        pages = self._chunk.pages
        if source == self._chunk.place:
            self._own = total
        elif total is not None:
            pages.put(pages.totals, source, total)

    def own(self) -> Tensor:
        assert self._own is not None, "every query sees its own key"
        self._chunk.pages.forget(self._chunk.place)
        return self._own


@dataclass(frozen=True)
class PagedAttention:
    """One layer's attention of the chunk that `Layout.part` names."""

    core: Core
    """Attends over samples that are computed in one pass."""
    pages: Pages

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *, layout: Layout, variant: Variant
    ) -> Tensor:
        """query [B, H, c, D], key and value [B, K, c, D] -> [B, H, c, D] in their dtype.

        Raises `ValueError` for soft-capped scores in several passes.
        """
        if layout.passes == 1:
            return self.core(query, key, value, layout=layout, variant=variant)
        if layout.part is None:
            raise ValueError(
                f"attention got all {layout.passes} chunks of a sample at once, but they run one after another; "
                "train with method 'chunked', or set chunk to the length of the sample"
            )
        variant, _ = self.core.narrowed(layout, variant)
        if variant.softcap is not None:
            raise ValueError(
                f"attention in {layout.passes} chunks does not support {variant.says(['softcap'])}: it merges what "
                "PyTorch's flash kernel returns, which has no soft-cap; use method 'alst'"
            )
        sight = Sight.of(layout, variant, query.shape[0])
        return attend(_Chunk(layout.part, sight, self.pages), query, key, value, variant)
