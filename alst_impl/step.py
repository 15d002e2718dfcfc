"""The training step of the repository, and the functions that set it up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import DeviceMesh
from transformers import PreTrainedModel

from alst_impl.config import TrainConfig
from alst_impl.data import Batch, Corpus
from alst_impl.engines.base import Runtime, Setup, load_engine
from alst_impl.methods.base import Method, check_method, load_method
from alst_impl.models import build
from alst_impl.models.weights import Initializer
from alst_impl.ops.attention.cores.base import load_core
from alst_impl.placement import Placement


@dataclass(frozen=True)
class StepResult:
    """Scalars on the compute device, equal on every rank."""

    loss: Tensor
    """Mean loss over all valid labels of the step, fp32 or wider."""
    grad_norm: Tensor
    """Global L2 norm of the gradient before clipping."""


def check(config: TrainConfig) -> None:
    """Raise `ValueError` if method or engine cannot run `config`."""
    load_core(config.attention)
    check_method(config)
    load_engine(config.engine).check(config)


def start(
    config: TrainConfig,
    mesh: DeviceMesh,
    placement: Placement,
    initializer: Initializer | None = None,
) -> tuple[Method, Runtime]:
    """Build the model, apply the method, turn on checkpointing, start the engine, in this order. Collective.

    `initializer` replaces the one that `config.seed` gives.
    """
    method, engine = load_method(config.method), load_engine(config.engine)
    model, seeded = build(config)
    initializer = initializer or seeded
    method.apply(model, config, mesh, placement)
    if config.checkpoint:
        method.checkpoint(model, placement)
    _refuse_hooks(model, config.method.name)
    model.train()
    setup = Setup(model, initializer, config, mesh, placement, method.mpu())
    return method, engine.start(setup)


def _refuse_hooks(model: PreTrainedModel, method: str) -> None:
    """Raise `ValueError` for hooks on parameters: engines replace parameters, so the hooks would never fire."""
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise ValueError(
                f"method '{method}' registers a hook on parameter '{name}' of "
                f"{type(model).__name__}, which would never fire: weights take the place of that "
                "parameter, and engines shard them; register a hook on its module instead "
                "(register_full_backward_hook), or replace the module's forward"
            )


def micro_batches(
    config: TrainConfig,
    corpus: Corpus,
    method: Method,
    mesh: DeviceMesh,
    step: int,
    device: torch.device,
) -> list[Batch]:
    """This rank's micro-batches of `step`, on `device`."""
    return [batch.to(device) for batch in method.micro_batches(config, corpus, mesh, step)]


def _num_valid(batches: list[Batch]) -> Tensor:
    """Valid labels of all micro-batches on all ranks, at least 1: a step without labels has loss 0. Collective."""
    valid = torch.stack([batch.num_valid() for batch in batches]).sum()
    dist.all_reduce(valid)
    return valid.clamp(min=1)


def accumulate_gradients(method: Method, runtime: Runtime, batches: list[Batch]) -> Tensor:
    """Forward and backward of all micro-batches of a step. Returns the global mean loss. Collective."""
    valid = _num_valid(batches)
    runtime.placement.evidence["local_seqlen"] = batches[0].input_ids.shape[1]
    loss = method.forward_backward(runtime, batches, valid)
    dist.all_reduce(loss)
    return loss


def evaluate(method: Method, runtime: Runtime, batches: list[Batch]) -> Tensor:
    """Global mean loss over `batches` (this rank's shards), without gradients. Collective."""
    valid = _num_valid(batches)
    runtime.module.eval()
    with torch.no_grad():
        loss = method.loss(runtime, batches, valid)
    runtime.module.train()
    dist.all_reduce(loss)
    return loss


def train_step(method: Method, runtime: Runtime, batches: list[Batch]) -> StepResult:
    """One optimizer step over `batches` (this rank's shards). Reads no tensor value in Python. Collective."""
    loss = accumulate_gradients(method, runtime, batches)
    return StepResult(loss=loss, grad_norm=runtime.update())
