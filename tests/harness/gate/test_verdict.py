"""The gradient gate: passes, failures and messages."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import Ranks
from safetensors.torch import save_file
from samples import cell, measurement
from torch import Tensor
from training import config_of, run_steps

from alst_impl.config import DataConfig, DType, Spec, TrainConfig
from alst_impl.models import materialize, published
from harness.gate.gradients import compare, compare_update, stock_change
from harness.gate.truth import gradients_of
from harness.gate.truths import Truth, corpus_of, pattern_of, samples_of
from harness.gate.verdict import (
    EPSILON,
    broken_promises,
    explain_failure,
    known_factor,
    outcome_line,
)
from harness.records.record import Outcome


def test_epsilons_are_those_of_the_dtypes() -> None:
    """The table that works without torch has torch's values."""
    assert all(torch.finfo(getattr(torch, name)).eps == eps for name, eps in EPSILON.items())


TRAIN = TrainConfig(
    model="tiny-llama", method={"name": "alst", "sp": 4}, seqlen=100, world_size=8, dtype="float32"
)
SP2 = Spec(name="alst", options={"sp": 2})
EVIDENCE = {"local_seqlen": 25, "tiles": 3, "exchanges": 4, "gathers": 0, "offloaded_bytes": 5}


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    """True gradients of two parameters, one of them zero; loss 2."""
    path = tmp_path / "truth.safetensors"
    tensors = {"a": torch.arange(6.0), "zero": torch.zeros(3), "loss": torch.tensor(2.0)}
    save_file({name: tensor.double() for name, tensor in tensors.items()}, path)
    return path


def ours(scale: float = 1.0) -> dict[str, Tensor]:
    """The truth's gradients in fp32, scaled."""
    return {"a": torch.arange(6.0) * scale, "zero": torch.zeros(3)}


def test_equal_gradients_pass(truth: Path) -> None:
    """The true gradients pass. A zero gradient has no ratio and no cosine."""
    gate = compare(ours(), 2.0, Truth(exact=str(truth)), TRAIN)
    assert gate.passed
    assert [p.ratio for p in gate.parameters] == [1.0, None]


@pytest.mark.parametrize("scale", [1 + 2e-5, 1 - 2e-5, -1.0, 4.0])
def test_wrong_scale_fails(truth: Path, scale: float) -> None:
    """A factor beyond the tolerance fails. So does a wrong sign, which keeps the norm."""
    assert not compare(ours(scale), 2.0, Truth(exact=str(truth)), TRAIN).passed


def test_wrong_direction_fails(truth: Path) -> None:
    """A gradient of the right norm in another direction fails."""
    turned = {**ours(), "a": torch.arange(6.0).roll(1)}
    gate = compare(turned, 2.0, Truth(exact=str(truth)), TRAIN)
    assert not gate.passed
    assert gate.worst.parameter == "a"


@pytest.mark.parametrize(("value", "passed"), [(1e-8, True), (1e-6, False)])
def test_nonzero_where_the_truth_is_zero_fails(truth: Path, value: float, passed: bool) -> None:
    """Where the true gradient is zero, ours fails if it exceeds the rounding error of the layer's largest gradient."""
    gate = compare({**ours(), "zero": torch.full((3,), value)}, 2.0, Truth(exact=str(truth)), TRAIN)
    assert gate.passed == passed
    zero = gate.parameters[1]
    assert (zero.ratio, zero.noise) == (None, True)
    assert zero.norm == zero.error_norm == pytest.approx(value * 3**0.5)
    if not passed:
        assert gate.worst == zero
        said = explain_failure(gate, TRAIN)
        assert "gradient of zero must be zero but for 8.8e-07 that float32 rounds off" in said
        assert "has norm 1.7e-06" in said


def test_nonzero_where_all_gradients_are_zero_fails(tmp_path: Path) -> None:
    """If all gradients are zero, as with all labels masked, there is no rounding error."""
    save_file({"a": torch.zeros(3).double(), "loss": torch.zeros(()).double()}, tmp_path / "t")
    truth = Truth(exact=str(tmp_path / "t"))
    assert compare({"a": torch.zeros(3)}, 0.0, truth, TRAIN).passed
    assert not compare({"a": torch.full((3,), 1e-30)}, 0.0, truth, TRAIN).passed


LAYERS = {
    "layers.0.big": 1.0,
    "layers.0.small": 1e-4,
    "layers.1.big": 1e-6,
    "layers.1.small": 1e-10,
    "layers.1.noise": 1e-17,
}
"""Norms of true gradients of two layers."""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "layers.1.noise"])
def test_a_zeroed_gradient_above_the_noise_fails(dtype: DType, name: str, tmp_path: Path) -> None:
    """It fails however small it is beside its layer or other layers. The rounding error of bf16
    must not hide it either.
    """
    truth = {n: torch.full((4,), norm / 2).double() for n, norm in LAYERS.items()}
    path = str(tmp_path / "truth.safetensors")
    save_file({**truth, "loss": torch.tensor(2.0).double()}, path)
    held = Truth(exact=path, rounded=path if dtype == "bfloat16" else None)
    train = TRAIN.model_copy(update={"dtype": dtype})
    rounded = {**truth, "layers.1.noise": torch.full((4,), 1e-14)}
    assert compare(rounded, 2.0, held, train).passed
    gate = compare({**rounded, name: torch.zeros(4)}, 2.0, held, train)
    assert not gate.passed
    assert gate.worst.parameter == name
    assert "ratio 0" in explain_failure(gate, train)


ZEROS = {
    "window of one": ("tiny-mistral", {"overrides": {"sliding_window": 1}}, "q_proj.weight"),
    "two tokens": ("tiny-llama", {"seqlen": 2}, "k_proj.weight"),
    "key bias without positions": ("smollm3", {}, "k_proj.bias"),
}
"""Cases with zero gradients: every query sees one key, or all keys move together."""


@pytest.mark.parametrize("case", ZEROS)
def test_rounding_where_the_mathematics_gives_zero_passes(
    case: str, tmp_path: Path, ranks: Ranks
) -> None:
    """Rounding errors of a zero gradient pass. Larger values still fail."""
    model, settings, name = ZEROS[case]
    if model == "smollm3":
        fields = published("tiny-llama") | {
            "model_type": model,
            "attention_bias": True,
            "no_rope_layers": [0, 0],
            "pad_token_id": 0,
        }
        (tmp_path / "config.json").write_text(json.dumps(fields))
        model = str(tmp_path / "config.json")
    train = config_of(**{"model": model, "method": SP2, "world_size": 2, "seqlen": 16, **settings})
    run = ranks(2)(run_steps, train)[0]
    stock = materialize(train.model_copy(update={"dtype": "float64"}))
    save_file(gradients_of(stock, samples_of(train, 0)), tmp_path / "truth.safetensors")
    held = Truth(exact=str(tmp_path / "truth.safetensors"))
    gate = compare(run.gradients, run.losses[0], held, train)
    assert gate.passed, explain_failure(gate, train)
    noise = {p.parameter for p in gate.parameters if p.noise}
    assert noise >= {f"model.layers.{i}.self_attn.{name}" for i in range(2)}
    assert not [n for n in noise if "self_attn" not in n]
    for of in noise:
        wrong = {**run.gradients, of: torch.full_like(run.gradients[of], 1e-6)}
        assert not compare(wrong, run.losses[0], held, train).passed


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_fails(truth: Path, value: float) -> None:
    """NaN fails, although every comparison with it is false."""
    gate = compare({**ours(), "a": torch.full((6,), value)}, 2.0, Truth(exact=str(truth)), TRAIN)
    assert not gate.passed


def test_missing_gradient_counts_as_zero(truth: Path) -> None:
    """A parameter without a gradient fails if the true gradient is not zero."""
    gate = compare({"zero": torch.zeros(3)}, 2.0, Truth(exact=str(truth)), TRAIN)
    assert not gate.passed
    assert (gate.worst.ratio, gate.worst.cosine) == (0.0, 0.0)


def test_an_update_is_that_of_the_optimizer_on_the_true_gradients(truth: Path) -> None:
    """Weights that stay fail, and are named unless a gradient, which is the cause, was wrong already."""
    held, before = Truth(exact=str(truth)), {"a": torch.ones(6), "zero": torch.ones(3)}
    change = stock_change(before, ours(), TRAIN.optimizer)
    after = {name: (before[name].double() + change[name]).float() for name in before}
    right, wrong = (compare(ours(scale), 2.0, held, TRAIN) for scale in (1.0, 4.0))
    assert compare_update(right, before, after, held, TRAIN).passed
    failed = compare_update(right, before, before, held, TRAIN)
    assert not failed.passed
    assert failed.wrong_update in failed.updates
    assert compare_update(right, before, after, held, TRAIN).wrong_update is None
    assert compare_update(wrong, before, before, held, TRAIN).wrong_update is None


def test_what_the_truth_is_computed_from() -> None:
    """Samples of unequal labels only where micro-batches accumulate; a pattern with all of its options."""
    assert not corpus_of(TRAIN).uneven
    assert corpus_of(TRAIN.model_copy(update={"accumulation": 2})).uneven
    assert pattern_of(TRAIN) is None
    attention = Spec(name="sdpa", options={"pattern": {"name": "window", "window": 7}})
    found = pattern_of(TRAIN.model_copy(update={"attention": attention}))
    assert found == {"name": "window", "window": 7, "dilation": 1, "global_tokens": 0}


def test_a_record_that_failed_says_why() -> None:
    """Whatever its gate says of gradients; one without a gate, too."""
    kept = measurement(cell("alst", 2))
    assert outcome_line(kept).startswith("passed")
    failed = kept.model_copy(update={"outcome": Outcome.WRONG_GRADIENT, "detail": "ratio 2"})
    assert outcome_line(failed) == "wrong_gradient: ratio 2"
    assert outcome_line(failed.model_copy(update={"readings": None})) == "wrong_gradient: ratio 2"


def test_wrong_loss_fails(truth: Path) -> None:
    """Right gradients with a wrong loss do not pass."""
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
def test_a_ratio_of_a_known_quantity_is_named(ratio: float, said: str) -> None:
    """The message names common wrong factors."""
    factor = known_factor(ratio, TRAIN)
    assert factor is not None
    assert re.search(said, factor)


def test_other_ratio_is_not_named() -> None:
    """The message gives no explanation for any other ratio."""
    assert known_factor(1.37, TRAIN) is None


@pytest.mark.parametrize("counter", ["tiles", "exchanges", "offloaded_bytes", "local_seqlen"])
def test_method_that_did_nothing_is_caught(counter: str) -> None:
    """A counter that stays at zero on one rank contradicts the method's options."""
    idle = {**EVIDENCE, counter: 0}
    (problem,) = broken_promises(TRAIN, [EVIDENCE, idle])
    assert counter in problem
    assert "rank 1" in problem


def test_unsharded_sequence_is_caught() -> None:
    """A rank that saw more than its share contradicts the method's options."""
    whole = {**EVIDENCE, "local_seqlen": 100}
    assert broken_promises(TRAIN, [whole])
    assert not broken_promises(TRAIN, [EVIDENCE])


@pytest.mark.parametrize(("ratio", "said"), [(63.0, "labels"), (31.5, "labels / sp")])
def test_the_number_of_labels_is_a_known_quantity(ratio: float, said: str) -> None:
    """It is one less than the tokens of each sample if nothing is masked."""
    train = TRAIN.model_copy(update={"seqlen": 64, "world_size": 2, "method": SP2})
    assert said in str(known_factor(ratio, train))
    masked = train.model_copy(update={"data": DataConfig(mask="prefix")})
    assert known_factor(ratio, masked) is None
