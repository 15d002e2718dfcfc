"""The gradient gate: what passes, what fails, what a failure says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from alst_impl.config import DataConfig, Spec, TrainConfig
from harness.gate import broken_promises, explain_failure, known_factor
from harness.gradients import Truth, compare
from harness.record import RankEvidence

TRAIN = TrainConfig(
    model="tiny-llama", method={"name": "alst", "sp": 4}, seqlen=100, world_size=8, dtype="float32"
)
SP2 = Spec(name="alst", options={"sp": 2})
EVIDENCE = RankEvidence(local_seqlen=25, tiles=3, exchanges=4, offloaded_bytes=5)


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    """Truth of two parameters, one of which has no gradient; loss 2."""
    path = tmp_path / "truth.safetensors"
    tensors = {"a": torch.arange(6.0), "zero": torch.zeros(3), "loss": torch.tensor(2.0)}
    save_file({name: tensor.double() for name, tensor in tensors.items()}, path)
    return path


def ours(scale: float = 1.0) -> dict[str, Tensor]:
    """The truth's gradients in fp32, scaled."""
    return {"a": torch.arange(6.0) * scale, "zero": torch.zeros(3)}


def test_equal_gradients_pass(truth: Path) -> None:
    """The truth itself passes, and a zero gradient has neither ratio nor cosine."""
    gate = compare(ours(), 2.0, Truth(exact=str(truth)), TRAIN)
    assert gate.passed
    assert [p.ratio for p in gate.parameters] == [1.0, None]


@pytest.mark.parametrize("scale", [1 + 2e-5, 1 - 2e-5, -1.0, 4.0])
def test_wrong_scale_fails(truth: Path, scale: float) -> None:
    """A factor beyond the tolerance fails, and so does a wrong sign, which has the right norm."""
    assert not compare(ours(scale), 2.0, Truth(exact=str(truth)), TRAIN).passed


def test_wrong_direction_fails(truth: Path) -> None:
    """A gradient of the right norm in another direction fails."""
    turned = {**ours(), "a": torch.arange(6.0).roll(1)}
    gate = compare(turned, 2.0, Truth(exact=str(truth)), TRAIN)
    assert not gate.passed
    assert gate.worst.parameter == "a"


def test_nonzero_where_the_truth_is_zero_fails(truth: Path) -> None:
    """Any gradient at all is wrong where there must be none."""
    gate = compare({**ours(), "zero": torch.full((3,), 1e-30)}, 2.0, Truth(exact=str(truth)), TRAIN)
    assert not gate.passed
    assert gate.worst.parameter == "zero"
    assert "must be zero" in explain_failure(gate, TRAIN)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_fails(truth: Path, value: float) -> None:
    """NaN does not slip through comparisons, whatever they compare."""
    gate = compare({**ours(), "a": torch.full((6,), value)}, 2.0, Truth(exact=str(truth)), TRAIN)
    assert not gate.passed


def test_missing_gradient_counts_as_zero(truth: Path) -> None:
    """A parameter that got no gradient fails where the truth has one."""
    gate = compare({"zero": torch.zeros(3)}, 2.0, Truth(exact=str(truth)), TRAIN)
    assert not gate.passed
    assert gate.worst.ratio == 0.0


def test_wrong_loss_fails(truth: Path) -> None:
    """Right gradients of a wrong loss are not a pass."""
    assert not compare(ours(), 2.1, Truth(exact=str(truth)), TRAIN).passed


@pytest.mark.parametrize(
    ("ratio", "said"),
    [
        (4.0, r"sp \(4\)"),
        (0.25, r"1 / sp"),
        (2.0, r"dp \(2\)"),
        (8.0, "world_size"),
        (200.0, "tokens"),
    ],
)
def test_ratio_that_is_a_known_quantity_is_named(ratio: float, said: str) -> None:
    """Factors that wrong code multiplies by are told by name."""
    factor = known_factor(ratio, TRAIN)
    assert factor is not None
    assert re.search(said, factor)


def test_other_ratio_is_not_named() -> None:
    """A ratio that means nothing gets no story."""
    assert known_factor(1.37, TRAIN) is None


@pytest.mark.parametrize("counter", ["tiles", "exchanges", "offloaded_bytes", "local_seqlen"])
def test_method_that_did_nothing_is_caught(counter: str) -> None:
    """A counter that stays at zero on one rank breaks the promise of the method's options."""
    idle = EVIDENCE.model_copy(update={counter: 0})
    (problem,) = broken_promises(TRAIN, [EVIDENCE, idle])
    assert counter in problem
    assert "rank 1" in problem


def test_unsharded_sequence_is_caught() -> None:
    """A rank that saw more than its share broke the promise."""
    whole = EVIDENCE.model_copy(update={"local_seqlen": 100})
    assert broken_promises(TRAIN, [whole])
    assert not broken_promises(TRAIN, [EVIDENCE])


@pytest.mark.parametrize(("ratio", "said"), [(63.0, "labels"), (31.5, "labels / sp")])
def test_the_number_of_labels_is_a_known_quantity(ratio: float, said: str) -> None:
    """One less than the tokens of each sample, where nothing is masked."""
    train = TRAIN.model_copy(update={"seqlen": 64, "world_size": 2, "method": SP2})
    assert said in str(known_factor(ratio, train))
    masked = train.model_copy(update={"data": DataConfig(mask="prefix")})
    assert known_factor(ratio, masked) is None
