"""ALST: Ulysses sequence parallelism, sequence tiling, checkpoint offload (arXiv:2506.13996)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from alst_impl.config import Spec, TrainConfig
from alst_impl.layout import Layout
from alst_impl.methods.base import Tiled, check_sharded, layouts

if TYPE_CHECKING:
    from torch.distributed import DeviceMesh
    from transformers import PreTrainedModel

    from alst_impl.ops.attention.patterns.base import Pattern
    from alst_impl.placement import Placement


class Alst(Tiled):
    """Every part is an option, so that the paper's ablation is a sweep."""

    knows: ClassVar[frozenset[str]] = frozenset(
        {"softcap", "sinks", "chunks", "mixers", "router loss"}
    )
    sp: int = Field(default=1, ge=1)
    """Sequence-parallel degree: ranks that share one sample."""

    def attends(self, pattern: Pattern) -> bool:
        return True

    def check(self, config: TrainConfig) -> None:
        check_sharded(config, self.sp, "alst", knows=self.knows)
        super().check(config)

    def layout(self, length: int) -> Layout:
        return Layout(length, sp=self.sp)

    def promises(self, config: TrainConfig) -> set[str]:
        return super().promises(config) | ({"exchanges/gathers"} if self.sp > 1 else set())

    def apply(
        self, model: PreTrainedModel, config: TrainConfig, mesh: DeviceMesh, placement: Placement
    ) -> None:
        self.enable(model, placement, config.attention, layouts(config)[0].shards)

    def enable(
        self, model: PreTrainedModel, placement: Placement, attention: Spec, shards: int
    ) -> None:
        """Add sequence parallelism and tiling to `model`, in place, for `shards` ranks that share a sample.

        `attention` names the core attention.
        """
        from alst_impl.ops.attention.cores.base import load_core

        core = load_core(attention)
        self.attach(model, lambda: core, shards, placement)
