"""Who holds which tokens of a sample, and whom to talk to. Imports no torch, because plans are made while sweeps expand.

Legend: B batch, S tokens of a sample, P ranks that share it, s tokens of one of these ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import DeviceMesh, ProcessGroup

    from alst_impl.data import Batch

IGNORE_INDEX = -100
"""Label that the loss ignores, as in `torch.nn.functional.cross_entropy`."""
AXES = ("dp", "pp", "cp", "sp")
"""Axes of a mesh: data, pipeline, context (ring) and sequence (Ulysses) parallel.
`dp` ranks hold different samples; `pp` splits the layers; `cp` and `sp` split the sequence."""
OUTERMOST_FIRST = ("pp", "dp", "cp", "sp")
"""The order of a mesh: stages are far apart, the ranks that talk most are neighbours."""

Documents = Sequence[Sequence[int]]
"""Lengths of each sample's packed documents, in order; they add up to the sample's length."""


@dataclass(frozen=True)
class Part:
    """Which slice of a sample, of which micro-batch. Forwards of a sample's slices run in order."""

    micro_batch: int
    index: int
    count: int
    """Number of slices of a sample."""


@dataclass(frozen=True)
class Layout:
    """Which tokens of its samples each rank of a group holds, and in which order.

    The default is a whole sample on one rank.
    """

    length: int
    """Tokens of a sample, S."""
    pp: int = 1
    """Pipeline stages. All of them hold the same tokens."""
    cp: int = 1
    """Ranks of a ring, each with one part of the sequence."""
    sp: int = 1
    """Ranks that share such a part."""
    order: Literal["contiguous", "zigzag"] = "contiguous"
    """Parts of the sequence along `cp`: one chunk for each rank, or one chunk from the front and its mirror image from
    the back, so that all ranks have equally many visible (query, key) pairs."""
    passes: int = 1
    """Chunks of the sequence that the `sp` ranks compute one after another, each rank its part of every chunk."""
    part: Part | None = None
    """The slice of the sequence that is computed now, of a pipeline or of `passes`; None for all tokens."""
    documents: Documents | None = None
    """Packed documents of each sample; None if a sample is one document. In a shard, padding is one of them."""
    draws: str | None = field(default=None, compare=False, repr=False)
    """Name of a pass's random numbers, the same on all ranks of the group (`alst_impl.ops.draws`).
    None leaves them to each process's generators."""
    mesh: DeviceMesh | None = field(default=None, compare=False, repr=False)
    """The ranks; None in a plan that no process runs. A mesh, and so a shard, stays in its process."""

    @property
    def chunks(self) -> int:
        """Number of chunks that a rank of the ring holds."""
        return (
            self.passes if self.passes > 1 else 2 if self.order == "zigzag" and self.cp > 1 else 1
        )

    @property
    def multiple(self) -> int:
        """Chunk lengths are multiples of this, so that the `sp` ranks get equal parts."""
        return self.sp if self.passes > 1 else self.sp // math.gcd(self.sp, self.chunks)

    @property
    def chunk(self) -> int:
        """Tokens of a chunk, padding included."""
        return -(-self.length // (self.cp * self.chunks * self.multiple)) * self.multiple

    @property
    def local(self) -> int:
        """Tokens of a sample that each rank holds, padding included: s."""
        return self.chunk * self.chunks // self.sp

    @property
    def padded(self) -> int:
        """Tokens of a sample, padding included."""
        return self.local * self.shards

    @property
    def shards(self) -> int:
        """Number of ranks that hold different tokens of a sample: P."""
        return self.cp * self.sp

    @property
    def ranks(self) -> int:
        """Ranks of a group: pp x cp x sp."""
        return self.pp * self.shards

    @property
    def trivial(self) -> bool:
        """Whether every rank computes whole samples of one document, so that no module has to know the layout."""
        return self.shards == 1 and self.part is None and self.documents is None

    def size(self, axis: str) -> int:
        """Ranks of the group along `axis`: pp, cp or sp."""
        return {"pp": self.pp, "cp": self.cp, "sp": self.sp}[axis]

    def group(self, axis: str) -> ProcessGroup | None:
        """Process group of this rank along `axis`; None if it is alone there."""
        if self.size(axis) == 1:
            return None
        if self.mesh is None:
            raise ValueError(
                f"a plan of {self.ranks} ranks has no process groups; bind it to a mesh"
            )
        return self.mesh.get_group(axis)

    def spans(self, shard: int) -> list[slice]:
        """Places of the tokens of shard `shard` of P in the padded sample, in the order in which they are held."""
        ring, part = divmod(shard, self.sp)
        if self.passes > 1:
            size = self.chunk // self.sp
            starts = range(part * size, self.padded, self.chunk)
            return [slice(start, start + size) for start in starts]
        held = [ring, 2 * self.cp - 1 - ring] if self.chunks == 2 else [ring]
        spans, skip, left = [], part * self.local, self.local
        for index in held:
            first = min(skip, self.chunk)
            taken = min(self.chunk - first, left)
            skip, left = skip - first, left - taken
            if taken:
                start = index * self.chunk + first
                spans.append(slice(start, start + taken))
        return spans

    @property
    def shard(self) -> int:
        """Number of this rank's shard, `cp` before `sp`."""
        index = 0
        for axis in ("cp", "sp"):
            group = self.group(axis)
            index = index * self.size(axis) + (0 if group is None else group.rank())
        return index

    def positions(self, shard: int) -> Tensor:
        """Places of the shard's tokens in the padded sample, int64 [s]."""
        import torch

        return torch.cat([torch.arange(span.start, span.stop) for span in self.spans(shard)])

    def cut(self, batch: Batch, shard: int | None = None) -> Batch:
        """A shard of the whole `batch`, by default this rank's: [B, S] -> [B, s].

        Pads right first, with ignored labels. Right padding is exact under causal attention: no real token
        attends to it. In a packed batch the padding is a document of its own. In a pipeline only the last
        stage, which has the loss, gets labels that count.
        """
        import torch

        length, documents = batch.input_ids.shape[1], batch.layout.documents
        if length != self.length:
            raise ValueError(f"a layout of {self.length} tokens cannot cut samples of {length}")
        pad = self.padded - length
        spans = self.spans(self.shard if shard is None else shard)

        def held(x: Tensor) -> Tensor:
            if len(spans) == 1:
                return x[:, spans[0]].contiguous()
            return torch.cat([x[:, span] for span in spans], dim=1)

        def padded(x: Tensor, fill: int) -> Tensor:
            return torch.nn.functional.pad(x, (0, pad), value=fill)

        positions = batch.position_ids
        if pad:
            tail = torch.arange(pad) if documents else torch.arange(length, length + pad)
            positions = torch.cat([positions, tail.expand(positions.shape[0], pad)], dim=1)
            documents = documents and tuple((*lengths, pad) for lengths in documents)
        labels = held(padded(batch.shift_labels, IGNORE_INDEX))
        stages = self.group("pp") if shard is None else None
        if stages is not None and stages.rank() < self.pp - 1:
            labels = torch.full_like(labels, IGNORE_INDEX)
        return replace(
            batch,
            input_ids=held(padded(batch.input_ids, 0)),
            shift_labels=labels,
            position_ids=held(positions),
            layout=replace(self, documents=documents),
        )

    def whole(self, shards: Sequence[Tensor]) -> Tensor:
        """The sample from its P shards in order: [B, s, ...] each -> [B, S, ...], without padding."""
        import torch

        pieces: dict[int, Tensor] = {}
        for index, shard in enumerate(shards):
            spans = self.spans(index)
            parts = shard.split([span.stop - span.start for span in spans], dim=1)
            pieces.update(zip((span.start for span in spans), parts, strict=True))
        return torch.cat([pieces[start] for start in sorted(pieces)], dim=1)[:, : self.length]


def sizes(layouts: Sequence[Layout]) -> dict[str, int]:
    """Size of every axis of a plan: its groups along `dp`, the others within a group.

    Raises `ValueError` unless the groups are of equal shape, as on a mesh.
    """
    if len({tuple(each.size(axis) for axis in AXES[1:]) for each in layouts}) != 1:
        raise ValueError("a plan needs at least one group, and groups of equal shape")
    return {axis: len(layouts) if axis == "dp" else layouts[0].size(axis) for axis in AXES}


def mesh_shape(layouts: Sequence[Layout]) -> dict[str, int]:
    """Axes of the mesh of a plan and their sizes, outermost first: `dp` and `sp`, and others with more than one rank."""
    found = sizes(layouts)
    return {a: found[a] for a in OUTERMOST_FIRST if found[a] > 1 or a in ("dp", "sp")}


def make_mesh(layouts: Sequence[Layout], device: str) -> DeviceMesh:
    """The mesh of all ranks for a plan, with the axes of `mesh_shape`. Collective."""
    from torch.distributed import init_device_mesh

    shape = mesh_shape(layouts)
    return init_device_mesh(device, tuple(shape.values()), mesh_dim_names=tuple(shape))


def reached(layout: Layout | None, length: int, shards: int | None) -> Layout:
    """The layout of a call of attention; without one, `length` tokens that one rank holds.

    Raises `ValueError` unless it is of `shards` ranks that share each sample; None: of as many as it says.
    """
    found = Layout(length) if layout is None else layout
    if shards is not None and found.shards != shards:
        raise ValueError(
            f"{shards} ranks share each sample, but attention got a batch that {found.shards} share: shard it "
            "(Method.shard, or alst.shard in a loop of your own), and pass `layout` on to the model"
        )
    held = found.local if found.part is None or found.passes == 1 else found.local // found.passes
    if (found.part is None or found.passes > 1) and held != length:
        raise ValueError(
            f"attention got {length} tokens of a sample, but its layout says {held}: run backward of a batch "
            "before forward of one of another length, or pass `layout` on to every layer"
        )
    return found
