"""The interface of an engine: a frozen description that starts a runtime."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from alst_impl.config import Frozen, Spec, TrainConfig
from alst_impl.plugin import load

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.autograd.graph import GradientEdge
    from torch.distributed import DeviceMesh, ProcessGroup
    from transformers import PreTrainedModel

    from alst_impl.data import Batch
    from alst_impl.models.weights import Initializer
    from alst_impl.placement import Placement


class Runtime(ABC):
    """A model under an engine, ready for steps.

    Losses passed to `backward` are summed: after the last `backward` of a step, gradients are those of the
    *sum* over ranks and micro-batches. No engine averages.
    """

    module: nn.Module
    """The module that forward calls: the engine's wrapper if it has one."""
    placement: Placement
    optimizer: torch.optim.Optimizer
    """PyTorch's optimizer over this rank's shards."""
    stages: ProcessGroup | None = None
    """Process group of this rank's pipeline; None if every rank holds all layers."""

    def forward(self, batch: Batch, num_valid: Tensor) -> Tensor:
        """This rank's sum of token losses divided by `num_valid`, a scalar with a graph."""
        from alst_impl.ops import draws

        self.placement.on_phase("forward")
        inputs = batch.model_inputs()
        with draws.of_rank(batch.layout, num_valid.device):
            output = self.module(**inputs, num_items_in_batch=num_valid, use_cache=False)
        # The output object keeps the logits alive; only the loss leaves this frame.
        loss: Tensor = output.loss
        return loss

    def backward(self, output: Tensor | GradientEdge, gradient: Tensor | None = None) -> None:
        """Accumulate the gradients of a loss, or of another output with its `gradient`. Collective."""
        self.placement.on_phase("backward")
        self._backward(output, gradient)

    def update(self) -> Tensor:
        """Finish the gradients, clip, take the optimizer step, clear gradients. Collective.

        Returns the global gradient norm before clipping (fp32 scalar).
        """
        self.placement.on_phase("update")
        return self._update()

    def gradients(self) -> dict[str, Tensor]:
        """Unsharded gradients by parameter name, on the host. Collective.

        Valid between the last `backward` of a step and `update`. Tied parameters appear once.
        """
        return self._of_all_stages(self._gradients())

    def state_dict(self) -> dict[str, Tensor]:
        """Unsharded parameters by name, on the host, as `save_pretrained` takes them. Collective."""
        return self._of_all_stages(self._state_dict())

    def _of_all_stages(self, of_stage: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gather the tensors of all pipeline stages, by name. Collective over `stages`."""
        import torch.distributed as dist

        if self.stages is None:
            return of_stage
        found: list[Any] = [None] * self.stages.size()
        dist.all_gather_object(found, of_stage, group=self.stages)
        return {name: tensor for each in found for name, tensor in each.items()}

    def _norm_of_all_stages(self, norm: Tensor) -> Tensor:
        """Norm over the layers of all pipeline stages, from this stage's norm. Collective over `stages`."""
        import torch.distributed as dist

        if self.stages is None:
            return norm
        square = norm.square()
        dist.all_reduce(square, group=self.stages)
        return square.sqrt()

    @abstractmethod
    def _backward(self, output: Tensor | GradientEdge, gradient: Tensor | None) -> None: ...

    @abstractmethod
    def _update(self) -> Tensor: ...

    @abstractmethod
    def start_step(self, num_backwards: int) -> None:
        """Announce how many `backward` calls make one step."""

    @abstractmethod
    def drop_gradients(self) -> None:
        """End a step without an update: clear its gradients."""

    @abstractmethod
    def _gradients(self) -> dict[str, Tensor]: ...

    @abstractmethod
    def _state_dict(self) -> dict[str, Tensor]: ...

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write parameters and optimizer states to `folder`, which all ranks can access. Collective.

        Call it between two steps. It writes the format of the engine's framework, which can be loaded with
        any number of ranks, sp and pp.
        """

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Load what `save` of the same engine wrote, with any number of ranks, sp and pp. Collective."""


@dataclass(frozen=True)
class Setup:
    """What an engine starts with."""

    model: PreTrainedModel
    """On the meta device, with the method applied."""
    initializer: Initializer
    """Fills the model with weights."""
    config: TrainConfig
    mesh: DeviceMesh
    placement: Placement
    mpu: ModuleType | None
    """The method's parallel state (`Method.mpu`)."""


class Engine(Frozen):
    """Owner of parameters, gradients and optimizer; its options are its fields."""

    @property
    def updates_on_host(self) -> bool:
        """Whether optimizer states are in host memory, so that the update uses no device memory."""
        return False

    @property
    def settles_at_once(self) -> bool:
        """Whether the first step needs as much device memory as later ones.

        It does if it leaves no optimizer states on the device and records nothing for later steps.
        """
        return False

    @property
    def updates_in_backward(self) -> bool:
        """Whether parameters are updated during a step's only backward, so that no gradient remains after it."""
        return False

    def require(self) -> None:
        """Raise `ValueError`, naming the extra, if a package that `start` needs is not installed."""

    def check(self, config: TrainConfig) -> None:
        """Raise `ValueError` for settings that cannot work. The message gives the values, the rule and the fix."""

    @abstractmethod
    def start(self, setup: Setup) -> Runtime:
        """Shard the model, fill it with weights, make the optimizer. Collective."""
        raise AssertionError("every engine defines start")


def replicas(mesh: DeviceMesh, device: torch.device) -> DeviceMesh:
    """Mesh of one axis over the ranks that hold the same layers as this one. Collective."""
    from torch.distributed.device_mesh import init_device_mesh

    if stages(mesh) is None:
        return init_device_mesh(device.type, (mesh.size(),), mesh_dim_names=("replicas",))
    pp = mesh["pp"].size()
    shape, names = (pp, mesh.size() // pp), ("pp", "replicas")
    return init_device_mesh(device.type, shape, mesh_dim_names=names)["replicas"]


def another_group(mesh: DeviceMesh) -> ProcessGroup:
    """A new process group over the ranks of `replicas`. Collective."""
    import torch.distributed as dist

    size = mesh.size() // (1 if stages(mesh) is None else mesh["pp"].size())
    ranks = [list(range(first, first + size)) for first in range(0, mesh.size(), size)]
    group: ProcessGroup = dist.new_subgroups_by_enumeration(ranks)[0]
    return group


def stages(mesh: DeviceMesh) -> ProcessGroup | None:
    """Process group of this rank's pipeline; None without a pipeline."""
    axes = mesh.mesh_dim_names or ()
    if "pp" not in axes or mesh["pp"].size() == 1:
        return None
    assert axes[0] == "pp", "stages are far apart, replicas side by side: pp is outermost"
    return mesh["pp"].get_group()


def dtypes(model: PreTrainedModel) -> list[torch.dtype]:
    """Dtypes of the model's parameters, `model.dtype` first; several if some parameters are kept in fp32."""
    held = dict.fromkeys(p.dtype for p in model.parameters())
    return sorted(held, key=lambda dtype: dtype != model.dtype)


def optimizer_of(
    parameters: list[nn.Parameter] | list[dict[str, Any]], config: TrainConfig
) -> torch.optim.Optimizer:
    """The optimizer of every engine. `foreach` is off, so each parameter's temporaries are freed at once.

    Takes parameters, or PyTorch's groups of them.
    """
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
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    # Flat: each rank adds the entries of its own parameters, whichever layers it holds.
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    model, states = get_state_dict(module, optimizer, options=flat)
    checkpoint.save({"model": model, "optimizer": states}, checkpoint_id=folder)


def load_distributed(module: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """`Runtime.load` of what `save_distributed` wrote. Collective."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_state_dict,
        set_state_dict,
    )

    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    model, states = get_state_dict(module, optimizer, options=flat)
    state: dict[str, Any] = {"model": model, "optimizer": states}
    checkpoint.load(
        state, checkpoint_id=folder
    )  # fills the tensors that are there, replaces the rest
    set_state_dict(
        module,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=flat,
    )


def load_engine(spec: Spec) -> Engine:
    """The engine that `spec` names."""
    return load("alst_impl.engines", Engine, spec)
