"""Parts of a step: forward and backward of only one MLP, or of only head and loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from alst_impl import hf
from alst_impl.models import described
from alst_impl.placement import Placement
from alst_impl.step import micro_batches, start
from harness.predict.depth import at_depth
from harness.worlds.base import RankReadings, World, num_parameters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import nn

    from harness.cells.cell import Cell
    from harness.processes.jobs import Rank


def run_part(rank: Rank, cell: Cell, world: World) -> RankReadings:
    """Run forward and backward of the part that `cell` names, with only its parameters in memory. Collective."""
    assert cell.simulation is not None
    train = at_depth(cell.train, 1)
    with world.group(rank, cell) as mesh:
        placement = Placement(
            device=world.device,
            on_host=world.on_host,
            on_phase=world.on_phase,
            on_layer=world.on_layer,
        )
        method, runtime = start(train, mesh, placement, world.initializer(cell))
        model: Any = getattr(runtime.module, "module", runtime.module)  # DeepSpeed wraps it
        (batch,) = micro_batches(train, world.corpus(train), method, mesh, 0, world.device)
        width: int = described(train.model, train.overrides)["hidden_size"]
        hidden = torch.empty(
            *batch.input_ids.shape,
            width,
            dtype=torch.bfloat16,
            device=world.device,
            requires_grad=True,
        )
        body: Callable[[], object]
        if cell.simulation.part == "mlp":
            mlp = hf.token_wise_modules(model)[0][0]
            _leave(model, mlp.parameters())
            body = _mlp(mlp, hidden, placement)
        else:
            _leave(model, model.get_output_embeddings().parameters())
            _give_hidden_states(model, hidden)
            valid = torch.ones((), dtype=torch.int64, device=world.device)

            def body() -> object:
                runtime.start_step(2)  # one of two micro-batches: nothing is summed over ranks yet
                return method.micro_step(runtime, batch, valid)

        world.stand(runtime)
        memory = world.track(body, runtime)
        return RankReadings(
            step_s=[],
            loss=[],
            grad_norm=[],
            memory=memory,
            evidence=dict(placement.evidence),
            cosine=[],
            gate=None,
            num_parameters=num_parameters(runtime.module.parameters()),
        )


def _mlp(mlp: nn.Module, hidden: Tensor, placement: Placement) -> Callable[[], object]:
    def body() -> None:
        placement.on_phase("forward")
        out = mlp(hidden)
        placement.on_phase("backward")
        torch.autograd.backward(out, torch.empty_like(out))

    return body


def _leave(model: nn.Module, kept: Iterable[nn.Parameter]) -> None:
    """Free all parameters of `model` except `kept`."""
    stay = {id(p) for p in kept}
    for p in model.parameters():
        if id(p) not in stay:
            p.data = p.data.new_empty(0)


def _give_hidden_states(model: Any, hidden: Tensor) -> None:
    """Make the body of `model` return `hidden`, so that only head and loss run."""

    def body(*args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=hidden)

    model.base_model.forward = body
