"""Model types of transformers: a part of the committed table runs again, with every method."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from filelock import FileLock
from rich.console import Console
from training import assert_same_gradients, config_of, run_steps, truth_of

from harness.cells import paths
from harness.cells.cell import Cell
from harness.cells.experiment import Experiment, load_experiment
from harness.commands.matrix import Work, run
from harness.commands.run import truth_cache
from harness.gate.verdict import exceptions, judgement
from harness.judge.defects import plant, read_defects
from harness.records.families import committed
from harness.records.record import Outcome
from harness.run.measure import measure
from harness.run.ranks import truths

if TYPE_CHECKING:
    from conftest import Ranks

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


def cells_of(experiment: Experiment, models: Collection[str]) -> list[Work]:
    """The rows of `models` in fp32, method by method."""
    found = [
        (row, cell)
        for row, cell in experiment.matrix_cells()
        if row.levels["model"] in models and row.levels["dtype"] == "float32"
    ]
    return sorted(found, key=lambda pair: pair[0].levels["method"])


@pytest.fixture(scope="session")
def prepared(shared: Path, request: pytest.FixtureRequest) -> Path:
    """A folder of results with the truths of the `KINDS` that run: many in one process, once for all workers of a test run."""
    wanted = [
        item.callspec.params["model"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and "prepared" in item.fixturenames
    ]
    cells = [cell for _, cell in cells_of(load_experiment(EXPERIMENT), wanted)]
    with FileLock(shared / "families.lock"):
        assert all(truth for some in truths(cells, truth_cache(shared)) for truth in some)
    return shared


@pytest.mark.parametrize("model", KINDS.values(), ids=lambda model: model)
def test_models_train_as_the_committed_table_says(
    model: str, experiment: Experiment, prepared: Path
) -> None:
    """Every gradient is right, or the model is refused, as in the committed run."""
    said = {
        (f.method, f.dtype): f.outcome
        for f in committed()
        if f.model == model and f.dtype == "float32"
    }
    assert said
    work = cells_of(experiment, [model])
    done = list(run(Console(quiet=True), experiment, work, 1, force=True, results=prepared))
    found = {
        (row.levels["method"], row.levels["dtype"]): (m.outcome, judgement(m)) for row, m in done
    }
    for key, (outcome, why) in found.items():
        assert outcome is said[key], why
    refused = {key for key in said if key not in found}
    assert all(said[key] is Outcome.REFUSED for key in refused)


TILES_OFF = {"name": "alst", "tile_mlp": False, "tile_norm": False}
WAYS_OUT: dict[str, tuple[str, dict[str, Any]]] = {
    "ctrl": ("use method 'baseline' with checkpoint: false", {"checkpoint": False}),
    "doge": ("or use method 'baseline' if the model itself makes one", {}),
    "llama4_text": ("set tile_mlp: false and tile_norm: false", {"method": TILES_OFF}),
}
"""Model types -> what method `alst` says, and settings that follow it."""


@pytest.mark.parametrize("model", WAYS_OUT)
def test_a_refused_model_trains_by_the_way_out(ranks: Ranks, model: str) -> None:
    """The settings that the error names have the gradients of the stock model."""
    said, settings = WAYS_OUT[model]
    path = str(Path(__file__).parent / "families" / f"{model}.json")
    with pytest.raises(AssertionError, match=said):
        ranks(1)(run_steps, config_of(model=path, method="alst"))
    config = config_of(model=path, **settings)
    assert_same_gradients(ranks(1)(run_steps, config)[0].gradients, truth_of(config).gradients)


def cell_of(experiment: Experiment, model: str, method: str) -> Cell:
    """The cell of a model with a method in bf16."""
    wanted = {"model": model, "method": method, "dtype": "bfloat16"}
    (cell,) = [cell for row, cell in experiment.matrix_cells() if row.levels == wanted]
    return cell


EXCUSED = {
    "hunyuan_v1_moe": "model.layers.0.mlp.gate.wg takes 0 in place of 1 for row 14",
    "diffllama": "lambda_",
}
"""Models that train in bf16 as the stock model would with another rounding -> what says so."""


@pytest.mark.parametrize("model", EXCUSED)
def test_only_rounding_is_excused_in_bf16(
    model: str, experiment: Experiment, tmp_path: Path
) -> None:
    """A token goes to another expert, or terms cancel: the cell passes and says so. With a defect it fails."""
    cell, defects = cell_of(experiment, model, "ring"), read_defects(paths.DEFECTS)
    measured = measure(cell, tmp_path / "truths")
    assert measured.outcome is Outcome.OK, measured.detail
    assert EXCUSED[model] in exceptions(measured)
    folder = plant(defects["a ring forgets what it merged"], tmp_path)
    wrong = measure(cell, tmp_path / "truths", sources=folder)
    assert wrong.outcome is Outcome.WRONG_GRADIENT, judgement(wrong)


def test_a_stock_model_that_does_not_run_in_bf16_is_refused(
    experiment: Experiment, tmp_path: Path
) -> None:
    """There is nothing to compare with, and the reason is one line."""
    refused = measure(cell_of(experiment, "xlstm", "alst"), tmp_path)
    assert refused.outcome is Outcome.REFUSED
    assert str(refused.detail).startswith("the stock model does not run in bfloat16: ")
    assert "\n" not in str(refused.detail)


def test_the_table_has_every_model_and_no_wrong_gradient(experiment: Experiment) -> None:
    """Each row of the experiment has a line. What does not pass is refused, and fp32 has no exceptions."""
    lines = {(f.model, f.method, f.dtype): f.outcome for f in committed()}
    rows = {tuple(row.levels[k] for k in ("model", "method", "dtype")) for row in experiment.rows}
    assert set(lines) == rows
    assert set(lines.values()) == {Outcome.OK, Outcome.REFUSED}
    assert not any(f.exceptions for f in committed() if f.dtype == "float32")
    passed = [outcome for outcome in lines.values() if outcome is Outcome.OK]
    assert len(passed) >= 900
