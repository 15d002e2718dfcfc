"""Engines and models under ALST have the gradients of the stock model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from training import (
    assert_same_gradients,
    assert_trains_as,
    config_of,
    relative_error,
    run_steps,
    truth_of,
)

from alst_impl import step
from alst_impl.config import OptimizerConfig

if TYPE_CHECKING:
    from conftest import Ranks

MODELS = ["tiny-gemma3", "tiny-llama", "tiny-mistral", "tiny-qwen3", "tiny-qwen3-moe"]


@pytest.mark.parametrize("model", MODELS)
def test_every_model_under_zero3_and_sp4_has_the_gradients_of_the_stock_model(
    ranks: Ranks, model: str
) -> None:
    """Four ranks share one sample of an awkward length, longer than the sliding windows."""
    config = config_of(
        model=model,
        method={"name": "alst", "sp": 4, "tiles": 3},
        engine={"name": "zero", "stage": 3},
        seqlen=131,
        world_size=4,
    )
    run = ranks(4)(run_steps, config)[0]
    truth = truth_of(config)
    assert_same_gradients(run.gradients, truth.gradients)
    assert run.losses[0] == pytest.approx(truth.losses[0], rel=1e-6)
    assert run.evidence["local_seqlen"] == 33
    assert run.evidence["exchanges"] > 0
    assert run.evidence["offloaded_bytes"] > 0


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"data": {"mask": "rank"}}, id="a-rank-without-labels"),
        pytest.param({"data": {"mask": "imbalance"}, "seqlen": 134}, id="one-label-of-67"),
        pytest.param({"data": {"mask": "border"}}, id="labels-on-the-border"),
        pytest.param({"data": {"mask": "all"}}, id="no-label-at-all"),
        pytest.param({"data": {"documents": 3}}, id="packed"),
        pytest.param({"batch_size": 2, "seqlen": 65}, id="batch-of-two"),
        pytest.param({"model": "tiny-mistral", "seqlen": 133}, id="window"),
        pytest.param({"overrides": {"num_key_value_heads": 1}}, id="one-kv-head"),
        pytest.param({"checkpoint": False, "method": {"offload": False}}, id="no-checkpointing"),
        pytest.param({"method": {"offload": False}}, id="no-offload"),
        pytest.param({"method": {"tiles": 100}}, id="more-tiles-than-rows"),
    ],
)
def test_alst_at_sp2_has_the_gradients_of_the_stock_model(
    ranks: Ranks, settings: dict[str, Any]
) -> None:
    """Equal gradients with ignored labels, packed documents, and features turned off."""
    method = {"name": "alst", "sp": 2, **settings.get("method", {})}
    config = config_of(**{**settings, "method": method, "world_size": 2})
    run = ranks(2)(run_steps, config)[0]
    truth = truth_of(config)
    assert_same_gradients(run.gradients, truth.gradients)
    assert run.losses[0] == pytest.approx(truth.losses[0], rel=1e-5)


@pytest.mark.parametrize("engine", ["zero", "fsdp2", "plain"])
def test_gradients_are_not_clipped_unless_asked(ranks: Ranks, engine: str) -> None:
    """DeepSpeed clips at 1.0 by default; our engines do not."""
    config = config_of(
        engine=engine,
        world_size=2,
        optimizer=OptimizerConfig(learning_rate=0.1, eps=1.0, weight_decay=0.1),
    )
    run = ranks(2)(run_steps, config, 2)[0]
    assert run.grad_norms[0] > 1
    assert_trains_as(run, truth_of(config, 2))


@pytest.mark.parametrize(
    "engine",
    [
        {"name": "zero", "offload_optimizer": True, "offload_param": True},
        {"name": "zero", "reduce_scatter": False},
        {"name": "zero", "stage": 2, "offload_optimizer": True},
    ],
    ids=["zero3-offloaded", "zero3-no-reduce-scatter", "zero2-offloaded"],
)
def test_options_of_zero_change_no_gradient(ranks: Ranks, engine: dict[str, Any]) -> None:
    """The place of states and the dtype of communication change no gradient."""
    config = config_of(method={"name": "alst", "sp": 2}, engine=engine, world_size=2)
    run = ranks(2)(run_steps, config)[0]
    assert_same_gradients(run.gradients, truth_of(config).gradients)


def test_bf16_under_alst_loses_no_more_than_bf16_alone(ranks: Ranks) -> None:
    """Tiling and sharding add little to the rounding error of plain bf16 training."""
    plain = config_of(dtype="bfloat16", seqlen=128)
    alst = config_of(
        dtype="bfloat16",
        seqlen=128,
        engine="zero",
        method={"name": "alst", "sp": 2, "tiles": 16},
        world_size=2,
    )
    truth = truth_of(plain).gradients
    stock = relative_error(ranks(1)(run_steps, plain)[0].gradients, truth)
    ours = relative_error(ranks(2)(run_steps, alst)[0].gradients, truth)
    assert 0 < ours < 2 * stock
    assert stock < 0.05


def test_the_same_run_twice_gives_the_same_losses_to_the_bit(ranks: Ranks) -> None:
    """A run depends on nothing but its configuration."""
    config = config_of(method={"name": "alst", "sp": 2}, world_size=2)
    first, second = (ranks(2)(run_steps, config, 2)[0] for _ in range(2))
    assert first.losses == second.losses
    assert first.grad_norms == second.grad_norms


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine": "zero", "dtype": "float64"}, "engine 'zero' does not support dtype float64"),
        (
            {"engine": {"name": "zero", "stage": 2, "offload_param": True}},
            "offload_param needs sharded parameters, but stage is 2; use stage 3",
        ),
        ({"engine": "zro"}, "unknown engine 'zro'; use one of fsdp2, plain, zero"),
        ({"engine": {"name": "zero", "stage": 4}}, "stage = 4"),
        ({"method": "alts"}, "unknown method 'alts'; use one of"),
        ({"method": {"name": "alst", "tile": 3}}, "known keys: .*tiles"),
        (
            {"method": {"name": "alst", "sp": 3}, "world_size": 4},
            r"sp \(3\) must divide world_size \(4\) for method 'alst'; use sp in \[1, 2, 4\]",
        ),
        (
            {"method": {"name": "alst", "sp": 16}, "world_size": 16},
            r"num_attention_heads \(8\) must be divisible by sp \(16\) .* use sp in \[1, 2, 4, 8\]",
        ),
        ({"method": "alst", "checkpoint": False}, "set offload: false"),
        (
            {"method": "alst", "overrides": {"attention_dropout": 0.1}},
            "attention dropout .* which method 'alst' cannot shard exactly",
        ),
        (
            {"method": {"name": "deepspeed_alst", "sp": 2}, "world_size": 2},
            "runs under DeepSpeed only, not engine 'plain'; use engine 'zero'",
        ),
        (
            {"method": {"name": "deepspeed_alst", "sp": 2}, "world_size": 2, "engine": "zero"},
            r"seqlen \(67\) must be divisible by sp \(2\) .* use 66",
        ),
    ],
)
def test_an_impossible_request_is_refused_with_the_way_out(
    settings: dict[str, Any], message: str
) -> None:
    """The error comes before anything runs and names the values, the rule and a fix."""
    with pytest.raises(ValueError, match=message):
        step.check(config_of(**settings))


def test_shards_on_the_host_train_as_the_stock_model_does(ranks: Ranks) -> None:
    """fsdp2 makes the stock model's clipped updates with parameters, gradients and states in host
    memory, under sequence parallelism.
    """
    config = config_of(
        method={"name": "alst", "sp": 2},
        engine={"name": "fsdp2", "offload": True},
        world_size=2,
        accumulation=2,
        optimizer=OptimizerConfig(learning_rate=0.1, eps=1.0, max_grad_norm=0.5),
    )
    assert_trains_as(ranks(2)(run_steps, config, 2)[0], truth_of(config, 2))
