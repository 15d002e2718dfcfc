"""Evaluation under sequence parallelism gives the stock model's loss and does not affect training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from training import config_of, corpus_of

from alst_impl import models, step
from alst_impl.config import TrainConfig
from alst_impl.layout import make_mesh
from alst_impl.methods.base import layouts
from alst_impl.ops.memory.loss import tiled_loss
from alst_impl.placement import Placement

if TYPE_CHECKING:
    from conftest import Ranks


def evaluated(rank: int, world_size: int, config: TrainConfig) -> tuple[float, float, int]:
    """Loss of an evaluation, loss of the next training step, and number of gradients that the evaluation left."""
    mesh = make_mesh(layouts(config), "cpu")
    placement = Placement(torch.device("cpu"))
    method, runtime = step.start(config, mesh, placement)
    corpus = corpus_of(config)
    batches = step.micro_batches(config, corpus, method, mesh, 0, placement.device)
    loss = step.evaluate(method, runtime, batches)
    left = sum(p.grad is not None for p in runtime.module.parameters())
    assert runtime.module.training
    return float(loss), float(step.train_step(method, runtime, batches).loss), left


@pytest.mark.parametrize(
    "engine", [{"name": "plain"}, {"name": "fsdp2"}, {"name": "zero"}], ids=str
)
@pytest.mark.parametrize(
    "method",
    [{"name": "alst", "tiles": 3}, {"name": "layerwise"}, {"name": "chunked", "chunk": 16}],
    ids=str,
)
def test_evaluation_at_sp2_is_the_stock_models_loss(
    ranks: Ranks, engine: dict[str, Any], method: dict[str, Any]
) -> None:
    """Equal for a length that sp does not divide and unequal numbers of labels. No gradient is left."""
    config = config_of(
        method={**method, "sp": 2}, engine=engine, world_size=2, data={"mask": "prefix"}
    )
    loss, trained, left = ranks(2)(evaluated, config)[0]
    model = models.materialize(config).double()
    ids, labels, positions, _ = corpus_of(config).rows(0)[0]
    with torch.no_grad():
        expected = model(input_ids=ids[None], position_ids=positions[None], labels=labels[None])
    assert loss == pytest.approx(float(expected.loss), rel=1e-5)
    assert trained == pytest.approx(loss, rel=1e-6)
    assert left == 0


def test_an_evaluation_leaves_no_slices_behind(ranks: Ranks) -> None:
    """The next training step attends to its own keys only."""
    config = config_of(method={"name": "seq1f1b", "slices": 3})
    loss, trained, left = ranks(1)(evaluated, config)[0]
    assert trained == pytest.approx(loss, rel=1e-6)
    assert left == 0


def test_the_tiled_loss_forms_no_gradient_under_no_grad() -> None:
    """Under no_grad the function of a tile runs with gradients off, and the loss is the same."""
    hidden, labels = torch.randn(1, 7, 4), torch.arange(7)[None] % 3
    weight = torch.nn.Parameter(torch.randn(3, 4))
    seen = []

    def loss_of(x: torch.Tensor, y: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        seen.append(torch.is_grad_enabled())
        losses = torch.nn.functional.cross_entropy(x[0] @ weight.T, y[0], reduction="sum")
        return losses / count

    trained = tiled_loss(loss_of, hidden, labels, torch.tensor(7), 3)
    with torch.no_grad():
        evaluated = tiled_loss(loss_of, hidden, labels, torch.tensor(7), 3)
    torch.testing.assert_close(evaluated, trained)
    assert seen[-3:] == [False] * 3
