"""Engine plain with updates in backward makes the usual update without accumulating gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from training import config_of, corpus_of, train
from transformers import PreTrainedModel

from alst_impl import hf, step
from alst_impl.config import OptimizerConfig, Spec, TrainConfig
from alst_impl.layout import make_mesh
from alst_impl.methods.base import Method, layouts
from alst_impl.placement import Placement
from harness.cells.cell import make_cell

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Ranks

    from alst_impl.engines.base import Runtime

IN_BACKWARD = {"name": "plain", "update_in_backward": True}


def started(world_size: int, config: TrainConfig) -> tuple[Method, Runtime, list[list[Any]]]:
    """A run before its first step, and the micro-batches of two steps."""
    mesh = make_mesh(layouts(config), "cpu")
    placement = Placement(torch.device("cpu"))
    method, runtime = step.start(config, mesh, placement)
    corpus = corpus_of(config)
    batches = [
        step.micro_batches(config, corpus, method, mesh, index, placement.device)
        for index in range(2)
    ]
    return method, runtime, batches


class Seen(NamedTuple):
    """Results of two steps."""

    results: list[tuple[float, float]]
    """Loss and gradient norm of each step."""
    final: dict[str, Tensor]
    """Parameters after both steps."""
    alive: list[int]
    """Number of gradients that exist when an optimizer step begins."""
    num_trained: int
    """Number of trained parameters."""


def alone(world_size: int, config: TrainConfig) -> Seen:
    """Two steps of `config`."""
    method, runtime, steps = started(world_size, config)
    alive: list[int] = []

    def count(*_: Any) -> None:
        alive.append(sum(p.grad is not None for p in runtime.module.parameters()))

    handle = register_optimizer_step_pre_hook(count)
    try:
        results = [step.train_step(method, runtime, batches) for batches in steps]
    finally:
        handle.remove()
    return Seen(
        [(float(result.loss), float(result.grad_norm)) for result in results],
        {name: p.clone() for name, p in runtime.state_dict().items()},
        alive,
        sum(p.requires_grad for p in runtime.module.parameters()),
    )


def both(rank: int, world_size: int, config: TrainConfig) -> tuple[Seen, Seen]:
    """The usual run, and the one with updates in backward."""
    usual = config.model_copy(update={"engine": Spec(name="plain")})
    return alone(world_size, usual), alone(world_size, config)


@pytest.mark.parametrize(
    ("world_size", "settings"),
    [
        pytest.param(1, {"dtype": "float64"}, id="baseline-fp64"),
        pytest.param(1, {"overrides": {"tie_word_embeddings": True}}, id="tied"),
        pytest.param(1, {"lora": {"rank": 2}}, id="lora"),
        pytest.param(1, {"optimizer": {"name": "sgd", "weight_decay": 0.1}}, id="sgd"),
        pytest.param(2, {"checkpoint": False}, id="baseline-dp2"),
        pytest.param(
            2,
            {"method": {"name": "mst", "tiles": 3}, "overrides": {"tie_word_embeddings": True}},
            id="mst-tied-dp2",
        ),
        pytest.param(
            2, {"method": {"name": "mst", "tiles": 3, "recompute": False}}, id="mst-kept-dp2"
        ),
        pytest.param(
            2,
            {
                "method": {"name": "alst", "sp": 2, "tiles": 3},
                "overrides": {"tie_word_embeddings": True},
            },
            id="alst-tied-sp2",
        ),
        pytest.param(
            2, {"method": {"name": "alst", "sp": 2}, "model": "tiny-qwen3-moe"}, id="alst-moe-sp2"
        ),
        pytest.param(2, {"method": {"name": "ring", "cp": 2, "tiles": 3}}, id="ring-cp2"),
        pytest.param(2, {"method": {"name": "layerwise", "sp": 2, "every": 2}}, id="layerwise-sp2"),
        pytest.param(2, {"method": {"name": "seq1f1b", "pp": 2, "slices": 1}}, id="pipeline-pp2"),
    ],
)
def test_updates_in_backward_are_the_usual_ones_to_the_bit(
    ranks: Ranks, world_size: int, settings: dict[str, Any]
) -> None:
    """Losses, norms and parameters of two steps are equal, with one gradient alive at a time."""
    optimizer = {"learning_rate": 0.1, "weight_decay": 0.1}
    optimizer.update(settings.get("optimizer", {}))
    config = config_of(
        **{**settings, "optimizer": optimizer}, engine=IN_BACKWARD, world_size=world_size
    )
    usual, ours = ranks(world_size)(both, config)[0]
    assert ours.results == usual.results
    assert ours.final.keys() == usual.final.keys()
    assert all(torch.equal(ours.final[name], value) for name, value in usual.final.items())
    assert usual.alive == [usual.num_trained] * 2
    assert ours.alive == [1] * (2 * ours.num_trained)


def test_a_checkpoint_resumes_with_either_update(ranks: Ranks, tmp_path: Path) -> None:
    """A checkpoint saved with updates in backward gives the same three steps with and without them,
    under the saved settings.
    """
    folder = tmp_path / "checkpoint"
    usual = config_of(engine="plain")
    ours = config_of(engine=IN_BACKWARD)
    other = config_of(engine=IN_BACKWARD, optimizer=OptimizerConfig(learning_rate=0.5))
    ranks(1)(train, ours, range(2), None, folder)
    wanted, final = ranks(1)(train, usual, range(2, 5), folder)[0]
    for config in (ours, other):
        losses, parameters = ranks(1)(train, config, range(2, 5), folder)[0]
        assert losses == wanted
        assert all(torch.equal(parameters[name], value) for name, value in final.items())


def what_is_refused(rank: int, world_size: int) -> list[str]:
    """Errors of four cases: reading gradients, a step without an update, two backwards, a weight
    shared by two checkpointed layers.
    """
    refused = []
    config = config_of(engine=IN_BACKWARD, method="alst")
    method, runtime, (batches, _) = started(world_size, config)
    assert isinstance(runtime.module, PreTrainedModel)
    layers = hf.decoder_layers(runtime.module)
    layers[0].mlp.up_proj.weight = layers[1].mlp.up_proj.weight
    for attempt in (
        runtime.gradients,
        runtime.drop_gradients,
        lambda: runtime.start_step(2),
        lambda: step.train_step(method, runtime, batches),
    ):
        with pytest.raises(ValueError, match=r"use update_in_backward: false$") as error:
            attempt()
        refused.append(str(error.value))
    return refused


def test_inexact_steps_are_refused(ranks: Ranks) -> None:
    """The error is one line with a fix."""
    messages = ranks(1)(what_is_refused)[0]
    expected = ["gradients are gone", "without an update", "this step has 2", "in several passes"]
    for message, part in zip(messages, expected, strict=True):
        assert part in message


def step_with_an_unused_parameter(rank: int, world_size: int, config: TrainConfig) -> str:
    """A step with an unused final norm weight. Returns the message if it is refused."""
    method, runtime, (batches, _) = started(world_size, config)
    assert isinstance(runtime.module, PreTrainedModel)
    (norm,) = hf.final_norms(runtime.module)
    norm.forward = lambda hidden: hidden
    before = norm.weight.detach().clone()
    try:
        step.train_step(method, runtime, batches)
    except ValueError as error:
        return str(error)
    assert torch.equal(norm.weight, before * 0.99)  # weight decay, as with a zero gradient
    return ""


def test_an_unused_parameter_is_updated_alone_and_refused_among_ranks(ranks: Ranks) -> None:
    """On one rank its gradient is zero. With several ranks, gradients of different parameters would be mixed up."""
    config = config_of(
        engine=IN_BACKWARD, optimizer=OptimizerConfig(learning_rate=0.1, weight_decay=0.1)
    )
    assert ranks(1)(step_with_an_unused_parameter, config) == [""]
    for message in ranks(2)(
        step_with_an_unused_parameter, config.model_copy(update={"world_size": 2})
    ):
        assert "parameter 'model.norm.weight' has no gradient on this rank" in message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accumulation": 2}, "accumulation is 2; set accumulation: 1, or use update_in_backward"),
        ({"optimizer": {"max_grad_norm": 0.5}}, r"\(max_grad_norm=0.5\); leave max_grad_norm out"),
        ({"method": "seq1f1b"}, r"slices \(4\) .*; use slices: 1 or update_in_backward: false"),
        ({"gate": True}, r"gate \(True\) .*set both to false, or use update_in_backward: false"),
    ],
)
def test_a_configuration_that_needs_all_gradients_is_refused(
    settings: dict[str, Any], message: str
) -> None:
    """The error comes before anything runs and gives a fix."""
    base = {"model": "tiny-llama", "method": "baseline", "engine": IN_BACKWARD, "seqlen": 64}
    assert make_cell({**base, "gate": False}).train.engine.options["update_in_backward"]
    with pytest.raises(ValueError, match=message):
        make_cell({**base, "gate": False, **settings})
