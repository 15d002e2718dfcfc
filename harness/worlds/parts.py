"""Parts of a step on their own, on fake tensors: one MLP, or head and loss."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from alst_impl import hf
from alst_impl.config import Spec, TrainConfig
from alst_impl.data import Batch
from alst_impl.models import published
from alst_impl.placement import Placement
from alst_impl.step import start
from harness.cost import Meter
from harness.depth import at_depth
from harness.repeat import Recording
from harness.tracker import Tracker
from harness.worlds.sim import (
    CUDA_ROUNDING,
    DEVICE,
    HOST,
    Offload,
    Trace,
    Unfilled,
    fake_world,
    replay,
)


def simulate_part(config: TrainConfig, part: Literal["mlp", "loss"]) -> Trace:
    """Forward and backward of `part` alone, on one rank that holds its parameters whole."""
    alone = at_depth(config, 1).model_copy(
        update={"engine": Spec(name="plain"), "checkpoint": True, "world_size": 1}
    )
    meter = Meter(HOST.type)
    tracker = Tracker(
        rounding=CUDA_ROUNDING,
        host=HOST.type,
        observer=meter.observe,
        events=True,
        explain=True,
    )
    placement = Placement(DEVICE, HOST, on_phase=tracker.phase)
    with fake_world(alone, gpu=True, cap_tiles=True, meter=meter) as mesh:
        method, runtime = start(alone, mesh, placement, Unfilled(0))
        model: Any = runtime.module
        hidden = torch.empty(
            alone.batch_size, alone.seqlen, _width(alone), dtype=torch.bfloat16, requires_grad=True
        )
        tracker.adopt([hidden], "activations")
        with tracker:
            tracker.phase("setup")
            if part == "mlp":
                _run_mlp(model, hidden, tracker)
            else:
                _give_hidden_states(model, hidden)
                tracker.adopt(model.get_output_embeddings().parameters(), "parameters")
                ids = torch.zeros(alone.batch_size, alone.seqlen, dtype=torch.int64)
                positions = torch.arange(alone.seqlen).expand_as(ids)
                runtime.start_step(2)  # one of two micro-batches: nothing is summed over ranks yet
                batch = Batch(ids, ids.clone(), positions)
                method.micro_step(runtime, batch, torch.ones((), dtype=torch.int64))
    recording = Recording(tracker.allocations, tracker.events)
    operators = frozenset(tracker.operators)
    return replay(recording, operators, Offload(gradients=False), meter.cost())


def _width(config: TrainConfig) -> int:
    width: int = published(config.model, config.overrides)["hidden_size"]
    return width


def _run_mlp(model: PreTrainedModel, hidden: Tensor, tracker: Tracker) -> None:
    mlp: nn.Module = hf.token_wise_modules(model)[0][0]
    tracker.adopt(mlp.parameters(), "parameters")
    tracker.phase("forward")
    out = mlp(hidden)
    tracker.phase("backward")
    torch.autograd.backward(out, torch.empty_like(out))


def _give_hidden_states(model: PreTrainedModel, hidden: Tensor) -> None:
    """Have `model`'s body return `hidden`, so that only head and loss run."""

    def body(*args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=hidden)

    model.base_model.forward = body
