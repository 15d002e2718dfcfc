"""Which queries of one rank of a ring see which keys of another, as a few calls of a kernel without a mask.

A kernel without a mask computes two shapes: every query sees every key, or query i sees keys 0 to i. A window
needs a third, in which query i sees the keys from i on. It is the second one, with queries and keys in reversed
order.
Legend: S tokens of a sample, padding included, P ranks of the ring, s = S/P.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

from torch import Tensor

from alst_impl.layout import Layout
from alst_impl.ops.attention.variant import Variant

ROWS = 8192
"""Queries of a window's blocks that one call takes, unless the window is longer: it bounds reversed copies."""
Shape = tuple[int, int, int]
Borders = Sequence[int]
"""Starts of the documents of a sample, and the end of the last one."""


class Meeting(NamedTuple):
    """Some of one rank's s queries and some of another rank's s keys, which one call of a kernel takes."""

    queries: slice
    keys: slice
    causal: bool
    """Whether query i sees only keys 0 to i, of equally many; else every query sees every key."""
    backwards: bool = False
    """Whether queries and keys count from their ends, so that query i sees the keys from i on."""
    blocks: int = 1
    """Into how many blocks of equal length both are cut. Queries of a block see keys of the same block only."""
    samples: slice = slice(None)

    @property
    def shape(self) -> Shape:
        """Numbers of queries, keys and blocks."""
        numbers = (each.stop - each.start for each in (self.queries, self.keys))
        return (*numbers, self.blocks)

    def of_queries(self, x: Tensor) -> Tensor:
        """What the call takes of `x` [B, H, s, ...], which belongs to queries: [B * blocks, H, n, ...]."""
        return self._arranged(x[self.samples, :, self.queries])

    def of_keys(self, x: Tensor) -> Tensor:
        """What the call takes of `x` [B, K, s, ...], which belongs to keys: [B * blocks, K, n, ...]."""
        return self._arranged(x[self.samples, :, self.keys])

    def _arranged(self, x: Tensor) -> Tensor:
        if self.blocks > 1:
            x = x.unflatten(2, (self.blocks, -1)).transpose(1, 2).flatten(0, 1)
        return x.flip(2) if self.backwards else x

    def restored(self, x: Tensor) -> Tensor:
        """[B * blocks, H, n, ...], which the call returned, as [B, H, blocks * n, ...] in the order of tokens."""
        if self.backwards:
            x = x.flip(2)
        return (
            x
            if self.blocks == 1
            else x.unflatten(0, (-1, self.blocks)).transpose(1, 2).flatten(2, 3)
        )

    def moved(self, queries: int, keys: int, samples: slice) -> Meeting:
        """The same of `samples`, with places of queries and keys moved by so many tokens."""
        of_queries = slice(self.queries.start + queries, self.queries.stop + queries)
        of_keys = slice(self.keys.start + keys, self.keys.stop + keys)
        return self._replace(queries=of_queries, keys=of_keys, samples=samples)


def meeting(rank: int, source: int, local: int, *, zigzag: bool) -> Meeting | None:
    """The queries of `rank` that see keys of `source`, if they see all before them; None if there are none."""
    whole, half = slice(0, local), local // 2
    if source == rank:
        return Meeting(whole, whole, causal=True)
    if source < rank:
        return Meeting(whole, slice(0, half) if zigzag else whole, causal=False)
    return Meeting(slice(half, local), whole, causal=False) if zigzag else None


@dataclass(frozen=True)
class Sight:
    """Which keys the queries of each rank of a ring see."""

    size: int
    """Ranks of the ring, P."""
    chunk: int
    """Tokens of a chunk, padding included."""
    zigzag: bool
    window: int | None = None
    """Number of keys that a query sees, itself included; None for all."""
    borders: Sequence[Borders] | None = None
    """Documents of each sample, padding included; None if a sample is one document."""
    global_tokens: int = 0
    """First tokens of a document that all later queries see beside their window."""

    @classmethod
    def of(cls, layout: Layout, variant: Variant, batch: int, global_tokens: int = 0) -> Sight:
        """The sight of `batch` samples. `layout.documents` cover their padding, as `Layout.cut` leaves them."""
        variant = variant.over(layout.length)
        documents = variant.documents(batch, layout.padded, layout.documents)
        borders = documents and [(0, *accumulate(lengths)) for lengths in documents]
        assert not borders or all(each[-1] == layout.padded for each in borders), (
            "documents cover the sample and its padding"
        )
        zigzag = layout.order == "zigzag" and layout.cp > 1
        size = layout.cp * layout.passes
        return cls(size, layout.chunk, zigzag, variant.window, borders, global_tokens)

    @property
    def local(self) -> int:
        """Tokens of a rank, s."""
        return self.chunk * (2 if self.zigzag else 1)

    @property
    def unlimited(self) -> bool:
        """Whether each query sees all keys before it."""
        return self.window is None and self.borders is None

    def offsets(self) -> list[int]:
        """How far keys travel along the ring to ranks that see them, ascending, from 0 for those of the rank itself."""
        if self.unlimited:
            return list(range(self.size))
        found = {0}
        for chunk in range(self.size * (2 if self.zigzag else 1)):
            first = self.first_seen(chunk * self.chunk) // self.chunk
            seen = range(first, chunk)
            found |= {(self._place(chunk) - self._place(other)) % self.size for other in seen}
        return sorted(found)

    def meetings(self, rank: int, source: int) -> Iterator[Meeting]:
        """Calls that cover each visible pair of a query of `rank` and a key of `source` once.

        Among calls of a rank with itself, every query is in one, for it sees its own key.
        """
        if self.unlimited:
            met = meeting(rank, source, self.local, zigzag=self.zigzag)
            yield from [] if met is None else [met]
            return
        for held, queries in enumerate(self._chunks(rank)):
            for other, keys in enumerate(self._chunks(source)):
                by = (held - queries) * self.chunk, (other - keys) * self.chunk
                for samples, borders in self._samples():
                    for met in self._of_chunks(queries, keys, borders):
                        yield met.moved(*by, samples)

    def _global_runs(self) -> Iterator[tuple[slice, int, int, int, int]]:
        """Samples, start and end of a document, its global tokens that a window leaves out, and their first place of G."""
        if not self.global_tokens or self.window is None:
            return
        for samples, borders in self._samples():
            place = 0
            for start, stop in pairwise(borders):
                count = min(self.global_tokens, stop - start - self.window)
                if count > 0:
                    yield samples, start, stop, count, place
                    place += count

    @property
    def num_global(self) -> int:
        """Global tokens that queries see beyond their windows, of the sample that has most: G."""
        return max((place + count for *_, count, place in self._global_runs()), default=0)

    def global_places(self, rank: int) -> Iterator[tuple[slice, slice, slice]]:
        """Samples, places among G, and places among its s tokens of the global tokens that `rank` holds."""
        for samples, start, _, count, place in self._global_runs():
            for held, chunk in enumerate(self._chunks(rank)):
                first = max(start, chunk * self.chunk)
                stop = min(start + count, (chunk + 1) * self.chunk)
                if first < stop:
                    by = (held - chunk) * self.chunk
                    among = slice(place + first - start, place + stop - start)
                    yield samples, among, slice(first + by, stop + by)

    def global_meetings(self, rank: int) -> Iterator[Meeting]:
        """Calls for queries of `rank` and the global keys that their windows leave out, among G."""
        for samples, start, stop, count, place in self._global_runs():
            assert self.window is not None, "it leaves them out"
            whole = start + self.window + count  # from here on, queries see all of them
            for held, chunk in enumerate(self._chunks(rank)):
                by = (held - chunk) * self.chunk
                first = max(start + self.window, chunk * self.chunk)
                last = min(stop, (chunk + 1) * self.chunk)
                border = max(min(last, whole), first)
                seen = first - start - self.window
                for met in _onset(first, border, seen):
                    yield met.moved(by, place, samples)
                if border < last:
                    met = Meeting(slice(border, last), slice(0, count), causal=False)
                    yield met.moved(by, place, samples)

    def _chunks(self, place: int) -> list[int]:
        """Chunks that rank `place` holds, in order."""
        return [place, 2 * self.size - 1 - place] if self.zigzag else [place]

    def _place(self, chunk: int) -> int:
        """The rank that holds `chunk`."""
        return min(chunk, 2 * self.size - 1 - chunk)

    def _samples(self) -> list[tuple[slice, Borders]]:
        """Documents of all samples together where they are the same, else of one sample after the other."""
        if self.borders is None:
            return [(slice(None), (0, self.size * self.local))]
        if all(each == self.borders[0] for each in self.borders):
            return [(slice(None), self.borders[0])]
        return [(slice(i, i + 1), borders) for i, borders in enumerate(self.borders)]

    def first_seen(self, token: int) -> int:
        """The first key that `token` sees in any of the samples."""
        start = min(borders[bisect_right(borders, token) - 1] for _, borders in self._samples())
        return start if self.window is None else max(start, token - self.window + 1)

    def _of_chunks(self, queries: int, keys: int, borders: Borders) -> Iterator[Meeting]:
        """Calls for two chunks of a sample, in places of the sample."""
        start, of_keys = queries * self.chunk, keys * self.chunk
        stop = start + self.chunk
        if keys == queries:
            for index in range(bisect_right(borders, start) - 1, len(borders) - 1):
                if borders[index] >= stop:
                    return
                yield from _own(
                    max(borders[index], start), min(borders[index + 1], stop), self.window
                )
        elif keys < queries:
            first = bisect_right(borders, start) - 1  # only this document has tokens in both
            seen = max(borders[first], of_keys), of_keys + self.chunk
            yield from _earlier((start, min(borders[first + 1], stop)), seen, self.window)


def _own(start: int, stop: int, window: int | None) -> Iterator[Meeting]:
    """Calls for queries and keys of the same tokens."""
    if window is None or window >= stop - start:
        yield Meeting(slice(start, stop), slice(start, stop), causal=True)
        return
    # Of two neighbouring blocks of this length, the second sees the first one backwards.
    block = max(window - 1, 1)
    whole = stop - (stop - start) % block
    yield from _blocks(start, whole, block, back=0)
    if window > 1:
        yield from _blocks(start + block, whole, block, back=block)
    if whole < stop:
        yield Meeting(slice(whole, stop), slice(whole, stop), causal=True)
        yield from _earlier((whole, stop), (whole - block, whole), window)


def _onset(first: int, stop: int, seen: int) -> Iterator[Meeting]:
    """Calls for queries of which the first sees key `seen` and all before it, and each next one a key more."""
    if first < stop:
        if seen > 0:
            yield Meeting(slice(first, stop), slice(0, seen), causal=False)
        yield Meeting(slice(first, stop), slice(seen, seen + stop - first), causal=True)


def _blocks(start: int, stop: int, block: int, *, back: int) -> Iterator[Meeting]:
    """Calls for whole blocks of queries, each with the keys that lie `back` tokens before it."""
    step = max(ROWS // block, 1) * block
    for first in range(start, stop, step):
        last = min(first + step, stop)
        keys, blocks = slice(first - back, last - back), (last - first) // block
        yield Meeting(slice(first, last), keys, causal=True, backwards=back > 0, blocks=blocks)


def _earlier(
    queries: tuple[int, int], keys: tuple[int, int], window: int | None
) -> Iterator[Meeting]:
    """Calls for queries (first, end) of tokens after those of keys (first, end)."""
    (start, stop), (first, last) = queries, keys
    if window is not None:
        first = max(first, start - window + 1)
        stop = min(stop, last + window - 1)
    if start >= stop or first >= last:
        return
    if window is None or stop <= first + window:
        yield Meeting(slice(start, stop), slice(first, last), causal=False)
        return
    # Queries before this one see all of the keys. The others see them from one key further on each.
    border = first + window - 1
    seen = first + stop - border
    if start < border:
        yield Meeting(slice(start, border), slice(first, last), causal=False)
    yield Meeting(slice(border, stop), slice(first, seen), causal=True, backwards=True)
    if seen < last:
        yield Meeting(slice(border, stop), slice(seen, last), causal=False)
