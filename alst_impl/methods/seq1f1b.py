"""Seq1F1B: a pipeline over layers whose unit of work is a slice of the sequence (arXiv:2406.03488)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from alst_impl.config import TrainConfig
from alst_impl.engines.base import load_engine
from alst_impl.layout import Layout
from alst_impl.methods.base import Method, check_flash_by_name, check_rotary, divisors
from alst_impl.methods.layerwise import LOSS_ROWS
from alst_impl.models import described, field, unsupported, window
from alst_impl.ops.pipeline.schedule import equal_flops, equal_lengths

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import DeviceMesh
    from transformers import PreTrainedModel

    from alst_impl.data import Batch
    from alst_impl.engines.base import Runtime
    from alst_impl.ops.pipeline.executor import Pipeline
    from alst_impl.placement import Placement


class Seq1F1B(Method):
    """1F1B with sequence slices as units of work; with one slice it is plain 1F1B."""

    pp: int = Field(default=1, ge=1)
    """Number of pipeline stages; each holds consecutive layers."""
    slices: int = Field(default=4, ge=1)
    """Number of slices of each sequence."""
    split: Literal["flops", "length"] = "flops"
    """Slices of equal FLOPs ("computation-wise" in the paper), or of equal length."""
    tile_loss: bool = False
    """Compute logits and loss in tiles.
    False keeps the logits of all slices on the last stage until their backward, as in the paper."""

    def check(self, config: TrainConfig) -> None:
        fields = described(config.model, config.overrides)
        layers = field(fields, "num_hidden_layers")
        if config.world_size % self.pp:
            raise ValueError(
                f"pp ({self.pp}) must divide world_size ({config.world_size}) for method 'seq1f1b'; "
                f"use pp in {divisors(config.world_size)}"
            )
        if self.pp > layers:
            raise ValueError(
                f"pp ({self.pp}) is more than the {layers} layers of '{config.model}', and a stage needs "
                f"one; use pp up to {layers}"
            )
        if self.slices > config.seqlen:
            raise ValueError(
                f"slices ({self.slices}) is more than seqlen ({config.seqlen}), and a slice needs a token; "
                f"use slices up to {config.seqlen}"
            )
        if config.engine.name == "zero":
            raise ValueError(
                "engine 'zero' runs one backward per forward on all ranks, but stages of method 'seq1f1b' hold "
                "different layers and slices of a sample wait for each other; use engine 'plain' or 'fsdp2'"
            )
        if self.slices > 1 and load_engine(config.engine).updates_in_backward:
            raise ValueError(
                f"slices ({self.slices}) accumulate gradients over as many backward passes, but engine "
                f"'{config.engine.name}' updates in the first (update_in_backward); use slices: 1 or "
                "update_in_backward: false"
            )
        reason = unsupported(fields)
        if reason:
            raise ValueError(
                f"model '{config.model}' has {reason}, which method 'seq1f1b' cannot split exactly; use "
                "method 'baseline'"
            )
        if self.slices > 1:
            check_flash_by_name(config, "seq1f1b")
        check_rotary(fields, "slices", self.slices, config.model)
        self._check_model(config, fields)

    def _check_model(self, config: TrainConfig, fields: dict[str, Any]) -> None:
        if self.pp > 1 and fields.get("tie_word_embeddings"):
            raise ValueError(
                f"model '{config.model}' ties its embeddings (tie_word_embeddings=True), which the first "
                "and the last stage would share; use pp: 1 or override tie_word_embeddings: false"
            )
        visible = window(fields)
        if self.slices > 1 and visible is not None and visible < config.seqlen:
            raise ValueError(
                f"model '{config.model}' has a sliding window ({visible}) shorter than seqlen "
                f"({config.seqlen}), which attention over slices does not support; use slices: 1"
            )

    def layout(self, length: int) -> Layout:
        return Layout(length, pp=self.pp)

    def promises(self, config: TrainConfig) -> set[str]:
        return {"local_seqlen", "slices"}

    def apply(
        self, model: PreTrainedModel, config: TrainConfig, mesh: DeviceMesh, placement: Placement
    ) -> None:
        from alst_impl import hf
        from alst_impl.ops.attention.cores.base import load_core
        from alst_impl.ops.pipeline.executor import Pipeline, links
        from alst_impl.ops.pipeline.sliced import SliceAttention

        others = hf.mixers(model) if self.slices > 1 else []
        if others:
            raise ValueError(
                f"{type(others[0]).__name__} mixes tokens otherwise than by attention, which slices would cut apart; "
                "use slices: 1"
            )
        stage = mesh.get_local_rank("pp") if self.pp > 1 else 0
        layers = hf.decoder_layers(model)
        # Counts every expert as used. This affects only how well slices are balanced.
        per_token = 2 * sum(p.numel() for p in layers[0].parameters())
        if self.tile_loss and stage == self.pp - 1:
            hf.tile_loss(model, lambda x: -(-x.shape[1] // LOSS_ROWS), placement.evidence)
        hf.keep_stage(model, layers_of(stage, self.pp, len(layers)))
        core = load_core(config.attention)
        if self.slices > 1:
            core.activate()
        attentions = [SliceAttention(core) for _ in hf.attention_modules(model)]
        hf.use_attentions(model, attentions)
        ahead, back = links(mesh) if self.pp > 1 else (None, None)
        vars(model)["pipeline"] = Pipeline(
            stage=stage,
            num_stages=self.pp,
            slices=self.slices,
            attentions=attentions,
            borders=partial(self.borders, per_token, described(config.model, config.overrides)),
            ahead=ahead,
            back=back,
            hidden_size=model.config.hidden_size,
            dtype=model.dtype,
        )

    def borders(self, per_token: float, fields: dict[str, Any], seqlen: int) -> list[int]:
        """Slice boundaries of a sequence of `seqlen` tokens: 0, ..., S.

        `per_token` is a layer's FLOPs per token without attention.
        """
        if self.split == "length":
            return equal_lengths(seqlen, self.slices)
        heads = field(fields, "num_attention_heads")
        head_dim = fields.get("head_dim") or field(fields, "hidden_size") // heads
        return equal_flops(seqlen, self.slices, per_token, 4 * heads * head_dim)

    def forward_backward(self, runtime: Runtime, batches: list[Batch], num_valid: Tensor) -> Tensor:
        module: Any = runtime.module
        pipeline: Pipeline = module.pipeline
        return pipeline.run(runtime, batches, num_valid)

    def loss(self, runtime: Runtime, batches: list[Batch], num_valid: Tensor) -> Tensor:
        if self.pp == 1:
            return super().loss(runtime, batches, num_valid)
        raise ValueError(
            f"method 'seq1f1b' at pp={self.pp} cannot evaluate: its pipeline has no forward-only pass; load its "
            "weights into method 'alst'"
        )


def layers_of(stage: int, num_stages: int, num_layers: int) -> range:
    """The consecutive layers of `stage`. Stages differ by at most one layer."""
    return range(num_layers * stage // num_stages, num_layers * (stage + 1) // num_stages)
