"""ALST: Ulysses sequence parallelism, sequence tiling, checkpoint offload (arXiv:2506.13996)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from alst_impl.config import TrainConfig
from alst_impl.methods.base import Method, check_sharded

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import DeviceMesh
    from transformers import PreTrainedModel

    from alst_impl.ops.offload import HostOffload
    from alst_impl.placement import Placement

LOGITS_TILE_BYTES = 2**30
"""fp32 logits of one loss tile (arXiv:2506.13996, section 3.1.2)."""


class Alst(Method):
    """Every part is an option, so that the paper's ablation is a sweep."""

    pins_checkpoints: ClassVar[bool] = True
    sp: int = Field(default=1, ge=1)
    """Sequence-parallel degree: ranks that share one sample."""
    tile_mlp: bool = True
    """Compute MLPs in tiles."""
    tile_norm: bool = True
    """Compute norms in tiles."""
    tile_loss: bool = True
    """Compute logits and loss in tiles."""
    tiles: int | None = Field(default=None, ge=1)
    """Tiles of everything tiled; None follows the paper: about `hidden_size` rows for MLP and norm,
    1 GiB of logits for the loss."""
    offload: bool = True
    """Keep checkpointed layer inputs in host memory."""
    overlap: bool = True
    """Copy them beside compute, through pinned memory; off, copies block, as in the released recipes."""

    def check(self, config: TrainConfig) -> None:
        check_sharded(config, self.sp, "alst")
        if self.offload and not config.checkpoint:
            raise ValueError(
                "offload moves checkpointed layer inputs, but checkpoint is false; set offload: false"
            )

    def axes(self, world_size: int) -> dict[str, int]:
        return {"dp": world_size // self.sp, "sp": self.sp}

    def promises(self, config: TrainConfig) -> set[str]:
        promised = {"local_seqlen"}
        if self.sp > 1:
            promised.add("exchanges")
        if self.tile_mlp or self.tile_norm or self.tile_loss:
            promised.add("tiles")
        if self.offload:
            promised.add("offloaded_bytes")
        return promised

    def apply(
        self, model: PreTrainedModel, config: TrainConfig, mesh: DeviceMesh, placement: Placement
    ) -> None:
        self.attach(model, mesh, placement, config.attention)

    def attach(
        self, model: PreTrainedModel, mesh: DeviceMesh, placement: Placement, attention: str
    ) -> None:
        """Sequence parallelism and tiling, in place; `attention` names the core attention."""
        from alst_impl import hf
        from alst_impl.ops.ulysses import UlyssesAttention

        group = mesh["sp"].get_group() if self.sp > 1 else None
        hf.use_attention(model, UlyssesAttention(group, attention, placement.evidence))
        tiles, evidence, vocab = self.tiles, placement.evidence, model.config.vocab_size

        def rows_of_hidden(x: Tensor) -> int:
            return tiles or -(-x.shape[1] // x.shape[2:].numel())

        def rows_of_logits(x: Tensor) -> int:
            return tiles or -(-x.shape[0] * x.shape[1] * vocab * 4 // LOGITS_TILE_BYTES)

        mlps, norms = hf.token_wise_modules(model)
        for module in (mlps if self.tile_mlp else []) + (norms if self.tile_norm else []):
            hf.tile_module(module, rows_of_hidden, evidence)
        if self.tile_loss:
            hf.tile_loss(model, rows_of_logits, evidence)

    def checkpoint(self, model: PreTrainedModel, placement: Placement) -> None:
        from alst_impl import hf

        hf.checkpoint_layers(model, self._host_offload(placement))

    def _host_offload(self, placement: Placement) -> HostOffload | None:
        from alst_impl.ops.offload import HostOffload

        return HostOffload(placement, overlap=self.overlap) if self.offload else None
