"""Plain PyTorch: every rank holds its layers whole, and gradients are summed over ranks with the same layers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from alst_impl.config import TrainConfig
from alst_impl.engines.base import (
    Engine,
    Runtime,
    Setup,
    load_distributed,
    optimizer_of,
    replicas,
    save_distributed,
    stages,
)

if TYPE_CHECKING:
    from torch import Tensor
    from torch.autograd.graph import GradientEdge
    from torch.optim import Optimizer


WAY_OUT = "use update_in_backward: false"


class PlainRuntime(Runtime):
    """Replicated parameters, one all-reduce per gradient after the last micro-batch."""

    def __init__(self, setup: Setup) -> None:
        self.module = setup.model
        self.placement = setup.placement
        self.stages = stages(setup.mesh)
        self._replicas = replicas(setup.mesh, setup.placement.device).get_group()
        self._parameters = [p for p in setup.model.parameters() if p.requires_grad]
        self.optimizer = optimizer_of(self._parameters, setup.config)
        self._max_norm = setup.config.optimizer.max_grad_norm
        self._left = 0

    def start_step(self, num_backwards: int) -> None:
        self._left = num_backwards

    def _backward(self, output: Tensor | GradientEdge, gradient: Tensor | None) -> None:
        import torch

        torch.autograd.backward(output, gradient)
        self._left -= 1
        if self._left == 0:
            for parameter in self._parameters:
                self._sum(parameter)

    def _sum(self, parameter: Tensor) -> None:
        """All-reduce the parameter's gradient over its replicas, in place; a missing one counts as zero. Collective."""
        import torch
        import torch.distributed as dist

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


class InBackwardRuntime(PlainRuntime):
    """Each parameter has its own optimizer, which updates it as soon as its gradient is complete.

    The gradient is then summed over ranks, used and freed, so there is one at a time. Within one backward,
    autograd adds up all contributions to a parameter, tied or tiled, before its hook fires. Ranks run the
    same operations in the same order, so hooks fire in the same order on all of them.
    """

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._own: dict[Tensor, Optimizer] = {
            p: optimizer_of([p], setup.config) for p in self._parameters
        }
        self._share()
        self._norms: dict[Tensor, Tensor] = {}
        """Gradient norms of the parameters that this step has updated."""
        for parameter in self._parameters:
            parameter.register_post_accumulate_grad_hook(self._finish)

    def _share(self) -> None:
        """Make each parameter's optimizer share the states and settings of `optimizer`."""
        (group,) = self.optimizer.param_groups
        for parameter, own in self._own.items():
            own.state = self.optimizer.state
            own.param_groups = [{**group, "params": [parameter]}]

    def start_step(self, num_backwards: int) -> None:
        if num_backwards > 1:
            raise ValueError(
                f"update_in_backward updates in the first backward, but this step has {num_backwards}; {WAY_OUT}"
            )

    def _backward(self, output: Tensor | GradientEdge, gradient: Tensor | None) -> None:
        import torch

        torch.autograd.backward(output, gradient)
        unused = [p for p in self._parameters if p not in self._norms]
        if unused and self._replicas.size() > 1:
            raise ValueError(
                f"parameter '{self._name(unused[0])}' has no gradient on this rank, so that ranks may have "
                f"summed gradients of different parameters under update_in_backward; {WAY_OUT}"
            )
        for parameter in unused:
            self._finish(parameter)

    def _finish(self, parameter: Tensor) -> None:
        """Update `parameter` and free its gradient. Collective."""
        import torch

        from alst_impl.ops.memory.tiling import accumulation_dtype

        if parameter in self._norms:
            raise ValueError(
                f"parameter '{self._name(parameter)}' gets its gradient in several passes, but "
                f"update_in_backward updates it after the first; {WAY_OUT}"
            )
        self._sum(parameter)
        assert parameter.grad is not None, "just summed"
        wide = accumulation_dtype(parameter)
        self._norms[parameter] = torch.linalg.vector_norm(parameter.grad, dtype=wide)
        self._own[parameter].step()
        parameter.grad = None

    def _name(self, parameter: Tensor) -> str:
        return next(name for name, p in self.module.named_parameters() if p is parameter)

    def _update(self) -> Tensor:
        import torch

        # In parameter order, so the norm equals that of the usual update to the bit.
        norms = torch.stack([self._norms[p] for p in self._parameters])
        self._norms.clear()
        return self._norm_of_all_stages(torch.linalg.vector_norm(norms))

    def drop_gradients(self) -> None:
        raise ValueError(
            f"a step without an update is impossible under update_in_backward; {WAY_OUT}"
        )

    def _gradients(self) -> dict[str, Tensor]:
        raise ValueError(f"gradients are gone after backward under update_in_backward; {WAY_OUT}")

    def load(self, folder: Path) -> None:
        super().load(folder)
        self._share()  # loading puts others in their place


class Plain(Engine):
    """The reference for the other engines."""

    update_in_backward: bool = False
    """Update each parameter in backward as soon as its gradient is complete, then free the gradient.
    This is PyTorch's "optimizer step in backward", as measured in arXiv:2407.15892, appendix D. Gradients
    cannot be read afterwards."""

    @property
    def updates_in_backward(self) -> bool:
        return self.update_in_backward

    def check(self, config: TrainConfig) -> None:
        if not self.update_in_backward:
            return
        if config.accumulation > 1:
            raise ValueError(
                f"update_in_backward updates in every backward, but accumulation is {config.accumulation}; "
                f"set accumulation: 1, or {WAY_OUT}"
            )
        if config.optimizer.max_grad_norm is not None:
            raise ValueError(
                "clipping needs the norm of all gradients before the first update, but update_in_backward "
                f"updates before it is known (max_grad_norm={config.optimizer.max_grad_norm}); "
                f"leave max_grad_norm out, or {WAY_OUT}"
            )

    def start(self, setup: Setup) -> Runtime:
        setup.initializer.fill(setup.model, setup.model, setup.placement.device)
        runtime = InBackwardRuntime if self.update_in_backward else PlainRuntime
        return runtime(setup)
