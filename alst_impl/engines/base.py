"""The interface of an engine: a frozen description that starts a runtime."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from alst_impl.config import Frozen, Spec, TrainConfig
from alst_impl.plugin import load

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.distributed import DeviceMesh
    from transformers import PreTrainedModel

    from alst_impl.data import Batch
    from alst_impl.models import Initializer
    from alst_impl.placement import Placement


class Runtime(ABC):
    """A model under an engine, ready for steps.

    Losses handed to `backward` are addends: after the last `backward` of a step, gradients are
    those of the *sum* over ranks and micro-batches. No engine averages.
    """

    module: nn.Module
    """What is called in forward: the engine's wrapper where it has one."""
    placement: Placement

    def forward(self, batch: Batch, num_valid: Tensor) -> Tensor:
        """This rank's sum of token losses divided by `num_valid`, a scalar with a graph."""
        self.placement.on_phase("forward")
        output = self.module(**batch.model_inputs(), num_items_in_batch=num_valid, use_cache=False)
        # The output object keeps the logits alive; only the loss leaves this frame.
        loss: Tensor = output.loss
        return loss

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of `loss`. Collective."""
        self.placement.on_phase("backward")
        self._backward(loss)

    def update(self) -> Tensor:
        """Finish the gradients, clip, take the optimizer step, clear gradients. Collective.

        Returns the global gradient norm before clipping (fp32 scalar).
        """
        self.placement.on_phase("update")
        return self._update()

    @abstractmethod
    def _backward(self, loss: Tensor) -> None: ...

    @abstractmethod
    def _update(self) -> Tensor: ...

    @abstractmethod
    def start_step(self, num_micro_batches: int) -> None:
        """Announce how many `backward` calls make one step."""

    @abstractmethod
    def gradients(self) -> dict[str, Tensor]:
        """Whole gradients by the model's parameter names, on the host. Collective.

        Valid between the last `backward` of a step and `update`. Tied parameters appear once.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """Whole parameters by the model's names, on the host, as `save_pretrained` takes them. Collective."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write parameters and optimizer to `folder`, which all ranks see, between two steps.

        In the format of the engine's framework that any number of ranks and any sp can read. Collective.
        """

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Go on from what `save` of the same engine wrote, whatever its ranks and sp were. Collective."""


class Engine(Frozen):
    """Owner of parameters, gradients and optimizer; its options are its fields."""

    def check(self, config: TrainConfig) -> None:
        """Raise `ValueError` for settings that cannot work: the values, the rule, the way out."""

    @abstractmethod
    def start(
        self,
        model: PreTrainedModel,
        initializer: Initializer,
        config: TrainConfig,
        mesh: DeviceMesh,
        placement: Placement,
        mpu: ModuleType | None = None,
    ) -> Runtime:
        """Shard `model` (on the meta device), fill it with weights, make the optimizer. Collective."""
        raise AssertionError("every engine defines start")


def optimizer_of(parameters: list[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of every engine; `foreach` off, so that each parameter's update is freed at once."""
    import torch

    o = config.optimizer
    if o.name == "sgd":
        return torch.optim.SGD(
            parameters, lr=o.learning_rate, weight_decay=o.weight_decay, foreach=False
        )
    return torch.optim.AdamW(
        parameters,
        lr=o.learning_rate,
        betas=o.betas,
        eps=o.eps,
        weight_decay=o.weight_decay,
        foreach=False,
    )


def save_distributed(module: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """`Runtime.save` in the format of `torch.distributed.checkpoint`. Collective."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model, states = get_state_dict(module, optimizer)
    checkpoint.save({"model": model, "optimizer": states}, checkpoint_id=folder)


def load_distributed(module: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """`Runtime.load` of what `save_distributed` wrote. Collective."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, states = get_state_dict(module, optimizer)
    state: dict[str, Any] = {"model": model, "optimizer": states}
    checkpoint.load(
        state, checkpoint_id=folder
    )  # fills the tensors that are there, replaces the rest
    set_state_dict(
        module, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )


def load_engine(spec: Spec) -> Engine:
    """The engine that `spec` names."""
    # Pydantic makes every subclass concrete or fails; mypy cannot see that `load` returns one.
    return load("alst_impl.engines", Engine, spec)  # type: ignore[type-abstract]
