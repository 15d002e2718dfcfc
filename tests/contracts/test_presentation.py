"""Every metric, figure and experiment fulfils its contract. New files are tested automatically."""

from __future__ import annotations

from pathlib import Path

import pytest
from samples import gpu_sweep, measurement, sweep

from harness.cells.cell import Cell
from harness.cells.experiment import load_experiment
from harness.present import drawing, pictures
from harness.present.figures.base import draw, figures
from harness.records import record
from harness.records.metrics import METRICS, Metric

ROOT = Path(__file__).parents[2]
GOLDEN = [ROOT / "tests" / "golden" / name for name in ("record.json", "record_cuda.json")]
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.yaml"))
COARSE = 30
"""Dots per inch of pictures that nobody looks at."""


@pytest.mark.parametrize("metric", METRICS.values(), ids=list(METRICS))
def test_metric_gives_a_value_on_the_stored_record(metric: Metric) -> None:
    """A metric reads a record with every reading of a world, as an earlier version wrote it."""
    assert metric.unit
    assert "\n" not in metric.meaning
    values = [metric.value(record.read(path)) for path in GOLDEN]
    assert any(isinstance(value, float | int) for value in values)


@pytest.mark.parametrize("metric", METRICS.values(), ids=list(METRICS))
def test_metric_has_no_value_without_readings(metric: Metric) -> None:
    """A failed cell's record has no values."""
    assert metric.value(measurement().model_copy(update={"readings": None})) is None


@pytest.mark.parametrize("figure", figures())
def test_figure_draws_the_sample_sweep(figure: str) -> None:
    """A figure handles failed, wrong and missing cells."""
    assert "<svg" in pictures.svg(draw(figure, sweep()))


@pytest.mark.parametrize("figure", figures())
def test_figure_is_identical_when_drawn_again(figure: str) -> None:
    """Equal results give equal files."""
    results = sweep(models=("tiny-llama",))
    assert pictures.svg(draw(figure, results)) == pictures.svg(draw(figure, results))


@pytest.mark.parametrize("figure", figures())
def test_figure_draws_a_sweep_of_cells_of_a_gpu_and_of_phantom_devices(figure: str) -> None:
    """The experiment has cells and their twins."""
    assert pictures.png(draw(figure, gpu_sweep()), dpi=COARSE).startswith(b"\x89PNG")


@pytest.mark.parametrize("figure", figures())
def test_figure_draws_a_sweep_that_was_not_run(figure: str) -> None:
    """A figure without records says so and does not fail."""
    results = sweep(models=("tiny-llama",))
    results.measurements.clear()
    assert "not measured" in drawing.source_line(results)
    assert pictures.png(draw(figure, results), dpi=COARSE).startswith(b"\x89PNG")


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiment_expands(path: Path) -> None:
    """An experiment has cells, unique keys that are valid file names, and existing figures."""
    experiment = load_experiment(path)
    cells = experiment.cells()
    assert cells
    assert [cell.key for cell in cells.values()] == list(cells)
    assert all(len(key) < 200 for key in cells)
    assert set(experiment.figures) <= set(figures())


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiment_backs_performance_with_a_gate(path: Path) -> None:
    """A timed cell without a gradient comparison has one at another length, all else equal.

    On a GPU the comparison is at another model size, because a full-width model is too large for the fp64 truth.
    """
    cells = load_experiment(path).cells().values()

    def kind(cell: Cell) -> str:
        dumped = cell.model_dump(mode="json")
        sized = ["seqlen"]
        if cell.world == "cuda":
            sized += ["model", "overrides"]
        for name in sized:
            dumped["train"].pop(name)
        how_often = {"gate", "timed", "timeout_s", "repetition", "warmup", "steps"}
        return str({name: value for name, value in dumped.items() if name not in how_often})

    gated = {kind(cell) for cell in cells if cell.gate}
    assert {kind(cell) for cell in cells if cell.timed} <= gated
