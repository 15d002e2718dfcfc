"""Pipelines over slices train exactly, and their memory follows the schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from torch import Tensor
from training import assert_trains_as, config_of, run_steps, truth_of

from alst_impl import step
from alst_impl.config import OptimizerConfig, TrainConfig
from alst_impl.methods.seq1f1b import layers_of

if TYPE_CHECKING:
    from conftest import Ranks

LAYERS = {"num_hidden_layers": 5}
"""Four stages have one, one, one and two layers."""


def piped(pp: int, dp: int = 1, **settings: Any) -> TrainConfig:
    """A run of `pp` stages in fp64, with four micro-batches of unequal numbers of labels."""
    options = {k: settings.pop(k) for k in ("slices", "split", "tile_loss") if k in settings}
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
        c.model_copy(
            update={"method": config_of().method, "engine": config_of().engine, "world_size": dp}
        )
        for c in configs
    ]
    truths = ranks(dp)(gradients, stock)[0]
    found = ranks(configs[0].world_size)(gradients, configs)[0]
    for config, mine, truth in zip(configs, found, truths, strict=True):
        assert mine.keys() == truth.keys()
        for name, expected in truth.items():
            error = (mine[name] - expected).norm()
            assert error <= 1e-12 * expected.norm(), f"{name} with {config.method.options}"


@pytest.mark.parametrize(
    ("pp", "dp", "engine"),
    [
        (1, 1, "plain"),
        (2, 1, "plain"),
        (4, 1, "plain"),
        (2, 2, "fsdp2"),
    ],
)
def test_every_gradient_is_the_stock_models(ranks: Ranks, pp: int, dp: int, engine: str) -> None:
    """Equal with 1 to 4 slices of equal work or length, 4 to 8 micro-batches, with and without checkpoints."""
    variants: list[dict[str, Any]] = [
        {"slices": 1},
        {"slices": 2, "split": "length"},
        {"slices": 3, "accumulation": 8},
        {"slices": 4, "checkpoint": False},
    ]
    assert_equal_to_stock(ranks, [piped(pp, dp, engine=engine, **v) for v in variants])


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"data": {"documents": 3}, "batch_size": 2}, id="packed"),
        pytest.param(
            {"model": "tiny-qwen3", "overrides": {"tie_word_embeddings": False}}, id="qk-norms"
        ),
        pytest.param({"model": "tiny-mistral", "slices": 1, "seqlen": 133}, id="window"),
        pytest.param({"model": "tiny-qwen3-moe", "dtype": "float64"}, id="experts"),
        pytest.param({"data": {"mask": "all"}}, id="no-label-at-all"),
        pytest.param({"tile_loss": True, "engine": "fsdp2"}, id="tiled-loss"),
    ],
)
def test_families_of_models(ranks: Ranks, settings: dict[str, Any]) -> None:
    """Gradients are exact with two stages and three slices."""
    config = piped(2, **{"slices": 3, "accumulation": 2, **settings})
    assert_equal_to_stock(ranks, [config])


@pytest.mark.parametrize("engine", ["plain", "fsdp2"])
def test_clipping_is_by_the_norm_of_all_stages(ranks: Ranks, engine: str) -> None:
    """Two clipped updates and their norms equal those of one process."""
    optimizer = OptimizerConfig(learning_rate=0.1, eps=1.0, max_grad_norm=0.5)
    config = piped(2, engine=engine, optimizer=optimizer, dtype="float32")
    run = ranks(2)(run_steps, config, 2)[0]
    assert run.grad_norms[0] > 0.5
    assert_trains_as(run, truth_of(config, 2))


def test_stages_are_runs_of_layers_of_nearly_equal_length() -> None:
    """Together they are all layers, in order."""
    for num_layers in range(1, 12):
        for pp in range(1, num_layers + 1):
            kept = [layers_of(stage, pp, num_layers) for stage in range(pp)]
            assert [i for stage in kept for i in stage] == list(range(num_layers))
            assert {len(stage) for stage in kept} <= {num_layers // pp, -(-num_layers // pp)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pp": 3, "world_size": 4}, r"pp \(3\) must divide world_size \(4\) .* \[1, 2, 4\]"),
        ({"pp": 6}, r"pp \(6\) is more than the 5 layers of 'tiny-llama'.* use pp up to 5"),
        ({"pp": 2, "slices": 68}, r"slices \(68\) is more than seqlen \(67\).* up to 67"),
        ({"pp": 2, "engine": "zero", "dtype": "float32"}, "use engine 'plain' or 'fsdp2'"),
        (
            {"pp": 2, "overrides": {"tie_word_embeddings": True}},
            "ties its embeddings .* override tie_word_embeddings: false",
        ),
        (
            {"pp": 2, "model": "tiny-mistral", "seqlen": 133},
            r"sliding window \(\d+\) shorter than seqlen \(133\).* use slices: 1",
        ),
        ({"pp": 2, "overrides": {"attention_dropout": 0.1}}, "attention dropout .* cannot split"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    """The error is one line with the values, the rule and a fix."""
    with pytest.raises(ValueError, match=message) as caught:
        step.check(piped(**settings))
    assert "\n" not in str(caught.value)
