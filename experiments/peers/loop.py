"""A plain loop with PyTorch's fully_shard (FSDP2), into which libraries are put that come without a trainer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from case import LEARNING_RATE, Case
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

Batch = dict[str, Tensor]
"""int64 [1, S] each, in host memory."""


def start(case: Case) -> torch.device:
    """Join the process group; the device of this rank."""
    if case.gated:
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl")
    return device


def build(case: Case) -> PreTrainedModel:
    """The model: on the CPU with its weights under the gate, otherwise on the meta device."""
    if case.gated:
        return AutoModelForCausalLM.from_pretrained(case.model, dtype=case.dtype)
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(case.model)
        return AutoModelForCausalLM.from_config(config, dtype=case.dtype)


def shard(
    case: Case, model: PreTrainedModel, device: torch.device, *, ends_apart: bool = True
) -> None:
    """Shard the weights over all ranks, layer by layer, and make those that are on the meta device. Collective.

    Embedding and head are units of their own with `ends_apart`; a library that reads the head's weight outside the
    head's forward needs them in the unit of the model.
    """
    options: dict[str, Any] = {}
    if case.states == "host":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=not case.gated)
    ends = [model.get_input_embeddings(), model.get_output_embeddings()] if ends_apart else []
    for unit in [*model.model.layers, *ends, model]:
        fully_shard(unit, **options)
    if case.gated:
        return
    model.to_empty(device="cpu" if case.states == "host" else device)
    with torch.no_grad():
        for module in model.modules():
            if module._buffers:  # small, and on the device where weights are on the host, too
                module.to(device)
                model._init_weights(module)
        for weight in model.parameters():
            weight.zero_()


def train(
    case: Case,
    model: PreTrainedModel,
    device: torch.device,
    losses: Callable[[list[Batch]], Iterable[Tensor]],
    mean: Callable[[Tensor], float] = float,
    *,
    reduce_each: bool = False,
) -> None:
    """Train `case.steps` steps with AdamW. `losses` gives the loss of each backward of a step in turn.

    `mean` is the loss of all ranks, from the sum over a rank's backwards. Gradients are reduced once a step if it has
    one backward for each micro-batch, and in every backward with `reduce_each`.
    """
    torch.autograd.set_multithreading_enabled(False)
    # One parameter's temporaries at a time: those of all at once are the peak of short sequences.
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, foreach=False)
    for _ in range(case.steps):
        batches = [
            {name: row[None] for name, row in each.items()} for each in case.rows(case.accumulation)
        ]
        total = torch.zeros((), device=device)
        for number, loss in enumerate(losses(batches), start=1):
            if case.states == "device" and not reduce_each:
                model.set_requires_gradient_sync(number == len(batches))
            loss.backward()
            total += loss.detach()
            del loss
        if case.gradients is not None:
            gradients = {
                name: p.grad.full_tensor()
                for name, p in model.named_parameters()
                if p.grad is not None
            }
            case.save(mean(total), gradients)
        optimizer.step()
        optimizer.zero_grad()
    dist.destroy_process_group()
