"""What a GPU measured beside what a phantom device read of the same cell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from samples import cuda_cell, cuda_measurement, gpu_sweep, simulated, twin_of

from harness.cells import paths
from harness.commands import gpu as gpu_command
from harness.judge.twins import torch_versions, twins
from harness.present.grids.measured import summary
from harness.present.grids.predicted import twin_grid
from harness.present.report import section
from harness.records import record
from harness.records.metrics import mfu, nvml_bytes
from harness.records.record import Measurement
from harness.records.table import Results, gates, measured_part, series

GIB = 2**30


def test_a_cell_and_its_twin_are_compared_phase_by_phase() -> None:
    """Allocated bytes are judged, others are shown; a cell that failed has none."""
    found = [t for t in twins(gpu_sweep()) if t.cell == cuda_cell("alst")]
    assert [(t.quantity, t.judged) for t in found] == [
        ("allocated, forward", True),
        ("allocated, backward", True),
        ("allocated, update", True),
        ("reserved", False),
        ("nvml", False),
    ]
    assert not any(t.missed for t in found)
    assert {t.cell.train.seqlen for t in twins(gpu_sweep())} == {32_768, 131_072}
    assert len([t for t in twins(gpu_sweep()) if t.cell.train.method.name == "baseline"]) == 5


@pytest.mark.parametrize("more", [8, -8])
def test_a_few_bytes_are_a_miss(more: int) -> None:
    """Either way, in every phase that differs."""
    assert all(t.missed == t.judged for t in twins(gpu_sweep(more)))


def test_other_versions_of_torch_are_not_judged() -> None:
    """Each allocates as it does; the build for processors of one version is that version."""
    of = cuda_cell()

    def found(version: str) -> Results:
        gpu = cuda_measurement(of)
        versions = {"torch": version}
        gpu = gpu.model_copy(
            update={"provenance": gpu.provenance.model_copy(update={"versions": versions})}
        )
        return results_of([gpu, simulated(twin_of(of), GIB)])

    other, same = found("2.12.1+cu130"), found("2.13.0+cu130")
    assert len(twins(other)) == 5
    assert not any(t.judged or t.missed for t in twins(other))
    assert torch_versions(other) == [("2.12.1", "2.13.0")]
    assert [t.missed for t in twins(same)] == [True, True, True, False, False]
    assert torch_versions(same) == []


def test_the_heaviest_rank_is_compared() -> None:
    """A phantom device plays it; a GPU's record has all of them."""
    of = cuda_cell()
    light, heavy = cuda_measurement(of, 8 * GIB), cuda_measurement(of, 16 * GIB)
    assert light.readings is not None
    assert heavy.readings is not None
    memory = light.readings.memory + heavy.readings.memory
    both = light.model_copy(
        update={"readings": light.readings.model_copy(update={"memory": memory})}
    )
    found = twins(results_of([both, simulated(twin_of(of), 16 * GIB)]))
    assert not any(t.missed for t in found)


def results_of(records: list[Measurement]) -> Results:
    """An experiment of these cells."""
    cells = {m.cell.key: m.cell for m in records}
    return Results("x", "", "", [], cells, {m.cell.key: m for m in records})


def test_a_twin_has_the_length_of_its_cell() -> None:
    """A cell is compared with no other's twin."""
    short, long = cuda_cell(seqlen=32_768), cuda_cell(seqlen=131_072)
    found = twins(
        results_of(
            [
                cuda_measurement(short, 8 * GIB),
                cuda_measurement(long, 16 * GIB),
                simulated(twin_of(long), 16 * GIB),
                simulated(twin_of(short), 8 * GIB),
            ]
        )
    )
    assert len(found) == 10
    assert not any(t.missed for t in found)


@pytest.mark.parametrize(
    "other",
    [
        {"attention": "sdpa_flash"},
        {"expandable_segments": False},
        {"warmup": 0},
        {"engine": "zero"},
        {"hardware": "h200-141gb"},
    ],
)
def test_a_twin_is_the_same_cell(other: dict[str, Any]) -> None:
    """Of the same kernel, allocator, steps before, engine and device."""
    records = [cuda_measurement(cuda_cell()), simulated(twin_of(cuda_cell(**other)))]
    assert twins(results_of(records)) == []


def confirmed(more_bytes: int, monkeypatch: pytest.MonkeyPatch, folder: Path) -> int:
    """The exit code of `alst confirm` on the records of a sweep that lie in `folder`."""
    monkeypatch.chdir(folder)
    text = """question: q
source: s
base: {model: llama3.1-8b, overrides: {num_hidden_layers: 2}, method: alst, engine: fsdp2,
  dtype: bfloat16, seqlen: 32_768, hardware: h100-80gb}
sweeps:
  - base: {world: cuda, gate: false, steps: 2}
  - base: {world: phantom, warmup: 1, simulation: {search: false}}
"""
    record.write_text(paths.experiment("sample"), text)
    gpu = cuda_measurement(cuda_cell())
    ours = simulated(twin_of(gpu.cell), 20 * GIB + more_bytes)
    for m in (gpu, ours):
        record.write(paths.cells("sample") / f"{m.cell.key}.json", m)
    return gpu_command.confirm("sample")


def test_confirm_fails_where_bytes_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And says how many are equal."""
    assert confirmed(0, monkeypatch, tmp_path) == 0
    assert "3 of 3 allocated numbers are equal to the byte" in capsys.readouterr().out
    assert confirmed(1024, monkeypatch, tmp_path) == 1
    assert "+1,024 B" in capsys.readouterr().out


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
