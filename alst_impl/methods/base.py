"""The interface of a method. Torch is imported inside functions: `check` runs while sweeps expand."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

from alst_impl.config import Frozen, Precision, Spec, TrainConfig
from alst_impl.models import field, published, unsupported
from alst_impl.plugin import load

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import DeviceMesh
    from transformers import PreTrainedModel

    from alst_impl.data import Batch
    from alst_impl.engines.base import Runtime
    from alst_impl.placement import Placement


AXES = ("dp", "pp", "cp", "sp")
"""Every axis that a mesh may have: data, pipeline, context (ring) and sequence (Ulysses) parallel."""


class Method(Frozen):
    """A way to train; its options are its fields."""

    simulation_only: ClassVar[bool] = False
    """Whether it computes nothing and runs on fake tensors alone."""
    pins_checkpoints: ClassVar[bool] = False
    """Whether what it offloads lies in pinned memory on a GPU's host."""

    recomputes_layers: ClassVar[bool] = True
    """Whether each layer runs forward, forward again, and backward once, as in published runs."""

    def check(self, config: TrainConfig) -> None:
        """Raise `ValueError` for settings that cannot work: the values, the rule, the way out."""

    def axes(self, world_size: int) -> dict[str, int]:
        """Mesh axes of `world_size` ranks, outermost first: always `dp` and `sp`, others where used.

        `pp` cuts the layers, `cp` and `sp` the sequence; the ranks of `dp` see other samples.
        """
        return {"dp": world_size, "sp": 1}

    def degrees(self, world_size: int) -> dict[str, int]:
        """`axes` with the axes that the method does not have: of degree 1."""
        return {**dict.fromkeys(AXES, 1), **self.axes(world_size)}

    def local_seqlen(self, config: TrainConfig) -> int:
        """Tokens of one sample that a rank's decoder sees, after padding."""
        return -(-config.seqlen // self.degrees(config.world_size)["sp"])

    def shard(self, batch: Batch, mesh: DeviceMesh) -> Batch:
        """This rank's part of `batch`: padded right to a multiple of sp, cut along the sequence."""
        from alst_impl.data import shard_sequence

        sp = mesh["sp"]
        return shard_sequence(batch, sp.size(), sp.get_local_rank())

    def apply(
        self, model: PreTrainedModel, config: TrainConfig, mesh: DeviceMesh, placement: Placement
    ) -> None:
        """Change `model` in place, before checkpointing and the engine's sharding."""

    def checkpoint(self, model: PreTrainedModel, placement: Placement) -> None:
        """Turn on activation checkpointing of the decoder layers."""
        from alst_impl import hf

        hf.stock_checkpointing(model, use_reentrant=False)

    def promises(self, config: TrainConfig) -> set[str]:
        """Counters of `Evidence` that must be non-zero after a step, or the method did nothing."""
        return set()

    def precision(self, config: TrainConfig) -> Precision:
        """The coarsest format that gradients depend on: of an exact method, the run's dtype."""
        return config.dtype

    def mpu(self) -> ModuleType | None:
        """Parallel state for engines that take one (Megatron's protocol); usually none."""
        return None

    def forward_backward(self, runtime: Runtime, batches: list[Batch], num_valid: Tensor) -> Tensor:
        """Gradients of all micro-batches of a step into the engine.

        `batches` are local. `num_valid` (int64 scalar) counts valid labels over all ranks and
        micro-batches of the step. Returns this rank's addend to the global mean loss: the sum over
        ranks is the loss. Collective.
        """
        import torch

        losses = [self.micro_step(runtime, batch, num_valid) for batch in batches]
        return torch.stack(losses).sum()

    def micro_step(self, runtime: Runtime, batch: Batch, num_valid: Tensor) -> Tensor:
        """Gradients of one micro-batch; of methods whose micro-batches follow each other. Collective."""
        loss = runtime.forward(batch, num_valid)
        runtime.backward(loss)
        return loss.detach()


def divisors(n: int) -> list[int]:
    """All divisors of `n`, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


def check_sharded(config: TrainConfig, sp: int, method: str) -> None:
    """Raise `ValueError` unless ranks and heads split over `sp` and sharding is exact for the model."""
    if config.world_size % sp:
        raise ValueError(
            f"sp ({sp}) must divide world_size ({config.world_size}) for method '{method}'; "
            f"use sp in {divisors(config.world_size)}"
        )
    check_shardable(published(config.model, config.overrides), sp, method, config.model)


def check_shardable(fields: dict[str, Any], sp: int, method: str, model: str) -> None:
    """Raise `ValueError` unless a model with configuration `fields` can be sharded exactly over `sp`."""
    heads = field(fields, "num_attention_heads")
    if heads % sp:
        raise ValueError(
            f"num_attention_heads ({heads}) must be divisible by sp ({sp}) for method '{method}'; "
            f"use sp in {divisors(heads)}"
        )
    reason = unsupported(fields)
    if reason:
        raise ValueError(
            f"model '{model}' has {reason}, which method '{method}' cannot shard exactly; "
            "use method 'baseline'"
        )


def load_method(spec: Spec) -> Method:
    """The method that `spec` names."""
    return load("alst_impl.methods", Method, spec)
