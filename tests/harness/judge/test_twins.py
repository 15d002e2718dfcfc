"""A measured cell beside its twin, the same cell on a phantom device."""

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
from harness.present.pages.base import Kept
from harness.present.report import section
from harness.records import record
from harness.records.metrics import value_of
from harness.records.record import Measurement
from harness.records.table import Results, gates, measured_part, series

GIB = 2**30


def test_a_cell_and_its_twin_are_compared_phase_by_phase() -> None:
    """Allocated bytes are judged, other bytes are shown. A failed cell has neither."""
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


def test_an_error_is_relative_to_the_measured_number() -> None:
    """It is positive where the prediction is larger."""
    (twin, *_) = twins(gpu_sweep())
    assert twin.model_copy(update={"measured": 4.0, "predicted": 5.0}).error == 0.25
    assert twin.model_copy(update={"measured": 4.0, "predicted": 3.0}).error == -0.25


@pytest.mark.parametrize("more", [8, -8])
def test_a_few_bytes_are_a_miss(more: int) -> None:
    """More and fewer bytes are a miss, in every phase that differs."""
    assert all(t.missed == t.judged for t in twins(gpu_sweep(more)))


def test_other_versions_of_torch_are_not_judged() -> None:
    """Each version allocates differently. The CPU build of a version counts as that version."""
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
    """The twin runs only this rank. A GPU's record has all ranks."""
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
    """An experiment with these records."""
    cells = {m.cell.key: m.cell for m in records}
    return Results("x", "", "", [], cells, {m.cell.key: m for m in records})


def test_a_twin_has_the_length_of_its_cell() -> None:
    """A cell is compared only with its own twin."""
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
    """It has the same kernel, allocator, warm-up steps, engine and device."""
    records = [cuda_measurement(cuda_cell()), simulated(twin_of(cuda_cell(**other)))]
    assert twins(results_of(records)) == []


def confirmed(more_bytes: int, monkeypatch: pytest.MonkeyPatch, folder: Path) -> int:
    """Exit code of `alst confirm` on the records of a sweep in `folder`."""
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
    """It also prints how many are equal."""
    assert confirmed(0, monkeypatch, tmp_path) == 0
    assert "3 of 3 allocated numbers are equal to the byte" in capsys.readouterr().out
    assert confirmed(1024, monkeypatch, tmp_path) == 1
    assert "+1,024 B" in capsys.readouterr().out


def test_a_full_width_cell_is_gated_by_a_small_one() -> None:
    """A small model passed the gate with the same method, engine and kernels on the same hardware."""
    results = gpu_sweep()
    compared = gates(results, series(results.cells))
    assert compared[cuda_cell("alst").key] == "passed on tiny-llama"
    assert compared[cuda_cell("baseline").key] == "not compared"


def test_the_report_shows_both_kinds_of_cell() -> None:
    """Measured cells are shown as in any sweep, twins in a separate table."""
    results = gpu_sweep()
    shown = section(Kept(Path("none"), results))
    tables = {table.title: table.grid.rows for table in shown.tables}
    assert tables["A GPU beside a phantom device"] == twin_grid(results).rows != []
    assert len(tables["All cells"]) == len(measured_part(results).cells) == 6
    assert "peak lower" in summary(measured_part(results)) or summary(measured_part(results)) == ""


def test_utilisation_counts_what_training_needs() -> None:
    """6 FLOPs per token and parameter without the lookup, 12 per visible pair, head and layer, over the peak."""
    m = cuda_measurement()
    assert m.readings is not None
    tokens, lookup = 32_768, 128_256 * 4096
    linear = 6 * (1_486_909_440 - lookup) * tokens
    attention = 12 * 2 * 32 * 128 * tokens * (tokens + 1) // 2
    assert value_of("mfu", m) == pytest.approx((linear + attention) / 1.005 / 989.4e12)
    slow = m.model_copy(update={"cell": m.cell.model_copy(update={"hardware": "cpu"})})
    assert value_of("mfu", slow) is None


def test_nvml_is_the_largest_reading_of_the_run() -> None:
    """The maximum is over all devices and sections."""
    assert value_of("nvml_bytes", cuda_measurement(allocated=GIB)) == 4 * GIB
