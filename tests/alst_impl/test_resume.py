"""A run resumes from a checkpoint, at another degree of sequence parallelism."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from training import config_of, train

from alst_impl.config import OptimizerConfig, Spec, TrainConfig

if TYPE_CHECKING:
    from conftest import Ranks

BEFORE, AFTER = range(3), range(3, 6)
"""Steps before and after the checkpoint. AdamW's moments only matter from the second step."""


def config_at(sp: int, world_size: int, engine: dict[str, Any]) -> TrainConfig:
    """Two samples per step, at any sp and world_size."""
    return config_of(
        method={"name": "alst", "sp": sp, "tiles": 3},
        engine=engine,
        world_size=world_size,
        batch_size=2 * sp // world_size,
        optimizer=OptimizerConfig(learning_rate=1e-2, weight_decay=0.1),
    )


@pytest.mark.parametrize(
    "engine",
    [{"name": "zero", "stage": 3}, {"name": "zero", "stage": 2}, {"name": "fsdp2"}],
    ids=["zero3", "zero2", "fsdp2"],
)
def test_a_checkpoint_of_sp1_resumes_at_sp2_and_sp4(
    ranks: Ranks, tmp_path: Path, engine: dict[str, Any]
) -> None:
    """The next losses and the parameters equal those of the uninterrupted run."""
    folder = tmp_path / "checkpoint"
    before = config_at(1, 2, engine)
    ranks(2)(train, before, BEFORE, None, folder)
    wanted, final = ranks(2)(train, before, AFTER, folder)[0]
    for sp in (2, 4):
        losses, parameters = ranks(sp)(train, config_at(sp, sp, engine), AFTER, folder)[0]
        assert losses == pytest.approx(wanted, rel=1e-5), f"sp={sp}"
        for name, expected in final.items():
            torch.testing.assert_close(parameters[name], expected, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("engine", ["zero", "fsdp2"])
def test_a_resumed_run_is_the_uninterrupted_one(ranks: Ranks, tmp_path: Path, engine: str) -> None:
    """Saved and resumed at sp 2, all losses equal those of the uninterrupted run."""
    folder = tmp_path / "checkpoint"
    config = config_at(2, 2, {"name": engine})
    first, _ = ranks(2)(train, config, BEFORE, None, folder)[0]
    second, _ = ranks(2)(train, config, AFTER, folder)[0]
    fresh, _ = ranks(2)(train, config, AFTER)[0]
    whole, _ = ranks(2)(train, config, range(AFTER.stop))[0]
    assert first + second == pytest.approx(whole, rel=1e-6)
    assert fresh != pytest.approx(second, rel=1e-3)  # so the loaded state matters


@pytest.mark.parametrize("engine", ["fsdp2", "plain"])
def test_a_checkpoint_of_two_stages_resumes_in_one(
    ranks: Ranks, tmp_path: Path, engine: str
) -> None:
    """A checkpoint has all layers under their names, from every stage."""
    folder = tmp_path / "checkpoint"
    whole = config_at(1, 1, {"name": engine})
    staged = whole.model_copy(
        update={"method": Spec(name="seq1f1b", options={"pp": 2}), "world_size": 2}
    )
    ranks(2)(train, staged, BEFORE, None, folder)
    wanted, final = ranks(2)(train, staged, AFTER, folder)[0]
    losses, parameters = ranks(1)(train, whole, AFTER, folder)[0]
    assert losses == pytest.approx(wanted, rel=1e-5)
    for name, expected in final.items():
        torch.testing.assert_close(parameters[name], expected, rtol=1e-3, atol=2e-4)
