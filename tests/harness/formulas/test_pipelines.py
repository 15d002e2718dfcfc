"""Pipelines at published sizes: parameters of the model, bytes and times of the formulas."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from phantoms import cell, missing, stepped

from alst_impl.config import TrainConfig
from alst_impl.models import published
from alst_impl.ops.pipeline.schedule import bubble, makespan
from harness.cells import paths
from harness.cells.cell import make_cell
from harness.cells.experiment import load_experiment
from harness.formulas import pipelines
from harness.judge.claims import tokens_of_step
from harness.records.published import look_up


def run(slices: int = 4, pp: int = 8, world_size: int = 8, **settings: Any) -> TrainConfig:
    """A 2.7B model on eight stages, without dp, with 16 micro-batches of 16K tokens."""
    return TrainConfig(
        **{
            "model": "gpt-2.7b",
            "method": {"name": "seq1f1b", "pp": pp, "slices": slices},
            "engine": "plain",
            "seqlen": 16_384,
            "world_size": world_size,
            "accumulation": 16,
            "dtype": "bfloat16",
            **settings,
        }
    )


def test_parameters_are_those_of_the_model() -> None:
    """The count needs no model."""
    assert pipelines.parameters_of(published("gpt-2.7b")) == 2_775_208_960


def test_bytes_of_1f1b_are_those_of_as_many_micro_batches_as_stages() -> None:
    """The first stage holds P micro-batches in L / P layers, with 34 bytes for each layer."""
    held = pipelines.held(pipelines.staged(run(slices=1), 1, "a100-80gb"))
    assert held["activations"] == 34 * 2560 * 32 * 16_384
    assert held["optimizer"] == 12 * 2_775_208_960 // 8


def test_slices_hold_fewer_bytes() -> None:
    """Slices hold (P + k - 1) / k of a micro-batch, and slightly more because early slices are longer."""
    whole, sliced = (
        pipelines.held(pipelines.staged(run(slices=k), 1, "a100-80gb"))["activations"]
        for k in (1, 4)
    )
    assert 11 / 32 < sliced / whole < 1.1 * 11 / 32


def test_tensor_parallel_ranks_and_replicas_share() -> None:
    """Work and bytes are divided by tp, optimizer states also by dp."""
    one = pipelines.staged(run(), 1, "a100-80gb")
    many = pipelines.staged(run(world_size=64), 4, "a100-80gb")
    assert (many.tp, many.dp) == (4, 2)
    assert makespan(pipelines.played(many)) == pytest.approx(makespan(pipelines.played(one)) / 4)
    held, of_one = pipelines.held(many), pipelines.held(one)
    assert held["activations"] == pytest.approx(of_one["activations"] / 4, abs=1)
    assert held["optimizer"] == pytest.approx(of_one["optimizer"] / 8, abs=1)


def test_equal_work_waits_less_than_equal_length() -> None:
    """This is the purpose of slices of equal work."""
    by = {
        split: pipelines.staged(
            run(method={"name": "seq1f1b", "pp": 8, "slices": 4, "split": split}, seqlen=131_072),
            1,
            "a100-80gb",
        )
        for split in ("flops", "length")
    }
    waits = {split: bubble(pipelines.played(s)) for split, s in by.items()}
    assert waits["flops"] < waits["length"]
    lengths = [stop - start for start, stop in pairwise(by["flops"].borders)]
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize(
    ("settings", "simulation", "message"),
    [
        (
            {"model": "tiny-llama", "method": {"name": "seq1f1b", "pp": 2}},
            {},
            "gpt_neox .* not llama",
        ),
        ({"method": "baseline"}, {}, "method 'baseline' is not one; use 'seq1f1b'"),
        ({}, {"tp": 3}, r"pp x tp \(8 x 3\) must divide world_size \(8\)"),
    ],
)
def test_impossible_schedules_are_refused(
    settings: dict[str, Any], simulation: dict[str, Any], message: str
) -> None:
    """The error is one line."""
    with pytest.raises(ValueError, match=message):
        pipelines.staged(run(**settings), simulation.get("tp", 1), "a100-80gb")


def test_tp_is_for_schedules() -> None:
    """No method is tensor-parallel, so only world `schedule` takes tp."""
    with pytest.raises(ValueError, match=r"tp \(2\) needs world 'schedule'"):
        make_cell(
            {
                "model": "tiny-llama",
                "method": "alst",
                "seqlen": 64,
                "world": "phantom",
                "hardware": "h100-80gb",
                "simulation": {"tp": 2},
            }
        )


def test_the_fitted_row_and_the_gain_from_more_micro_batches_are_as_published() -> None:
    """Twice as many micro-batches gain 15 % for 1F1B and 4 % for slices, with four stages only."""
    experiment = load_experiment(paths.experiment("seq1f1b"))
    cells = experiment.cells()
    ours, theirs = {}, {}
    for key, claim in experiment.claims():
        if "tokens_per_second" in claim.columns:
            s = pipelines.staged(cells[key].train, 8, cells[key].hardware)
            tokens = s.borders[-1] * s.micro_batches
            ours[claim.id] = tokens / makespan(pipelines.played(s))
            theirs[claim.id] = look_up(
                claim.table, claim.row, claim.columns["tokens_per_second"]
            ).value
    assert ours[pipelines.FITTED_ON] == pytest.approx(theirs[pipelines.FITTED_ON], rel=1e-3)
    for name in ("1f1b", "seq1f1b"):
        few, many = f"seq1f1b-7b-32k-8-{name}", f"seq1f1b-7b-32k-16-{name}"
        gain = theirs[many] / theirs[few]
        assert ours[many] / ours[few] == pytest.approx(gain, rel=0.01)


def test_waiting_of_equal_units() -> None:
    """The bubble is (P - 1) / (M k + P - 1). A method without stages has none."""
    assert pipelines.waiting(run()) == pytest.approx(7 / (16 * 4 + 7))
    assert pipelines.waiting(run(method="baseline")) == 0


@pytest.mark.phantom
@pytest.mark.skipif(bool(missing()), reason=missing() or "all there")
@pytest.mark.parametrize("slices", [1, 4])
def test_the_executor_holds_about_the_bytes_of_the_formula(slices: int) -> None:
    """In forward of the first stage of such a model, a phantom device shows at least the formula's
    bytes and at most 20 % more.
    """
    narrow = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
    of = cell(
        model="gpt-2.7b",
        method={"name": "seq1f1b", "pp": 4, "slices": slices},
        engine="plain",
        world_size=4,
        seqlen=8_192,
        accumulation=5,
        checkpoint=False,
        overrides={**narrow, "num_hidden_layers": 4, "vocab_size": 512},
        hardware="a100-80gb",
    )
    (readings,) = stepped(of, ranks=(0,))
    memory = readings.memory
    assert memory is not None
    assert memory.cuda is not None
    # Parameters and states are in the resting bytes. Gradients, two bytes each, appear in the first
    # backward.
    counted = (
        memory.cuda.allocated_bytes["forward"] - memory.resting_bytes - 2 * readings.num_parameters
    )
    said = pipelines.held(pipelines.staged(of.train, 1, "a100-80gb"))["activations"]
    assert 1 <= counted / said <= 1.2


def test_tokens_of_a_step_are_those_of_all_replicas() -> None:
    """Tensor-parallel ranks see the same tokens."""
    experiment = load_experiment(paths.experiment("seq1f1b"))
    key = next(key for key, claim in experiment.claims() if claim.id == pipelines.FITTED_ON)
    assert tokens_of_step(experiment.cells()[key]) == 8 * 32_768


def test_a_pipeline_fits_in_usable_memory() -> None:
    """A step of bytes between what a device has and what CUDA gives of it does not fit."""
    staged = pipelines.staged(run(), 1, "a100-80gb")
    chip = staged.hardware.chip
    assert chip is not None
    needed = sum(pipelines.held(staged).values())
    for usable in (needed, needed - 1):
        changed = {"chip": chip.model_copy(update={"usable_bytes": usable})}
        hardware = staged.hardware.model_copy(update=changed)
        assert hardware.memory_bytes > needed
        found = pipelines.prediction(staged.model_copy(update={"hardware": hardware}))
        assert found.fits == (usable == needed)
        assert found.limit == ("none" if found.fits else "gpu_memory")
