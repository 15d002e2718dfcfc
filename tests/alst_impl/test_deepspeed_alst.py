"""Measured gradients and losses of DeepSpeed's own ALST classes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
import torch
from training import (
    Run,
    Truth,
    assert_same_gradients,
    config_of,
    ratio_and_cosine,
    run_steps,
    truth_of,
)

from alst_impl import step
from alst_impl.config import Spec
from alst_impl.methods.base import load_method
from alst_impl.models import build
from alst_impl.placement import Placement

if TYPE_CHECKING:
    from conftest import Ranks


def trained(ranks: Ranks, stage: int) -> tuple[Run, Truth]:
    """One step of `deepspeed_alst` at sp 2, and the reference gradients."""
    config = config_of(
        method={"name": "deepspeed_alst", "sp": 2, "tiles": 2},
        engine={"name": "zero", "stage": stage},
        seqlen=64,
        world_size=2,
    )
    return ranks(2)(run_steps, config)[0], truth_of(config)


def test_the_peer_is_exact_under_zero3(ranks: Ranks) -> None:
    """The call is that of DeepSpeed's tutorial, at sp 2."""
    run, truth = trained(ranks, 3)
    assert_same_gradients(run.gradients, truth.gradients)
    assert run.losses[0] == pytest.approx(truth.losses[0], rel=1e-5)
    assert run.evidence["tiles"] > 0


@pytest.mark.parametrize("stage", [1, 2])
def test_the_peers_gradients_are_sp_times_too_long_under_zero1_and_zero2(
    ranks: Ranks, stage: int
) -> None:
    """Measured with DeepSpeed 0.19.8. This test fails once a later release fixes it."""
    run, truth = trained(ranks, stage)
    for name, expected in truth.gradients.items():
        ratio, cosine = ratio_and_cosine(run.gradients[name], expected)
        assert ratio == pytest.approx(2, rel=1e-5), name
        assert cosine == pytest.approx(1, abs=1e-6), name
    assert run.losses[0] == pytest.approx(truth.losses[0], rel=1e-5)


def test_the_peer_accumulates(ranks: Ranks) -> None:
    """With two equal micro-batches, DeepSpeed is told where the step ends, and the update happens."""
    config = config_of(
        method={"name": "deepspeed_alst", "sp": 2, "tiles": 2},
        engine={"name": "zero", "stage": 3},
        seqlen=64,
        world_size=2,
        accumulation=2,
    )
    run = ranks(2)(run_steps, config, 2)[0]
    assert len(run.grad_norms) == 2
    assert any((run.final[name] != run.initial[name]).any() for name in run.final)


@pytest.mark.parametrize("sp", [1, 2])
def test_the_peers_fused_loss_loses_the_division_for_the_head(ranks: Ranks, sp: int) -> None:
    """Measured with DeepSpeed 0.19.8: the head's gradient is that of the sum, all other gradients
    are those of the mean.
    """
    options = {"sp": sp, "tiles": 2, "tiled_by": "TiledFusedLogitsLoss"}
    config = config_of(
        method={"name": "deepspeed_alst", **options},
        engine={"name": "zero", "stage": 3},
        seqlen=64,
        world_size=sp,
    )
    run, truth = ranks(sp)(run_steps, config)[0], truth_of(config)
    for name, expected in truth.gradients.items():
        ratio, _ = ratio_and_cosine(run.gradients[name], expected)
        assert ratio == pytest.approx(63 / sp if name == "lm_head.weight" else 1, rel=1e-5), name


@pytest.mark.parametrize(
    ("options", "settings", "said"),
    [
        ({"liger": True}, {}, "liger computes the loss, and so does tile_loss"),
        (
            {"liger": True, "sp": 2, "tile_loss": False, "trainer_loss": True},
            {"world_size": 2, "seqlen": 64},
            "so does trainer_loss; set trainer_loss: false",
        ),
        ({"offload": True}, {"checkpoint": False}, "checkpoint is false; set offload: false"),
    ],
)
def test_mutually_exclusive_options_are_refused(
    options: dict[str, object], settings: dict[str, object], said: str
) -> None:
    """The check of the run refuses them."""
    config = config_of(method={"name": "deepspeed_alst", **options}, engine="zero", **settings)
    with pytest.raises(ValueError, match=said):
        step.check(config)


@pytest.mark.parametrize("option", ["liger", "offload"])
def test_gpu_options_are_refused_on_a_cpu(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the option. Missing packages are replaced here, because their check comes first."""
    spec = Spec(name="deepspeed_alst", options={"tile_loss": False, option: True})
    config = config_of(method=spec, engine="zero")
    model, _ = build(config)
    method = load_method(spec)
    monkeypatch.setattr(type(method), "require", lambda _: None)
    with pytest.raises(
        ValueError, match=f"{option} of .* needs a CUDA device, not 'cpu'.*set {option}: false"
    ):
        method.apply(model, config, None, Placement(torch.device("cpu")))


@pytest.mark.parametrize(
    ("option", "missing", "said"),
    [
        ("liger", "liger_kernel", r"needs liger_kernel.*pip install 'alst-bench\[peers\]'"),
        (
            "offload",
            "arctic_training",
            "needs arctic_training.*pip install --no-deps 'arctic-training",
        ),
    ],
)
def test_a_missing_peer_is_named(
    option: str, missing: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error has the command that installs it."""
    monkeypatch.setitem(sys.modules, missing, None)
    spec = Spec(name="deepspeed_alst", options={"tile_loss": False, option: True})
    with pytest.raises(ValueError, match=said):
        load_method(spec).require()
