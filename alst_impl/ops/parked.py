"""What a layer works on piece by piece: on the device, or on the host with one piece on the device at a time.

Legend: B batch, S sequence, s = S/P, P sequence-parallel degree, E hidden size, G head groups, h heads of a
group on one rank, D head dim. Slots [G, P, s, B, h, D] hold heads, a contiguous one for each group.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from alst_impl.ops import float8
from alst_impl.ops.offload import HostOffload, OnHost


class Rows(Protocol):
    """A layer's input, by tile."""

    @property
    def shape(self) -> torch.Size:
        """[B, s, E]."""

    @property
    def like(self) -> Tensor:
        """Any tensor of its dtype and device."""

    def tile(self, rows: slice) -> Tensor:
        """Those rows [B, rows, E]."""


class Resident:
    """All rows on the device."""

    def __init__(self, x: Tensor) -> None:
        self.shape, self.like = x.shape, x

    def tile(self, rows: slice) -> Tensor:
        """A view."""
        return self.like[:, rows]


class Parked:
    """Tiles that wait on the host and come one at a time, as often as they are asked for."""

    def __init__(self, x: Tensor, size: int, offload: HostOffload, *, eight_bits: bool) -> None:
        self.shape, self.like = x.shape, x.new_empty(0)
        self._offload, self._eight_bits = offload, eight_bits
        self._tiles = {
            i * size: [
                offload.keep(each) for each in (float8.pack(part) if eight_bits else (part,))
            ]
            for i, part in enumerate(x.split(size, dim=1))
        }

    def tile(self, rows: slice) -> Tensor:
        """A copy on the device."""
        return self._on_device(self._tiles[rows.start])

    def whole(self) -> Tensor:
        """All rows on the device, and no longer on the host."""
        x = self.like.new_empty(self.shape)
        for start in list(self._tiles):
            tile = self._on_device(self._tiles.pop(start))
            x[:, start : start + tile.shape[1]] = tile
        return x

    def _on_device(self, parts: list[OnHost]) -> Tensor:
        found = [self._offload.look(part) for part in parts]
        if not self._eight_bits:
            return found[0]
        packed, scale = found
        return float8.unpack(packed, scale, self.like.dtype)


class Slots(Protocol):
    """Heads of all tokens of this rank, by group and by tile."""

    def group(self, group: int) -> Tensor:
        """[P, s, B, h, D]; its room may be used again, the slot itself being written before it is read."""

    def room(self, group: int) -> Tensor:
        """Where to write a group, [P, s, B, h, D], to `put` it."""

    def put(self, group: int, heads: Tensor) -> None:
        """`heads`, written to `room(group)`, are the group's."""

    def tile(self, rows: slice) -> Tensor:
        """[G, P, rows, B, h, D]."""

    def put_tile(self, rows: slice, heads: Tensor) -> None:
        """`heads` [G, P, rows, B, h, D], of any strides, are those rows'."""

    def another(self) -> Slots:
        """Slots of the same shape, with nothing in them."""

    def pairs(self, num_groups: int, heads: int) -> Slots:
        """Slots for `num_groups` groups of `heads` heads, which may lie inside these and replace them."""


class DeviceSlots:
    """All of them in one tensor."""

    def __init__(self, slots: Tensor) -> None:
        self.slots = slots

    def group(self, group: int) -> Tensor:
        """A view."""
        return self.slots[group]

    room = group

    def put(self, group: int, heads: Tensor) -> None:
        """Nothing to do: the room is the slot."""

    def tile(self, rows: slice) -> Tensor:
        """A view."""
        return self.slots[:, :, rows]

    def put_tile(self, rows: slice, heads: Tensor) -> None:
        """Copies."""
        self.slots[:, :, rows] = heads

    def another(self) -> DeviceSlots:
        """In another tensor."""
        return DeviceSlots(torch.empty_like(self.slots))

    def pairs(self, num_groups: int, heads: int) -> DeviceSlots:
        """Inside these where they are large enough."""
        _, degree, local, batch, _, dim = self.slots.shape
        shape = num_groups, degree, local, batch, heads, dim
        of_group = self.slots.view(num_groups, -1)
        size = torch.Size(shape[1:]).numel()
        if of_group.shape[1] < size:
            return DeviceSlots(self.slots.new_empty(shape))
        return DeviceSlots(of_group[:, :size].view(shape))


class HostSlots:
    """On the host, a tensor for each tile, so that groups and tiles both are few copies."""

    def __init__(self, shape: torch.Size, size: int, like: Tensor, offload: HostOffload) -> None:
        self._shape, self._size, self._like, self._offload = shape, size, like, offload
        groups, degree, local, *rest = shape
        starts = range(0, local, size)
        self._tiles = {
            start: offload.room((groups, degree, min(size, local - start), *rest), like.dtype)
            for start in starts
        }

    def group(self, group: int) -> Tensor:
        """A copy."""
        heads = self.room(group)
        for start, tile in self._tiles.items():
            heads[:, start : start + self._size] = self._offload.get(tile[group])
        return heads

    def room(self, group: int) -> Tensor:
        """On the device."""
        return self._like.new_empty(self._shape[1:])

    def put(self, group: int, heads: Tensor) -> None:
        """Copies."""
        for start, tile in self._tiles.items():
            self._offload.put(heads[:, start : start + self._size], tile[group])

    def tile(self, rows: slice) -> Tensor:
        """A copy."""
        return self._offload.get(self._tiles[rows.start])

    def put_tile(self, rows: slice, heads: Tensor) -> None:
        """Copies."""
        self._offload.put(heads, self._tiles[rows.start])

    def another(self) -> HostSlots:
        """Beside these."""
        return HostSlots(self._shape, self._size, self._like, self._offload)

    def pairs(self, num_groups: int, heads: int) -> HostSlots:
        """Beside these."""
        _, degree, local, batch, _, dim = self._shape
        shape = torch.Size((num_groups, degree, local, batch, heads, dim))
        return HostSlots(shape, self._size, self._like, self._offload)
