"""Ring attention over any number of ranks, with ALST's tiles and offload (arXiv:2105.13120)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from alst_impl.config import TrainConfig
from alst_impl.layout import Layout
from alst_impl.methods.base import Tiled, check_flash_by_name, check_sharded, layouts
from alst_impl.models import described
from alst_impl.ops.attention.cores.base import load_core
from alst_impl.sources.base import load_source

if TYPE_CHECKING:
    from torch.distributed import DeviceMesh
    from transformers import PreTrainedModel

    from alst_impl.ops.attention.patterns.base import Pattern
    from alst_impl.placement import Placement


class Ring(Tiled):
    """Keys and values rotate while queries stay, so there may be more ranks than heads.

    Everything except attention is the same as in ALST, so that a comparison is one of attentions.
    """

    knows: ClassVar[frozenset[str]] = frozenset(
        {"softcap", "sinks", "chunks", "mixers", "router loss"}
    )
    cp: int = Field(default=1, ge=1)
    """Context-parallel degree: ranks in a ring."""
    placement: Literal["zigzag", "contiguous"] = "zigzag"
    """Which tokens a rank holds.
    `contiguous`: one chunk, so the last rank attends to all keys and the first only to its own. `zigzag`: one
    chunk from the front and its mirror image from the back, so all ranks have equal work. If every layer has a
    short window, all ranks have equal work in `contiguous`, too, and keys travel to the next ranks alone; in
    `zigzag` they travel both ways."""

    def attends(self, pattern: Pattern) -> bool:
        return pattern.as_window() is not None or self.cp == 1

    def replaces_core(self, seqlen: int) -> bool:
        return self.cp > 1

    def shards_of_place(self) -> int:
        """Number of ranks that share a position in the ring and split its heads."""
        return 1

    def layout(self, length: int) -> Layout:
        return Layout(length, cp=self.cp, sp=self.shards_of_place(), order=self.placement)

    def check(self, config: TrainConfig) -> None:
        name = type(self).__name__.lower()
        check_sharded(config, self.shards_of_place(), name, self.cp, self.knows)
        super().check(config)
        if self.cp == 1:
            return
        check_flash_by_name(config, name)
        layout = self.layout(config.seqlen)
        fewest = self.cp * layout.chunks * layout.multiple
        if config.seqlen < fewest:
            raise ValueError(
                f"seqlen ({config.seqlen}) must be at least {fewest}: placement '{self.placement}' at cp ({self.cp}) "
                "makes as many chunks, and each needs a token; use a smaller cp"
            )
        softcap = described(config.model, config.overrides).get("attn_logit_softcapping")
        if softcap:
            raise ValueError(
                f"model '{config.model}' has soft-capped attention logits (attn_logit_softcapping={softcap}), which "
                f"the ring of method '{name}' does not support: it merges what PyTorch's flash kernel returns, which "
                "has no soft-cap; use method 'alst'"
            )

    def heaviest_rank(self, world_size: int) -> int:
        """The last rank: in both placements, all its queries attend to keys in every ring step."""
        return world_size - 1

    def promises(self, config: TrainConfig) -> set[str]:
        # Documents and chunks may end where the ranks' tokens do, so that no key has to travel.
        chunked = described(config.model, config.overrides).get("attention_chunk_size")
        packed = config.data.packed or load_source(config.data.source).packs
        pattern = load_core(config.attention).pattern
        keys = None if pattern is None else pattern.as_window()
        alone = keys is not None and keys[0] == 1
        travels = self.cp > 1 and not (packed or chunked or alone)
        return super().promises(config) | ({"rotations/gathers"} if travels else set())

    def apply(
        self, model: PreTrainedModel, config: TrainConfig, mesh: DeviceMesh, placement: Placement
    ) -> None:
        from alst_impl.ops.attention.ring import RingAttention

        whole = load_core(config.attention)
        whole.activate()
        core = RingAttention(placement.evidence, whole) if self.cp > 1 else whole
        self.attach(model, lambda: core, layouts(config)[0].shards, placement)
