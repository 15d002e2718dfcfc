"""What a GPU measured beside what was simulated of the same run."""

from __future__ import annotations

from pathlib import Path

import pytest
from samples import cuda_cell, cuda_measurement, gpu_sweep, simulated, twin_of

from harness.metrics import mfu, nvml_bytes
from harness.report import section, summary, twin_grid
from harness.table import Results, gates, measured_part, series
from harness.twins import twins

GIB = 2**30


def test_a_cell_and_its_twin_are_compared_phase_by_phase() -> None:
    """Counted numbers are judged, modelled ones are shown; a cell that failed has none."""
    found = [t for t in twins(gpu_sweep(0.02)) if t.cell == cuda_cell("alst")]
    assert [(t.quantity, t.judged) for t in found] == [
        ("allocated, forward", True),
        ("allocated, backward", True),
        ("reserved", False),
    ]
    assert found[1].error == pytest.approx(0.02)
    assert not any(t.missed for t in found)
    assert {t.cell.train.seqlen for t in twins(gpu_sweep())} == {32_768, 131_072}
    assert len([t for t in twins(gpu_sweep()) if t.cell.train.method.name == "baseline"]) == 3


def test_a_count_that_is_further_off_is_missed() -> None:
    """3 per cent either way."""
    assert all(t.missed == t.judged for t in twins(gpu_sweep(-0.04)))


def test_a_twin_has_the_length_of_its_cell() -> None:
    """A cell is compared with no other's simulation."""
    short, long = cuda_cell(seqlen=32_768), cuda_cell(seqlen=131_072)
    records = [
        cuda_measurement(short, 8 * GIB),
        cuda_measurement(long, 16 * GIB),
        simulated(twin_of(long), 16 * GIB),
        simulated(twin_of(short), 8 * GIB),
    ]
    cells = {m.cell.key: m.cell for m in records}
    found = twins(Results("x", "", "", [], cells, {m.cell.key: m for m in records}))
    assert len(found) == 6
    assert all(t.error == 0 for t in found)


def test_a_twin_has_the_kernel_that_ran() -> None:
    """Another kernel has other scratch; PyTorch's choice and its flash kernel are one."""
    flash, cudnn = cuda_cell(attention="sdpa_flash"), cuda_cell(attention="sdpa_cudnn")
    twin = twin_of(cuda_cell())
    records = [cuda_measurement(flash), cuda_measurement(cudnn), simulated(twin)]
    cells = {m.cell.key: m.cell for m in records}
    results = Results("x", "", "", [], cells, {m.cell.key: m for m in records})
    assert {t.cell.key for t in twins(results)} == {flash.key}


def test_a_cell_of_full_width_answers_to_a_small_one() -> None:
    """The same method, engine and kernels on the same hardware passed with a small model."""
    results = gpu_sweep()
    compared = gates(results, series(results.cells))
    assert compared[cuda_cell("alst").key] == "passed on tiny-llama"
    assert compared[cuda_cell("baseline").key] == "not compared"


def test_the_report_shows_both_kinds_of_cell() -> None:
    """Measured cells as in any sweep, twins in a table of their own."""
    results = gpu_sweep()
    shown = section(results, Path("none"))
    assert shown.twins.rows == twin_grid(results).rows != []
    assert not shown.simulated
    assert len(shown.cells.rows) == len(measured_part(results).cells) == 6
    assert "peak lower" in summary(measured_part(results)) or summary(measured_part(results)) == ""


def test_utilisation_counts_what_training_needs() -> None:
    """6 FLOPs per parameter and token but the lookup's, 12 per visible pair, head and layer, over the peak."""
    m = cuda_measurement()
    assert m.readings is not None
    tokens, lookup = 32_768, 128_256 * 4096
    linear = 6 * (1_486_909_440 - lookup) * tokens
    attention = 12 * 2 * 32 * 128 * tokens * (tokens + 1) // 2
    assert mfu.value(m) == pytest.approx((linear + attention) / 1.005 / 989.4e12)
    slow = m.model_copy(update={"cell": m.cell.model_copy(update={"hardware": "cpu"})})
    assert mfu.value(slow) is None


def test_nvml_is_the_largest_reading_of_the_run() -> None:
    """Of all devices and sections."""
    assert nvml_bytes.value(cuda_measurement(allocated=GIB)) == 4 * GIB
