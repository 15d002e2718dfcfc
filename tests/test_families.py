"""Model types of transformers: a part of the committed table runs again, with every method."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from harness.cells.experiment import Experiment, load_experiment
from harness.commands.matrix import run
from harness.gate.verdict import judgement
from harness.records.families import committed
from harness.records.record import Outcome

EXPERIMENT = Path("experiments/families/families.yaml")
KINDS = {
    "sinks, windows in every second layer, MLP with two values": "gpt_oss",
    "soft-capped scores": "gemma2",
    "latent attention, other head dims for values": "deepseek_v3",
    "indexed attention, whose top-k depends on the length": "deepseek_v32",
    "linear attention beside attention": "qwen3_next",
    "state-space layers beside attention": "bamba",
    "state-space layers alone": "mamba2",
    "short convolutions": "lfm2",
    "attention of its own": "gpt_neo",
    "sizes by other names, biases": "gpt2",
    "layers that take and return several tensors": "gemma3n_text",
    "positions that shards cannot know": "bart",
    "a bias by position": "bloom",
}
"""What may differ between models -> a type where it does."""


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    """The committed experiment."""
    return load_experiment(EXPERIMENT)


@pytest.mark.parametrize("model", KINDS.values(), ids=lambda model: model)
def test_models_train_as_the_committed_table_says(
    model: str, experiment: Experiment, tmp_path: Path
) -> None:
    """Every gradient is right, or the model is refused, as in the committed run."""
    said = {
        (f.method, f.dtype): f.outcome
        for f in committed()
        if f.model == model and f.dtype == "float32"
    }
    assert said
    work = [
        (row, cell)
        for row, cell in experiment.matrix_cells()
        if row.levels["model"] == model and row.levels["dtype"] == "float32"
    ]
    done = list(run(Console(quiet=True), experiment, work, 1, force=False, results=tmp_path))
    found = {
        (row.levels["method"], row.levels["dtype"]): (m.outcome, judgement(m)) for row, m in done
    }
    for key, (outcome, why) in found.items():
        assert outcome is said[key], why
    refused = {key for key in said if key not in found}
    assert all(said[key] is Outcome.REFUSED for key in refused)


def test_the_table_has_every_model_and_no_wrong_gradient_in_fp32(experiment: Experiment) -> None:
    """Each row of the experiment has a line. What does not pass is refused, but for rounding in bf16.

    In bf16, a token may go to another expert by rounding, and then its gradients are others.
    """
    lines = {(f.model, f.method, f.dtype): f.outcome for f in committed()}
    rows = {tuple(row.levels[k] for k in ("model", "method", "dtype")) for row in experiment.rows}
    assert set(lines) == rows
    exact = {outcome for (_, _, dtype), outcome in lines.items() if dtype == "float32"}
    assert exact == {Outcome.OK, Outcome.REFUSED}
    passed = [outcome for outcome in lines.values() if outcome is Outcome.OK]
    assert len(passed) >= 900
