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
    """Stock training, whole samples on each rank, with MLP and head in mini-sequences.

    Mini-sequences cover every token; the last one may be shorter. Layers are checkpointed by transformers.
    """

    tiles: int | None = Field(default=None, ge=1)
    """Number of mini-sequences of every MLP and of the head.
    None follows the paper: `hidden_size` tokens per mini-sequence for an MLP (sections 3.4 and 5.2), and
    vocabulary size over `hidden_size` mini-sequences for the head (section 5.2)."""
    recompute: bool = True
    """Recompute an MLP's mini-sequences one by one in backward, and sum its parameter gradients in fp32.
    False keeps the activations of all mini-sequences for backward and sums in the parameters' dtype, as
    released (minis/mini_sequence.py at 797c54b in wdlctc/mini-s)."""

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
