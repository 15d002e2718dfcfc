"""A model of CUDA's caching allocator with expandable segments: events -> reserved bytes.

One growing segment for requests above 1 MiB. A request takes the smallest free range that holds it;
if there is none, the segment grows from its free tail on, in pages of 20 MiB. Freed ranges merge
and stay reserved. Requests up to 1 MiB live in a segment of their own with pages of 2 MiB.

What kind of number comes out: the events are counted; the rules are our reading of
c10/cuda/CUDACachingAllocator.cpp with `expandable_segments:True`, and no GPU has confirmed them. Not
modelled: other streams, blocks that wait for an event of another stream, pages given back when
memory runs short. So a length "fits" when what this model reserves, plus a constant for what lies
outside the allocator, is within the device's memory. That criterion was chosen after published
lengths were known, as the one that an allocator which never gives back would meet; the constant is
fitted on the readings in `harness.predict.OUTSIDE_READINGS` alone. A real allocator under pressure
frees cached pages and may fit somewhat more.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable

MIB = 2**20
SMALL_REQUEST = MIB
SMALL_PAGE, LARGE_PAGE = 2 * MIB, 20 * MIB


class Segment:
    """An address range that grows; ranges in it are taken best fit."""

    def __init__(self, page: int) -> None:
        self._page = page
        self._end = 0
        self._free: list[tuple[int, int]] = []
        """(size, address), sorted."""
        self._by_start: dict[int, int] = {}
        self._by_stop: dict[int, int] = {}

    @property
    def reserved_bytes(self) -> int:
        """Whole pages up to the highest address ever used."""
        return -(-self._end // self._page) * self._page

    def take(self, size: int) -> int:
        """Address of a range of `size` bytes."""
        index = bisect.bisect_left(self._free, (size, 0))
        if index < len(self._free):
            found, start = self._free[index]
            self._remove(start, found)
            if found > size:
                self._insert(start + size, found - size)
            return start
        tail = self._by_stop.get(self._end)
        start = self._end if tail is None else tail
        if tail is not None:
            self._remove(tail, self._end - tail)
        self._end = start + size
        return start

    def give(self, start: int, size: int) -> None:
        """Free a range; it merges with free neighbours."""
        before = self._by_stop.get(start)
        if before is not None:
            self._remove(before, start - before)
            start, size = before, size + start - before
        after = self._by_start.get(start + size)
        if after is not None:
            self._remove(start + size, after)
            size += after
        self._insert(start, size)

    def _insert(self, start: int, size: int) -> None:
        bisect.insort(self._free, (size, start))
        self._by_start[start] = size
        self._by_stop[start + size] = start

    def _remove(self, start: int, size: int) -> None:
        self._free.pop(bisect.bisect_left(self._free, (size, start)))
        del self._by_start[start], self._by_stop[start + size]


def reserved_bytes(changes: Iterable[tuple[int, int]]) -> int:
    """Bytes reserved after replaying (allocation number, new size; 0 frees) in order."""
    small, large = Segment(SMALL_PAGE), Segment(LARGE_PAGE)
    held: dict[int, tuple[Segment, int, int]] = {}
    for number, nbytes in changes:
        if number in held:
            segment, start, size = held.pop(number)
            segment.give(start, size)
        if nbytes:
            segment = small if nbytes <= SMALL_REQUEST else large
            held[number] = segment, segment.take(nbytes), nbytes
    return small.reserved_bytes + large.reserved_bytes
