"""The published ALST recipes, for simulation only: `alst_impl.published_stack` has their parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from alst_impl.config import TrainConfig
from alst_impl.methods.base import Method, check_sharded

if TYPE_CHECKING:
    from torch.distributed import DeviceMesh
    from transformers import PreTrainedModel

    from alst_impl.placement import Placement


class AlstRecipe(Method):
    """The released recipes' switches, as in the rows of the paper's Table 1."""

    simulation_only: ClassVar[bool] = True
    sp: int = Field(default=1, ge=1)
    """Sequence-parallel degree."""
    liger: bool = True
    """Liger's fused norm, RoPE and logits+loss, and its SwiGLU where the MLP is not tiled (both
    replace the MLP: section 5.4)."""
    tile_mlp: bool = True
    """DeepSpeed's TiledMLP with ceil(S / E) tiles (section 3.1.1)."""
    offload: bool = True
    """Checkpoints in host memory, by synchronous copies (section 3.3)."""

    attention: Literal["flash_attention_2", "sdpa"] = "flash_attention_2"
    """`sdpa` in the recipe of the ablation's tiled-MLP row, which repeats kv heads."""

    def check(self, config: TrainConfig) -> None:
        check_sharded(config, self.sp, "alst_recipe")
        if not config.checkpoint:
            raise ValueError(
                "alst_recipe always checkpoints, but checkpoint is false; set it to true"
            )

    def axes(self, world_size: int) -> dict[str, int]:
        return {"dp": world_size // self.sp, "sp": self.sp}

    def apply(
        self, model: PreTrainedModel, config: TrainConfig, mesh: DeviceMesh, placement: Placement
    ) -> None:
        from alst_impl import hf, published_stack
        from alst_impl.ops.ulysses import UlyssesAttention

        group = mesh["sp"].get_group() if self.sp > 1 else None
        backend = "sdpa_of_4_51" if self.attention == "sdpa" else "sdpa"
        hf.use_attention(model, UlyssesAttention(group, backend, placement.evidence))
        if self.liger:
            published_stack.use_fused_kernels(model)
        if self.tile_mlp:
            published_stack.use_tiled_mlp(model)
        elif self.liger:
            published_stack.use_fused_mlp(model)

    def checkpoint(self, model: PreTrainedModel, placement: Placement) -> None:
        from alst_impl import published_stack

        published_stack.checkpoint_layers(model, placement, offload=self.offload)
