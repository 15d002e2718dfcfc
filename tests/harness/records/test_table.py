"""Records to tables."""

from __future__ import annotations

from pathlib import Path

import pytest
from samples import cell, failure, measurement, searched, sweep

from harness.cells import paths
from harness.cells.experiment import load_experiment
from harness.records import record
from harness.records.metrics import METRICS
from harness.records.record import Outcome
from harness.records.table import (
    NOT_MEASURED,
    Results,
    committed,
    duels,
    fresh,
    gates,
    repeated_duels,
    series,
    series_in_order,
    tidy,
    wide,
)


def results(*measurements: record.Measurement) -> Results:
    """An experiment of just these records."""
    by_key = {m.cell.key: m for m in measurements}
    cells = {key: m.cell for key, m in by_key.items()}
    return Results("t", "?", "here", [], cells, by_key)


def test_one_row_per_cell_and_metric_with_its_unit() -> None:
    """A measured cell has a row for every metric."""
    table = tidy(results(measurement()))
    assert sorted(table["metric"]) == list(METRICS)
    assert table.set_index("metric").loc["peak_bytes", "unit"] == "B"


def test_time_is_the_slowest_rank_and_the_median_step() -> None:
    """`step_s` takes the maximum over ranks, then the median over steps."""
    m = measurement(cell(steps=3))
    assert m.readings
    readings = m.readings.model_copy(update={"step_s": [[1.0, 2.0], [5.0, 1.0], [3.0, 3.0]]})
    row = wide(tidy(results(m.model_copy(update={"readings": readings})))).iloc[0]
    assert (row["step_min_s"], row["step_s"], row["step_max_s"]) == (2.0, 3.0, 5.0)
    assert row["tokens_per_s"] == pytest.approx(1024 / 3)


def test_throughput_counts_the_samples_of_all_data_parallel_ranks() -> None:
    """Two data-parallel ranks train two samples in the time of a step."""
    rows = wide(tidy(results(measurement(cell("baseline", 2)), measurement(cell("alst", 2)))))
    tokens = rows.set_index("method")["tokens_per_s"]
    assert tokens["baseline"] == pytest.approx(2 * tokens["alst"])


def test_memory_is_the_largest_over_ranks() -> None:
    """`peak_bytes` is that of the rank that would run out first."""
    m = measurement()
    assert m.readings
    small = m.readings.memory[0]
    large = small.model_copy(update={"peak_bytes": small.peak_bytes + 1})
    readings = m.readings.model_copy(update={"memory": [small, large]})
    table = wide(tidy(results(m.model_copy(update={"readings": readings}))))
    assert table["peak_bytes"].item() == small.peak_bytes + 1


def test_untimed_cells_have_no_time() -> None:
    """Times of cells that ran beside others are not shown."""
    assert wide(tidy(results(measurement(cell(timed=False)))))["step_s"].isna().all()


def test_a_failed_cell_is_a_row_with_its_outcome() -> None:
    """An infeasible cell is a result."""
    row = wide(tidy(results(failure(cell(), Outcome.HOST_OOM)))).iloc[0]
    assert row["outcome"] == "host_oom"
    assert row[list(METRICS)].isna().all()


def test_a_cell_without_a_record_is_not_measured() -> None:
    """A hole says what it is."""
    table = wide(tidy(sweep()))
    assert (table["outcome"] == NOT_MEASURED).sum() == 1


def test_series_names_what_varies_within_a_method() -> None:
    """Options that all cells of a method share stay out of its name."""
    cells = {
        c.key: c
        for c in (
            cell(options={"tile_mlp": True, "tiles": 4}),
            cell(options={"tile_mlp": False, "tiles": 4}),
            cell("baseline"),
        )
    }
    assert list(series(cells).values()) == ["alst tile_mlp=True", "alst tile_mlp=False", "baseline"]


@pytest.mark.parametrize(("passed", "state"), [(True, "passed at 1K"), (False, "failed at 1K")])
def test_a_length_without_a_gate_answers_to_the_gated_one(passed: bool, state: str) -> None:
    """A long cell stands on the comparison of the same method at a short length."""
    short, long = measurement(cell(), passed=passed), measurement(cell(seqlen=4096, gate=False))
    sweep_of_two = results(short, long)
    assert gates(sweep_of_two, series(sweep_of_two.cells))[long.cell.key] == state


def test_a_method_never_compared_is_not_compared() -> None:
    """No comparison at any length vouches for nothing."""
    alone = results(measurement(cell(gate=False)))
    assert list(gates(alone, series(alone.cells)).values()) == ["not compared"]


def test_duels_pair_cells_that_differ_in_the_method_only() -> None:
    """A cell of another length or engine option is no opponent."""
    records = [
        measurement(cell("alst"), speed=2.0, peak=0.5),
        measurement(cell("deepspeed_alst")),
        measurement(cell("deepspeed_alst", seqlen=2048)),
        measurement(cell("deepspeed_alst", engine={"name": "zero", "stage": 1})),
    ]
    pairs = duels(wide(tidy(results(*records))), "alst", "deepspeed_alst")
    assert len(pairs) == 1
    assert pairs["peak_ratio"].item() == pytest.approx(0.5)
    assert pairs["time_ratio"].item() == pytest.approx(0.5)


def test_fresh_reads_the_records_there_are(tmp_path: Path) -> None:
    """Records are found by key; a missing one is no error."""
    path = tmp_path / "one.yaml"
    path.write_text(
        "question: q\nsource: s\nbase: {model: tiny-llama, method: baseline}\n"
        "sweeps: [{axes: {seqlen: [128, 256]}}]\n"
    )
    first = measurement(cell("baseline", 1, 128))
    record.write(tmp_path / f"{first.cell.key}.json", first)
    loaded = fresh(path, tmp_path)
    assert len(loaded.cells) == 2
    assert list(loaded.measurements.values()) == [first]


def test_a_broken_record_is_named(tmp_path: Path) -> None:
    """A record that is none fails with its path."""
    file = tmp_path / "broken.json"
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"broken\.json"):
        record.read(file)


def test_a_repetition_is_compared_with_itself() -> None:
    """A machine that is slow for a while is slow for both: ratios do not see it, times do."""
    cells, measurements = {}, {}
    for repetition, machine in enumerate((1.0, 0.2, 1.0), start=1):
        for method, speed, peak in (("alst", 1.0, 2.0), ("layerwise", 0.8, 1.0)):
            each = cell(method, repetition=repetition)
            cells[each.key] = each
            measurements[each.key] = measurement(each, speed * machine, peak=peak)
    results = Results("sample", "", "", [], cells, measurements)
    (row,) = repeated_duels(results, "alst").to_dict("records")
    assert row["repetitions"] == 3
    assert (row["peak_low"], row["peak"], row["peak_high"]) == (0.5, 0.5, 0.5)
    for name in ("time_low", "time", "time_high"):
        assert row[name] == pytest.approx(1 / 0.8)


def test_a_cell_without_repetitions_keeps_its_key() -> None:
    """Records from before there were any are found; two repetitions are two records."""
    assert cell().key == cell(repetition=0).key
    assert len({cell(repetition=n).key for n in range(3)}) == 3


MIXED = """question: q
source: s
sweeps:
  - base: {model: tiny-llama, world_size: 2, seqlen: 1024}
    axes: {method: [{name: ring, cp: 2}, {name: baseline}, {name: alst, sp: 2}]}
"""
PREDICTED = """question: q
source: s
base: {model: tiny-llama, seqlen: 1_000, world: phantom, engine: fsdp2}
sweeps:
  - axes: {hardware: [h200-141gb, h100-80gb], method: [mst, alst]}
"""


def test_committed_cells_come_in_the_order_of_the_experiment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those with a record; the names of files say nothing of it."""
    monkeypatch.chdir(tmp_path)
    path = paths.experiment("mixed")
    record.write_text(path, MIXED)
    cells = load_experiment(path).cells()
    folder = paths.REFERENCE / "cpu" / "mixed"
    for key, each in cells.items():
        record.write(folder / f"{key}.json", measurement(each))
    ((where, found),) = committed(path)
    assert (where, series_in_order(found)) == (folder, ["ring", "baseline", "alst"])
    (folder / f"{next(iter(cells))}.json").unlink()
    assert series_in_order(committed(path)[0][1]) == ["baseline", "alst"]
    for key in list(cells)[1:]:
        (folder / f"{key}.json").unlink()
    with pytest.raises(ValueError, match="no records"):
        committed(path)


def test_forecasts_of_all_hardware_are_one_with_records_and_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cell without a record is there, and so is an experiment without any. Their chart lies with most records."""
    monkeypatch.chdir(tmp_path)
    path = paths.experiment("told")
    record.write_text(path, PREDICTED)
    cells = load_experiment(path).cells()
    ((_, none),) = committed(path)
    assert (list(none.cells), none.measurements) == (list(cells), {})
    for key, each in list(cells.items())[1:]:
        record.write(paths.REFERENCE / each.hardware / "told" / f"{key}.json", searched(each))
    ((folder, found),) = committed(path)
    assert folder == paths.REFERENCE / "h100-80gb" / "told", "two records of three"
    assert list(found.cells) == list(cells)
    assert list(found.measurements) == list(cells)[1:]
