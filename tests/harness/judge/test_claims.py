"""Published numbers beside ours, and changes between two sets of records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from samples import cell, claim, measurement
from samples import searched as simulated

from harness.cells import paths
from harness.cells.experiment import load_experiment
from harness.cells.prediction import Holding
from harness.commands import claims as command
from harness.commands import gpu, present
from harness.judge.claims import Verdict, count, evidence, judge
from harness.judge.compare import Change, changes, grown
from harness.records import record
from harness.records.published import look_up
from harness.records.record import Measurement
from harness.records.table import Results, fresh

ROOT = Path(__file__).parents[3]
RECORDS = """system,hardware,num_gpus,tokens,source,source_locator
theirs,H100-80GB,2,4096,a paper,abstract
"""
TABLE = "name,tokens,source,source_locator\nours,1000,a paper,Table 1\n"
YAML = """question: q
source: s
base: {model: tiny-llama, seqlen: 1_000, world: phantom, engine: fsdp2, hardware: h100-80gb}
sweeps:
  - axes:
      _row:
        - method: {name: alst}
          claim: {id: one, table: told, row: {name: ours}, columns: {longest_tokens: tokens}}
figures: [feature_ablation]
"""


def held(nbytes: int, location: str = "layer.py:10") -> Holding:
    """A holding with the bytes of one line."""
    return Holding(
        category="activations",
        operator="aten::add",
        location=location,
        nbytes=nbytes,
        count=1,
    )


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measurement:
    """A checkout with one simulated cell for one published number, and its record."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CI", raising=False)
    record.write_text(paths.experiment("told"), YAML)
    record.write_text(paths.published("told"), TABLE)
    record.write_text(paths.published("records"), RECORDS)
    blocks = ("headline", "summary")
    record.write_text(
        paths.README, "".join(f"<!-- begin: {b} -->\n<!-- end: {b} -->\n" for b in blocks)
    )
    (of,) = load_experiment(paths.experiment("told")).cells().values()
    return simulated(of, holdings=[held(2**30)])


def keep(m: Measurement, folder: Path) -> None:
    """Write `m` to the path that its command reads."""
    record.write(folder / f"{m.cell.key}.json", m)


@pytest.mark.parametrize(
    ("quantity", "ours", "verdict"),
    [
        ("longest_tokens", 109.0, Verdict.REPRODUCED),
        ("longest_tokens", 91.0, Verdict.REPRODUCED),
        ("longest_tokens", 111.0, Verdict.LONGER),
        ("longest_tokens", 89.0, Verdict.REFUTED),
        ("step_seconds", 111.0, Verdict.REFUTED),
        ("longest_tokens", None, Verdict.NOT_MEASURED),
        ("longest_ratio", 111.0, Verdict.LONGER),
    ],
)
def test_a_verdict_follows_from_the_error(
    quantity: Any, ours: float | None, verdict: Verdict
) -> None:
    """Up to ten per cent either way is reproduced. Only a length can be longer."""
    assert judge(quantity, 100.0, ours) is verdict


@pytest.mark.parametrize(
    ("error", "quantity", "counted"),
    [
        (0.029, "step_seconds", (1, 1, 1, 0, 0)),
        (-0.029, "longest_tokens", (1, 1, 1, 0, 0)),
        (0.031, "longest_tokens", (0, 1, 1, 0, 0)),
        (-0.049, "device_bytes", (0, 1, 1, 0, 0)),
        (0.099, "longest_tokens", (0, 0, 1, 0, 0)),
        (0.11, "longest_tokens", (0, 0, 0, 1, 0)),
        (0.11, "longest_ratio", (0, 0, 0, 1, 0)),
        (0.11, "step_seconds", (0, 0, 0, 0, 1)),
        (-0.11, "longest_tokens", (0, 0, 0, 0, 1)),
    ],
)
def test_a_number_counts_within_every_bound_that_holds_it(
    error: float, quantity: Any, counted: tuple[int, ...]
) -> None:
    """Within 3, 5 and 10 %; beyond, a length that is longer is counted as longer and not as an error."""
    found = count([claim(error, quantity=quantity)])
    assert (*found.within.values(), found.longer, found.refuted) == counted
    assert list(found.within) == [0.03, 0.05, 0.10]
    assert (found.judged, found.absent, found.fitted) == (1, 0, 0)


@pytest.mark.parametrize(("error", "missed"), [(0.10, False), (-0.10, False), (0.11, True)])
def test_a_number_at_the_bound_is_not_missed(error: float, missed: bool) -> None:
    assert claim(0.0).model_copy(update={"error": error}).missed == missed


def test_fitted_and_absent_numbers_count_nowhere_else() -> None:
    """What a constant was fitted on is no evidence, and what has no record is not judged."""
    found = count([claim(0.0, fitted=True), claim(None, fitted=True), claim(None), claim(0.2)])
    assert (found.judged, found.longer, found.absent, found.fitted) == (1, 1, 1, 2)
    assert set(found.within.values()) == {0}


def test_every_committed_claim_finds_its_published_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables and rows that experiments name exist. Together they have all of Table 1 and Tables 2 to 4."""
    monkeypatch.chdir(ROOT)
    found = [
        each
        for path in sorted(paths.EXPERIMENTS.glob("paper_*.yaml"))
        for each in evidence([fresh(path, Path("nowhere"))])
    ]
    names = {each.id.removesuffix("-longest_tokens") for each in found}
    assert {f"table1-row{n}" for n in range(1, 7)} <= names
    assert {
        f"table{n}-{which}" for n in (2, 3, 4) for which in ("baseline", "deepspeed_alst")
    } <= names
    assert all(each.verdict is Verdict.NOT_MEASURED for each in found)


RATIO = """question: q
source: s
base: {model: tiny-llama, world: phantom, engine: fsdp2, hardware: h100-80gb}
sweeps:
  - axes:
      _row:
        - {method: baseline, seqlen: 1_000, claim: {id: base, table: told, row: {name: ours}, columns: {}}}
        - method: mst
          seqlen: 1_000
          claim: {id: times, table: told, row: {name: ours}, columns: {longest_ratio: ratio}, over: base}
figures: []
"""


def test_a_ratio_is_of_two_longest_sequences(checkout: Measurement) -> None:
    """It is the cell's longest sequence over that of the claim `over`. Without the latter there is no ratio."""
    record.write_text(paths.published("told"), "name,tokens,ratio\nours,1000,12\n")
    record.write_text(paths.experiment("told"), RATIO)
    base, times = load_experiment(paths.experiment("told")).cells().values()
    keep(simulated(times, longest=26_000), paths.cells("told"))
    (alone,) = evidence([fresh(paths.experiment("told"))])
    assert alone.verdict is Verdict.NOT_MEASURED
    keep(simulated(base, longest=2_000), paths.cells("told"))
    (found,) = evidence([fresh(paths.experiment("told"))])
    assert (found.id, found.unit, found.predicted) == ("times-longest_ratio", "x", 13.0)
    assert found.verdict is Verdict.REPRODUCED


@pytest.mark.parametrize(("old", "new"), [(", over: base", ""), ("over: base", "over: nobody")])
def test_a_ratio_without_its_base_is_refused(checkout: Measurement, old: str, new: str) -> None:
    """It is refused when the experiment is read."""
    record.write_text(paths.experiment("told"), RATIO.replace(old, new))
    with pytest.raises(ValueError, match="claim 'times': 'over' is"):
        load_experiment(paths.experiment("told"))


@pytest.mark.parametrize(
    ("table", "row", "column", "word"),
    [
        ("nothing", {}, "tokens", "no published table"),
        ("told", {"name": "theirs"}, "tokens", "0 rows"),
        ("told", {"name": "ours"}, "seconds", "no column"),
        ("told", {"name": "ours"}, "source", "no number"),
    ],
)
def test_a_claim_without_its_number_is_refused(
    checkout: Measurement, table: str, row: dict[str, Any], column: str, word: str
) -> None:
    """The message names the missing table, row or column."""
    with pytest.raises(ValueError, match=word):
        look_up(table, row, column)


def test_claims_print_the_stable_keys(
    checkout: Measurement, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prints one object per number, with the documented keys."""
    keep(checkout, paths.cells("told"))
    keep(checkout, paths.REFERENCE / "h100-80gb" / "told")
    assert command.claims(as_json=True) == 0
    (claim,) = json.loads(capsys.readouterr().out)
    assert claim == {
        "id": "one-longest_tokens",
        "source": "a paper, Table 1",
        "published": 1000.0,
        "unit": "tokens",
        "predicted": 1000.0,
        "measured": None,
        "error": 0.0,
        "used_for_fit": False,
        "verdict": "reproduced",
        "outcome": "ok",
    }


def test_a_regression_is_named_and_fails(
    checkout: Measurement, capsys: pytest.CaptureFixture[str]
) -> None:
    """A longest sequence shorter than the committed one gives exit code 1, with operator and line."""
    keep(checkout, paths.REFERENCE / "h100-80gb" / "told")
    grew = [held(2**30), held(2**29, "layer.py:12")]
    keep(
        simulated(checkout.cell, longest=900, slope=101, peak=3 * 2**29, holdings=grew),
        paths.cells("told"),
    )
    assert command.claims() == 1
    said = capsys.readouterr().err
    assert "longest_tokens 1,000 -> 900 (worse); grew: +512 MiB aten::add at layer.py:12" in said
    assert "bytes_per_local_token 100 -> 101" in said


def test_committed_records_are_judged_where_there_are_no_others(
    checkout: Measurement, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing runs. A record in `--results` comes before the committed one, and missing records are listed."""
    assert checkout.simulated is not None
    of_other_code = checkout.simulated.model_copy(update={"code": "0"})
    keep(
        checkout.model_copy(update={"simulated": of_other_code}),
        paths.REFERENCE / "h100-80gb" / "told",
    )
    more = "        - {method: layerwise, claim: {id: two, table: told, row: {name: ours}, columns: {longest_tokens: tokens}}}\n"
    record.write_text(paths.experiment("told"), YAML.replace("figures:", more + "figures:"))
    assert command.claims(as_json=True) == 0
    said = capsys.readouterr()
    assert [each["predicted"] for each in json.loads(said.out)] == [1000.0, None]
    assert "1 records are of other code" in said.err
    assert "1 claims have no record: two-longest_tokens" in said.err
    keep(simulated(checkout.cell, longest=2_000), paths.cells("told"))
    assert command.claims(as_json=True) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)[0]["predicted"] == 2000.0
    assert "other code" not in said.err


def test_a_record_of_other_code_is_no_regression(
    checkout: Measurement, capsys: pytest.CaptureFixture[str]
) -> None:
    """It does not show how the current code performs."""
    keep(checkout, paths.REFERENCE / "h100-80gb" / "told")
    worse = simulated(checkout.cell, longest=900)
    assert worse.simulated is not None
    keep(
        worse.model_copy(update={"simulated": worse.simulated.model_copy(update={"code": "0"})}),
        paths.cells("told"),
    )
    assert command.claims() == 0
    assert "1 records are of other code" in capsys.readouterr().err


def test_confirm_without_gpu_records_is_refused(checkout: Measurement) -> None:
    """No cell of this experiment was measured on a GPU."""
    keep(checkout, paths.cells("told"))
    with pytest.raises(ValueError, match="told: no cell has both"):
        gpu.confirm("told")


def test_compare_needs_records_in_common(checkout: Measurement, tmp_path: Path) -> None:
    """Folders that do not exist, have no record or have no common cell are refused in one line."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no such folder"):
        command.compare(tmp_path / "absent", tmp_path)
    with pytest.raises(ValueError, match="no records"):
        command.compare(tmp_path / "empty", tmp_path)
    keep(checkout, tmp_path / "a")
    other = cell("alst", 1, world="phantom", engine="fsdp2", hardware="h100-80gb")
    keep(simulated(other), tmp_path / "b")
    with pytest.raises(ValueError, match="no cell in common"):
        command.compare(tmp_path / "a", tmp_path / "b")


def moved(before: Measurement, after: Measurement) -> list[Change]:
    """Changes between two records of one cell."""
    return changes({"key": before}, {"key": after})


def test_brackets_that_overlap_are_no_change(checkout: Measurement) -> None:
    """A search has a finite precision. Lengths within it are equal."""
    assert not moved(checkout, simulated(checkout.cell, longest=1_005, holdings=[held(2**30)]))
    (change,) = moved(checkout, simulated(checkout.cell, longest=1_010))
    assert not change.worse


def test_one_byte_per_token_is_noticed(checkout: Measurement) -> None:
    """The slope is compared as well as the length."""
    (change,) = moved(checkout, simulated(checkout.cell, slope=101.0))
    assert (change.quantity, change.worse) == ("bytes_per_local_token", True)


def test_bytes_of_a_run_that_ended_otherwise_are_not_compared() -> None:
    """Only its outcome is."""
    killed = measurement(peak=2).model_copy(update={"outcome": record.Outcome.KILLED})
    (change,) = moved(measurement(), killed)
    assert (change.quantity, change.worse) == ("outcome", True)
    assert [each.quantity for each in moved(measurement(), measurement(peak=2))] == ["peak_bytes"]


def test_lines_that_moved_within_a_file_are_not_growth() -> None:
    """An edit above a line changes only its number."""
    assert grown([held(5, "layer.py:10")], [held(5, "layer.py:11")]) == []


def test_a_reference_is_replaced_with_a_reason_and_not_in_ci(
    checkout: Measurement, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changed numbers need a reason, which is kept with the difference. CI may not replace them."""
    keep(checkout, paths.cells("told"))
    present.reference("told")
    assert "| one |" in (paths.REFERENCE / "claims.md").read_text()
    keep(simulated(checkout.cell, longest=2_000), paths.cells("told"))
    with pytest.raises(ValueError, match="say why with --reason"):
        present.reference("told")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(ValueError, match="not updated in CI"):
        present.reference("told", reason="better")
    monkeypatch.delenv("CI")
    present.reference("told", reason="Tiles are smaller")
    log = paths.CHANGES.read_text()
    assert "Tiles are smaller" in log
    assert "longest_tokens 1,000 -> 2,000" in log


def test_a_record_of_other_code_is_simulated_again(checkout: Measurement) -> None:
    """A simulated number is only valid for the code that made it."""
    from harness.run.measure import stale

    assert checkout.simulated is not None
    assert not stale(checkout)
    other = checkout.simulated.model_copy(update={"code": "0"})
    assert stale(checkout.model_copy(update={"simulated": other}))


def test_results_have_the_claims(checkout: Measurement) -> None:
    """The results of an experiment have the published numbers of its cells."""
    results: Results = fresh(paths.experiment("told"))
    assert [claim.id for _, claim in results.claims] == ["one"]
