"""Stock Hugging Face training, the baseline that ALST is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alst_impl.config import Spec, TrainConfig
from alst_impl.methods.base import Method

if TYPE_CHECKING:
    from torch.distributed import DeviceMesh
    from transformers import PreTrainedModel

    from alst_impl.ops.attention.patterns.base import Pattern
    from alst_impl.placement import Placement


class Baseline(Method):
    """Data parallel, one whole sequence per rank, the model's own loss over all logits."""

    def attends(self, pattern: Pattern) -> bool:
        return True

    def apply(
        self, model: PreTrainedModel, config: TrainConfig, mesh: DeviceMesh, placement: Placement
    ) -> None:
        if config.attention == Spec(name="sdpa"):
            return  # what transformers does by itself
        from alst_impl import hf
        from alst_impl.ops.attention.cores.base import load_core
        from alst_impl.ops.attention.ulysses import UlyssesAttention

        core = load_core(config.attention)
        hf.use_attention(model, UlyssesAttention(core, placement.evidence))
