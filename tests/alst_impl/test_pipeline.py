"""Stages over slices train exactly as the stock model does, and hold what the schedule says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from training import assert_trains_as, config_of, run_steps, truth_of

from alst_impl.config import OptimizerConfig, TrainConfig

if TYPE_CHECKING:
    from conftest import Ranks

LAYERS = {"num_hidden_layers": 5}
"""Four stages of one, one, one and two."""


def piped(pp: int, dp: int = 1, **settings: Any) -> TrainConfig:
    """A run of `pp` stages in fp64 that four micro-batches of unequal labels go through."""
    options = {k: settings.pop(k) for k in ("slices", "split") if k in settings}
    overrides = {**LAYERS, **settings.pop("overrides", {})}
    return config_of(
        **{
            "method": {"name": "seq1f1b", "pp": pp, **options},
            "overrides": overrides,
            "world_size": pp * dp,
            "accumulation": 4,
            "dtype": "float64",
            **settings,
        }
    )


def gradients(rank: int, world_size: int, configs: list[TrainConfig]) -> list[dict[str, Tensor]]:
    """Body of a rank: gradients of the first step of each run, from rank 0."""
    runs = [run_steps(rank, world_size, config) for config in configs]
    return [run.gradients for run in runs if run is not None]


def assert_equal_to_stock(ranks: Ranks, configs: list[TrainConfig]) -> None:
    """Every parameter's gradient equals that of the stock model in the same dtype, to 1e-12 of its norm."""
    dp = configs[0].world_size // configs[0].method.options["pp"]
    stock = [
        c.model_copy(update={"method": config_of().method, "engine": config_of().engine, "world_size": dp})
        for c in configs
    ]
    truths = ranks(dp)(gradients, stock)[0]
    found = ranks(configs[0].world_size)(gradients, configs)[0]
    for config, mine, truth in zip(configs, found, truths, strict=True):
        assert mine.keys() == truth.keys()
        for name, expected in truth.items():
            error = (mine[name] - expected).norm() / expected.norm()
            assert error <= 1e-12, f"{name}: {error:.1e} with {config.method.options}"


@pytest.mark.parametrize("engine", ["plain", "fsdp2"])
@pytest.mark.parametrize(("pp", "dp"), [(1, 1), (2, 1), (2, 2), (4, 1)])
def test_every_gradient_is_the_stock_models(ranks: Ranks, pp: int, dp: int, engine: str) -> None:
    """With 1 to 4 slices of equal work or length, 4 to 8 micro-batches, checkpointed or not."""
    variants: list[dict[str, Any]] = [
        {"slices": 1},
        {"slices": 2, "split": "length"},
        {"slices": 3, "accumulation": 8},
        {"slices": 4, "checkpoint": False},
    ]
    assert_equal_to_stock(ranks, [piped(pp, dp, engine=engine, **v) for v in variants])
