"""Mini-Sequence Transformer: MLP and head in mini-sequences, recomputed in backward (arXiv:2407.15892)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from alst_impl.config import TrainConfig
from alst_impl.methods.baseline import Baseline

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import DeviceMesh
    from transformers import PreTrainedModel

    from alst_impl.placement import Placement


class Mst(Baseline):
    """Stock training on one device, or a whole sample on each, but for what grows widest.

    Mini-sequences hold every token, the last one shorter; layers are checkpointed as transformers does it.
    """

    tiles: int | None = Field(default=None, ge=1)
    """Mini-sequences of every MLP and of the head. None follows the paper: `hidden_size` tokens for an MLP
    (sections 3.4 and 5.2), vocabulary over `hidden_size` mini-sequences for the head (section 5.2)."""
    recompute: bool = True
    """Recompute the mini-sequences of an MLP one by one in backward, gradients of its parameters adding up
    in fp32. False keeps what all of them hold until backward has been through, and adds up in the parameters'
    dtype: as released (minis/mini_sequence.py at 797c54b in wdlctc/mini-s)."""

    def promises(self, config: TrainConfig) -> set[str]:
        return {"local_seqlen", "tiles"}

    def apply(
        self, model: PreTrainedModel, config: TrainConfig, mesh: DeviceMesh, placement: Placement
    ) -> None:
        from alst_impl import hf

        super().apply(model, config, mesh, placement)
        tiles, evidence = self.tiles, placement.evidence
        widening = -(-model.config.vocab_size // model.config.hidden_size)

        def of_mlp(x: Tensor) -> int:
            return tiles or -(-x.shape[1] // x.shape[2])

        def of_head(x: Tensor) -> int:
            return tiles or widening

        mlps, _ = hf.token_wise_modules(model)
        for mlp in mlps:
            hf.tile_module(mlp, of_mlp, evidence, recompute=self.recompute)
        hf.tile_loss(model, of_head, evidence)
