"""Ring attention over any number of ranks, with ALST's tiles and offload (arXiv:2105.13120)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from alst_impl.config import TrainConfig
from alst_impl.methods.base import Tiled, check_flash_by_name, check_sharded
from alst_impl.models import published, window

if TYPE_CHECKING:
    from torch.distributed import DeviceMesh
    from transformers import PreTrainedModel

    from alst_impl.data import Batch
    from alst_impl.placement import Placement


class Ring(Tiled):
    """Keys and values rotate while queries stay, so there may be more ranks than heads.

    Everything except attention is the same as in ALST, so that a comparison is one of attentions.
    """

    cp: int = Field(default=1, ge=1)
    """Context-parallel degree: ranks in a ring."""
    placement: Literal["zigzag", "contiguous"] = "zigzag"
    """Which tokens a rank holds.
    `contiguous`: one chunk, so the last rank attends to all keys and the first only to its own. `zigzag`: one
    chunk from the front and its mirror image from the back, so all ranks have equal work."""

    def shards_of_place(self) -> int:
        """Number of ranks that share a position in the ring and split its heads."""
        return 1

    def chunks_of_place(self) -> int:
        """Number of sequence chunks at each position in the ring."""
        return 2 if self.placement == "zigzag" and self.cp > 1 else 1

    def check(self, config: TrainConfig) -> None:
        name = type(self).__name__.lower()
        check_sharded(config, self.shards_of_place(), name, self.cp)
        super().check(config)
        if self.cp == 1:
            return
        check_flash_by_name(config, name)
        fewest = self.cp * self.chunks_of_place() * self._multiple()
        if config.seqlen < fewest:
            raise ValueError(
                f"seqlen ({config.seqlen}) is less than a token for each of {fewest} chunks, which "
                f"placement '{self.placement}' needs at cp ({self.cp}); use a smaller cp"
            )
        if config.data.documents > 1:
            raise ValueError(
                f"packed documents ({config.data.documents}) would see each other in the ring of method "
                f"'{name}'; use documents: 1, or method 'alst'"
            )
        visible = window(published(config.model, config.overrides))
        if visible is not None and visible < config.seqlen:
            raise ValueError(
                f"model '{config.model}' has a sliding window of {visible}, less than seqlen "
                f"({config.seqlen}), which the ring of method '{name}' does not know; use method 'alst'"
            )

    def axes(self, world_size: int) -> dict[str, int]:
        sp = self.shards_of_place()
        return {"dp": world_size // (self.cp * sp), "cp": self.cp, "sp": sp}

    def heaviest_rank(self, world_size: int) -> int:
        """The last rank: in both placements, all its queries attend to keys in every ring step."""
        return world_size - 1

    def _multiple(self) -> int:
        """Chunk lengths are multiples of this, so that ranks at the same ring position get equal parts."""
        sp = self.shards_of_place()
        return sp // math.gcd(sp, self.chunks_of_place())

    def local_seqlen(self, config: TrainConfig) -> int:
        chunks, multiple = self.chunks_of_place(), self._multiple()
        chunk = -(-config.seqlen // (self.cp * chunks * multiple)) * multiple
        return chunk * chunks // self.shards_of_place()

    def shard(self, batch: Batch, mesh: DeviceMesh) -> Batch:
        """This rank's shard: the chunks of its ring position, concatenated and split over `sp`.

        The batch is padded right to chunks of equal length. Position ids stay those of the whole sequence.
        """
        from alst_impl.data import joined, shard_sequence
        from alst_impl.ops.attention.ring import chunks_of

        cp, sp, chunks = mesh["cp"], mesh["sp"], self.chunks_of_place()
        mine = chunks_of(cp.get_local_rank(), cp.size(), zigzag=chunks == 2)
        parts = [shard_sequence(batch, cp.size() * chunks, i, self._multiple()) for i in mine]
        place = joined(parts) if len(parts) > 1 else parts[0]
        return shard_sequence(place, sp.size(), sp.get_local_rank())

    def promises(self, config: TrainConfig) -> set[str]:
        return super().promises(config) | ({"rotations"} if self.cp > 1 else set())

    def apply(
        self, model: PreTrainedModel, config: TrainConfig, mesh: DeviceMesh, placement: Placement
    ) -> None:
        from alst_impl.ops.attention.ring import RingAttention
        from alst_impl.ops.attention.ulysses import UlyssesAttention

        evidence, zigzag = placement.evidence, self.chunks_of_place() == 2
        ring = RingAttention(mesh["cp"].get_group(), zigzag, evidence) if self.cp > 1 else None
        group = mesh["sp"].get_group() if self.shards_of_place() > 1 else None
        attention = UlyssesAttention(group, config.attention, evidence, ring)
        self.attach(model, attention, placement)
