"""PyTorch alone: every rank holds all its layers, gradients are summed over all that hold the same."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from alst_impl.config import TrainConfig
from alst_impl.engines.base import (
    Engine,
    Runtime,
    load_distributed,
    optimizer_of,
    replicas,
    save_distributed,
    stages,
)

if TYPE_CHECKING:
    from torch import Tensor
    from torch.autograd.graph import GradientEdge
    from torch.distributed import DeviceMesh
    from transformers import PreTrainedModel

    from alst_impl.models import Initializer
    from alst_impl.placement import Placement


class PlainRuntime(Runtime):
    """Replicated parameters, one all-reduce per gradient after the last micro-batch."""

    def __init__(
        self, model: PreTrainedModel, config: TrainConfig, mesh: DeviceMesh, placement: Placement
    ) -> None:
        self.module = model
        self.placement = placement
        self.stages = stages(mesh)
        self._replicas = replicas(mesh, placement.device).get_group()
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = optimizer_of(self._parameters, config)
        self._max_norm = config.optimizer.max_grad_norm
        self._left = 0

    def start_step(self, num_backwards: int) -> None:
        self._left = num_backwards

    def _backward(self, output: Tensor | GradientEdge, gradient: Tensor | None) -> None:
        import torch
        import torch.distributed as dist

        torch.autograd.backward(output, gradient)
        self._left -= 1
        if self._left == 0:
            for parameter in self._parameters:
                if parameter.grad is None:  # unused here, perhaps not on another rank
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad, group=self._replicas)

    def _update(self) -> Tensor:
        import torch

        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in self._parameters if p.grad is not None]
        )
        norm = self._norm_of_all_stages(norm)
        if self._max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self._max_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def drop_gradients(self) -> None:
        self.optimizer.zero_grad()

    def _gradients(self) -> dict[str, Tensor]:
        return {
            name: p.grad.detach().cpu()
            for name, p in self.module.named_parameters()
            if p.grad is not None
        }

    def _state_dict(self) -> dict[str, Tensor]:
        return {name: p.detach().cpu() for name, p in self.module.named_parameters()}

    def save(self, folder: Path) -> None:
        save_distributed(self.module, self.optimizer, folder)

    def load(self, folder: Path) -> None:
        load_distributed(self.module, self.optimizer, folder)


class Plain(Engine):
    """No options: the reference of the other engines."""

    def start(
        self,
        model: PreTrainedModel,
        initializer: Initializer,
        config: TrainConfig,
        mesh: DeviceMesh,
        placement: Placement,
        mpu: ModuleType | None = None,
    ) -> Runtime:
        initializer.fill(model, model, placement.device)
        return PlainRuntime(model, config, mesh, placement)
