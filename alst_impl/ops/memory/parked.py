"""Tensors that a layer reads in pieces: on the device, or on the host with one piece on the device at a time.

Legend: B batch, S sequence, s = S/P, P sequence-parallel degree, E hidden size, G head groups, h heads of a
group on one rank, D head dim. Slots [G, P, s, B, h, D] hold heads; the slot of each group is contiguous.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from alst_impl.ops.memory import float8, tiling
from alst_impl.ops.memory.offload import Coming, HostOffload, HostTiles
from alst_impl.ops.memory.tiling import TokenWise


class Rows(Protocol):
    """A layer's input, read by tile."""

    @property
    def shape(self) -> torch.Size:
        """[B, s, E]."""

    @property
    def like(self) -> Tensor:
        """A tensor of the same dtype and device."""

    def tile(self, rows: slice) -> Tensor:
        """The given rows, [B, rows, E]."""

    def whole(self) -> Tensor:
        """All rows on the device."""


class Resident:
    """All rows on the device."""

    def __init__(self, x: Tensor) -> None:
        self.shape, self.like = x.shape, x

    def tile(self, rows: slice) -> Tensor:
        """A view."""
        return self.like[:, rows]

    def whole(self) -> Tensor:
        """The rows themselves, without a copy."""
        return self.like


class Prepared:
    """Rows of another kind, computed anew from each tile."""

    def __init__(self, rows: Rows, prepare: TokenWise) -> None:
        self.shape, self.like = rows.shape, rows.like
        self._rows, self._prepare = rows, prepare

    def tile(self, rows: slice) -> Tensor:
        """Computed on the device."""
        return self._prepare(self._rows.tile(rows))

    def whole(self) -> Tensor:
        """All rows on the device."""
        return self._prepare(self._rows.whole())


class Parked:
    """Rows on the host in tiles of `size` rows, which can be fetched any number of times.

    The tile after a fetched one is on its way to the device when it is asked for.
    """

    def __init__(self, x: Tensor, size: int, offload: HostOffload, *, eight_bits: bool) -> None:
        self.shape, self.like = x.shape, x.new_empty(0)
        self._size, self._eight_bits = size, eight_bits
        batch, local, width = x.shape
        formats = [(width, float8.DTYPE), (1, torch.float32)] if eight_bits else [(width, x.dtype)]
        self._parts = [HostTiles(offload, local, size, batch * w, dtype) for w, dtype in formats]
        for start, stop in self._bounds():
            tile = x[:, start:stop]
            for part, each in zip(
                self._parts, float8.pack(tile) if eight_bits else (tile,), strict=True
            ):
                part.put(start, each)
        self._ahead: tuple[slice, list[Coming]] | None = None

    def tile(self, rows: slice) -> Tensor:
        """A copy on the device."""
        local = self.shape[1]
        ahead, self._ahead = self._ahead, None
        coming = ahead[1] if ahead is not None and ahead[0] == rows else self._fetch(rows)
        stop = min(2 * rows.stop - rows.start, local)
        if rows.stop < stop:
            following = slice(rows.stop, stop)
            self._ahead = following, self._fetch(following)
        x, *scale = (each.wait() for each in coming)
        return float8.unpack(x, scale[0], self.like.dtype) if self._eight_bits else x

    def _fetch(self, rows: slice) -> list[Coming]:
        batch, _, width = self.shape
        widths = (width, 1) if self._eight_bits else (width,)
        count = rows.stop - rows.start
        return [
            part.fetch(rows.start, (batch, count, w))
            for part, w in zip(self._parts, widths, strict=True)
        ]

    def whole(self) -> Tensor:
        """All rows on the device."""
        x = self.like.new_empty(self.shape)
        for start, stop in self._bounds():
            x[:, start:stop] = self.tile(slice(start, stop))
        return x

    def _bounds(self) -> list[tuple[int, int]]:
        return tiling.tile_bounds(self.shape[1], -(-self.shape[1] // self._size))


class ByGroup(Protocol):
    """Heads of all tokens of this rank, read by group."""

    def group(self, group: int) -> Tensor:
        """The heads of `group`, [P, s, B, h, D].

        The caller may overwrite them, if it does not read the group again, or writes its slot before.
        """


class Slots(ByGroup, Protocol):
    """Heads of all tokens of this rank, accessed by group or by tile."""

    def room(self, group: int) -> Tensor:
        """Memory [P, s, B, h, D] in which to write a group's heads before `put`."""

    def put(self, group: int, heads: Tensor) -> None:
        """Store `heads`, which the caller wrote to `room(group)`, as the heads of `group`."""

    def tile(self, rows: slice) -> Tensor:
        """The heads of the given rows, [G, P, rows, B, h, D]."""

    def put_tile(self, rows: slice, heads: Tensor) -> None:
        """Store `heads` [G, P, rows, B, h, D], of any strides, as those of the given rows."""

    def another(self) -> Slots:
        """Uninitialized slots of the same shape."""

    def pairs(self, num_groups: int, heads: int) -> Slots:
        """Slots for `num_groups` groups of `heads` heads. They may reuse the memory of these slots."""


class DeviceSlots:
    """All slots in one tensor on the device."""

    def __init__(self, slots: Tensor) -> None:
        self.slots = slots

    def group(self, group: int) -> Tensor:
        """A view."""
        return self.slots[group]

    room = group

    def put(self, group: int, heads: Tensor) -> None:
        """Nothing to do: `room` is the slot itself."""

    def tile(self, rows: slice) -> Tensor:
        """A view."""
        return self.slots[:, :, rows]

    def put_tile(self, rows: slice, heads: Tensor) -> None:
        """Copies into the slots."""
        self.slots[:, :, rows] = heads

    def another(self) -> DeviceSlots:
        """In a new tensor."""
        return DeviceSlots(torch.empty_like(self.slots))

    def pairs(self, num_groups: int, heads: int) -> DeviceSlots:
        """Views of these slots if they are large enough, else in a new tensor."""
        _, degree, local, batch, _, dim = self.slots.shape
        shape = num_groups, degree, local, batch, heads, dim
        of_group = self.slots.view(num_groups, -1)
        size = torch.Size(shape[1:]).numel()
        if of_group.shape[1] < size:
            return DeviceSlots(self.slots.new_empty(shape))
        return DeviceSlots(of_group[:, :size].view(shape))


class HostSlots:
    """Slots on the host by tile, with all groups of a tile adjacent, so a tile or a group takes few copies."""

    def __init__(self, shape: torch.Size, size: int, like: Tensor, offload: HostOffload) -> None:
        self._shape, self._size, self._like, self._offload = shape, size, like, offload
        groups, degree, local, *rest = shape
        width = torch.Size((groups, degree, *rest)).numel()
        self._tiles = HostTiles(offload, local, size, width, like.dtype)

    def group(self, group: int) -> Tensor:
        """A copy on the device."""
        heads = self.room(group)
        for start, stop in self._bounds():
            heads[:, start:stop] = self._offload.get(self._of(start, stop)[group])
        return heads

    def room(self, group: int) -> Tensor:
        """New memory on the device."""
        return self._like.new_empty(self._shape[1:])

    def put(self, group: int, heads: Tensor) -> None:
        """Copies to the host."""
        for start, stop in self._bounds():
            self._offload.put(heads[:, start:stop], self._of(start, stop)[group])

    def tile(self, rows: slice) -> Tensor:
        """A copy on the device."""
        return self._offload.get(self._of(rows.start, rows.stop))

    def put_tile(self, rows: slice, heads: Tensor) -> None:
        """Copies to the host."""
        self._offload.put(heads, self._of(rows.start, rows.stop))

    def another(self) -> HostSlots:
        """In new host memory."""
        return HostSlots(self._shape, self._size, self._like, self._offload)

    def pairs(self, num_groups: int, heads: int) -> HostSlots:
        """In new host memory."""
        _, degree, local, batch, _, dim = self._shape
        shape = torch.Size((num_groups, degree, local, batch, heads, dim))
        return HostSlots(shape, self._size, self._like, self._offload)

    def _of(self, start: int, stop: int) -> Tensor:
        groups, degree, _, *rest = self._shape
        return self._tiles.view(start, (groups, degree, stop - start, *rest))

    def _bounds(self) -> list[tuple[int, int]]:
        local = self._shape[2]
        return tiling.tile_bounds(local, -(-local // self._size))
