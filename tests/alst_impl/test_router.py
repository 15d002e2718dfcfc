"""The load-balancing loss of routers is that of whole sequences, on shards and in tiles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.optim import SGD
from training import Run, assert_trains_as, config_of, run_steps, truth_of

from alst_impl import hf, models
from alst_impl.config import TrainConfig
from alst_impl.hf import router
from alst_impl.layout import Layout
from alst_impl.methods.base import load_method
from alst_impl.placement import Placement

if TYPE_CHECKING:
    from conftest import Ranks

FAMILIES = Path(__file__).parents[1] / "families"


def run_of(folder: Path, name: str, **options: Any) -> TrainConfig:
    """A step of a tiny model with a strong router loss, on one sample. Its configuration is written to `folder`."""
    fields = json.loads((FAMILIES / f"{name}.json").read_text())
    path = folder / f"{name}.json"
    path.write_text(
        json.dumps({**fields, "output_router_logits": True, "router_aux_loss_coef": 2.0})
    )
    config = config_of(
        method={"name": "alst", **options},
        seqlen=44,
        world_size=options.get("sp", 1),
        dtype="float64",
        checkpoint=options.get("offload", True),
    )
    return config.model_copy(update={"model": str(path), "overrides": {}})


def steps_of(rank: int, world_size: int, configs: list[TrainConfig]) -> list[Run | None]:
    """Body of a rank: one step of each run."""
    return [run_steps(rank, world_size, config) for config in configs]


def test_gradients_are_those_of_whole_sequences(ranks: Ranks, tmp_path: Path) -> None:
    """With two ranks, tiles and recomputation, and without any of them; routers of several kinds."""
    kinds = ("qwen3_moe", "mixtral", "gpt_oss", "granitemoe")
    sharded = [run_of(tmp_path, name, sp=2, tiles=3) for name in kinds]
    alone = [
        run_of(tmp_path, "qwen3_moe", tiles=3),
        run_of(tmp_path, "qwen3_moe", tile_mlp=False),
        run_of(tmp_path, "qwen3_moe", tile_mlp=False, offload=False),
    ]
    for world_size, configs in ((2, sharded), (1, alone)):
        for config, run in zip(configs, ranks(world_size)(steps_of, configs)[0], strict=True):
            assert run is not None
            assert_trains_as(run, truth_of(config))


def enabled(folder: Path) -> Any:
    """A tiny model with ALST on one rank."""
    config = run_of(folder, "qwen3_moe", tiles=2)
    model = models.materialize(config)
    no_mesh: Any = None
    load_method(config.method).apply(model, config, no_mesh, Placement(torch.device("cpu")))
    return model.train()


def loss_of(model: Any) -> torch.Tensor:
    ids = torch.arange(40)[None] + 20
    loss: torch.Tensor = model(
        input_ids=ids, shift_labels=ids, num_items_in_batch=torch.tensor(40), use_cache=False
    ).loss
    return loss


def test_two_forwards_before_a_backward_are_refused(tmp_path: Path) -> None:
    """Routers that backward recomputes would count for the other forward."""
    model = enabled(tmp_path)
    first, _ = loss_of(model), loss_of(model)
    with pytest.raises(ValueError, match="ran forward twice before backward"):
        first.backward()


def test_a_router_loss_lowers_with_training(tmp_path: Path) -> None:
    """The optimizer sees it: a large one evens out the routing."""
    model = enabled(tmp_path)
    optimizer, losses = SGD(model.parameters(), 1e-3), []
    for _ in range(3):
        both = []
        for coefficient in (0.0, 100.0):
            vars(model)["router_loss"].coefficient = coefficient
            both.append(loss_of(model))
        both[1].backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(both[1].detach() - both[0].detach()))
    assert losses[-1] < losses[0]


def test_a_padded_length_is_refused_with_lengths_that_are_not(tmp_path: Path) -> None:
    """The refusal's way out is a way out: zigzag order over 2 ranks makes 4 chunks."""
    config = run_of(tmp_path, "qwen3_moe", offload=False)
    model = models.materialize(config)
    hf.use_router_loss(model)
    ones = torch.ones(1, 11, dtype=torch.int64)
    for length in (21, 22):
        router.start(model, torch.device("cpu"))
        layout = Layout(length, cp=2, order="zigzag")
        with pytest.raises(ValueError, match="use samples of a multiple of 4 tokens"):
            router.finish(model, torch.zeros(()), ones, torch.tensor(22), layout)


def test_other_router_losses_are_refused() -> None:
    """A model whose loss is not transformers' function over router logits."""
    with pytest.raises(ValueError, match="router loss that is not transformers'"):
        hf.use_router_loss(models.materialize(config_of()))
