"""PyTorch's fully_shard: parameters, gradients and optimizer sharded over all ranks that hold the same layers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from alst_impl.engines.base import (
    Engine,
    Runtime,
    Setup,
    another_group,
    dtypes,
    load_distributed,
    optimizer_of,
    replicas,
    save_distributed,
    stages,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn
    from torch.autograd.graph import GradientEdge
    from torch.distributed import DeviceMesh
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor
    from transformers import PreTrainedModel


class FSDP2Runtime(Runtime):
    """A sharded model; gradients are summed, not averaged."""

    def __init__(self, setup: Setup, *, reduces_always: bool) -> None:
        """With `reduces_always`, no backward leaves whole gradients; otherwise they add up until a step's last one."""
        self.module = setup.model
        self.placement = setup.placement
        self.stages = stages(setup.mesh)
        trained = [p for p in setup.model.parameters() if p.requires_grad]
        self.optimizer = optimizer_of(trained, setup.config)
        self._max_norm = setup.config.optimizer.max_grad_norm
        self._reduces_always, self._left = reduces_always, 0

    def start_step(self, num_backwards: int) -> None:
        self._left = num_backwards

    def _backward(self, output: Tensor | GradientEdge, gradient: Tensor | None) -> None:
        import torch

        self._left -= 1
        reduces = self._reduces_always or self._left == 0
        cast("FSDPModule", self.module).set_requires_gradient_sync(reduces)
        torch.autograd.backward(output, gradient)

    def _update(self) -> Tensor:
        import torch
        from torch.distributed.tensor import DTensor

        parameters = [p for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        norm = self._norm_of_all_stages(norm)
        if self._max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self._max_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm.to(self.placement.device)

    def drop_gradients(self) -> None:
        self.optimizer.zero_grad()

    def _gradients(self) -> dict[str, Tensor]:
        return {
            name: cast("DTensor", p.grad).full_tensor().cpu()
            for name, p in self.module.named_parameters()
            if p.grad is not None
        }

    def _state_dict(self) -> dict[str, Tensor]:
        return {
            name: cast("DTensor", p.detach()).full_tensor().cpu()
            for name, p in self.module.named_parameters()
        }

    def save(self, folder: Path) -> None:
        save_distributed(self.module, self.optimizer, folder)

    def load(self, folder: Path) -> None:
        load_distributed(self.module, self.optimizer, folder)


class FSDP2(Engine):
    """One FSDP unit per decoder layer; embedding and head are units too, unless they share weights.

    Parameters of a unit that differ in dtype are gathered and reduced separately, each in its own dtype.
    """

    offload: bool = False
    """Keep shards of parameters, gradients and optimizer states in host memory, and update there.
    This is PyTorch's `CPUOffloadPolicy`. Every backward of a step then reduces its gradients, which else would add up on
    the device, unsharded."""

    @property
    def updates_on_host(self) -> bool:
        return self.offload

    @property
    def settles_at_once(self) -> bool:
        return self.offload

    def start(self, setup: Setup) -> Runtime:
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

        from alst_impl import hf

        model, mesh, device = setup.model, setup.mesh, setup.placement.device
        ranks = replicas(mesh, device)
        units: list[nn.Module] = [*hf.decoder_layers(model)]
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        # A pipeline stage has one of them, or neither.
        ends = [end for end in (embedding, head) if end is not None and [*end.parameters()]]
        placements = _placements(model, mesh, ranks)
        # Copies between pinned memory and a device are asynchronous.
        pinned = device.type != "cpu"
        policy = CPUOffloadPolicy(pin_memory=pinned) if self.offload else OffloadPolicy()
        untied = len({end.weight for end in ends}) == len(ends)
        if untied:
            units += ends
        for unit in [*units, model]:
            # Units are filled and sharded one by one, so a process holds its shards and one whole unit.
            setup.initializer.fill(model, unit, device)
            fully_shard(unit, mesh=ranks, shard_placement_fn=placements, offload_policy=policy)
            sharded = cast("FSDPModule", unit)
            # Gradients are summed over ranks: losses are divided by the global count already.
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)
        if untied and embedding in ends:
            # The backward of an embedding needs no weights.
            cast("FSDPModule", embedding).set_unshard_in_backward(False)
        return FSDP2Runtime(setup, reduces_always=self.offload)


def _placements(
    model: PreTrainedModel, mesh: DeviceMesh, ranks: DeviceMesh
) -> Callable[[nn.Parameter], Any] | None:
    """`shard_placement_fn` for one parameter group per dtype; None if there is one dtype. Collective.

    `fully_shard` makes one parameter group per process group. So each dtype other than the model's gets a
    process group of the same ranks. Raises `ValueError` if the installed PyTorch makes one group for all
    dtypes.
    """
    others = dtypes(model)[1:]
    if not others:
        return None
    import torch

    try:
        from torch.distributed.fsdp._fully_shard._fsdp_common import (
            FSDPMeshInfo,
            ShardPlacementResult,
        )
    except ImportError:
        raise ValueError(
            f"{type(model).__name__} has parameters of dtype {model.dtype} and {others}, which "
            f"fully_shard of torch {torch.__version__} cannot shard; use torch 2.13, or engine 'zero'"
        ) from None
    infos = {dtype: FSDPMeshInfo(mesh=ranks, shard_mesh_dim=0) for dtype in others}
    for info in infos.values():
        info.shard_process_group = another_group(mesh)

    def place(parameter: nn.Parameter) -> Any:
        info = infos.get(parameter.dtype)
        return None if info is None else ShardPlacementResult(placement=None, mesh_info=info)

    return place
